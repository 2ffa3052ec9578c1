"""`--device`: all of a pass happens where it should, tried on a device that is only pretended.

On a real GPU, `TRITON_INTERPRET=0 pytest -m gpu` compares its figures with the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.conversion import TINY, convert
from tests.support.pretend_device import DEVICE, PretendDevice
from v4quant.calibration import collect as calibration
from v4quant.calibration.collect import DrawnCorpus, calibrate_to, solve_settings
from v4quant.evaluation import evaluate as evaluation
from v4quant.evaluation.evaluate import Resources, evaluate_checkpoint
from v4quant.recipe import Recipe
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.evaluation.evaluate import Measures
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model import indexer
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.rounding.solvers import solve_batch
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels import codec, dispatch
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import get_scheme

CONFIG = load_model_config(TINY)
V41 = TINY.parent / "v41-tiny"


@pytest.fixture
def windows() -> list[Tensor]:
    ids = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    return [ids[:150], ids[150:217]]  # the first is long enough for the indexer


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (evaluation, calibration):
        genuine = module.device_bytes
        monkeypatch.setattr(
            module, "device_bytes", lambda d, g=genuine: 24 * 2**30 if d == DEVICE else g(d)
        )


def figures(
    windows: list[Tensor],
    candidate: Path,
    options: ForwardOptions,
    resources: Resources,
    reference: Path = TINY,
) -> dict[str, Any]:
    corpus = Corpus([CorpusPart("a", windows)])
    with open_checkpoint(candidate) as mine, open_checkpoint(reference) as base:
        return evaluate_checkpoint(
            mine, base, corpus, options, SilentProgress(), weights=False,
            measures=Measures(draft=True), resources=resources,
        )  # fmt: skip


@pytest.mark.parametrize("activations", ["plain", "official"])
def test_evaluation_elsewhere(
    windows: list[Tensor],
    converted: Callable[[str], Path],
    activations: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexer, "uses_kernel", lambda *_: False)
    options = ForwardOptions(activations)
    here = figures(windows, converted("int4-g128"), options, Resources())
    with PretendDevice() as pretended:
        resources = Resources(device=DEVICE, scratch=tmp_path)
        there = figures(windows, converted("int4-g128"), options, resources)
    assert here.pop("device") == "cpu" and there.pop("device") == "cuda"
    assert pretended.products[0] > 500 and pretended.products[1] == 0
    assert there == here and here["kl_mean"] > 0


def test_v41_elsewhere(tmp_path: Path) -> None:
    """Tables are gathered on the host; caches that layers share live there with the streams."""
    ids = load_file(V41.parent / "v41-tiny.reference.safetensors")["input_ids"][0]
    windows, options = [ids[:130], ids[130:160]], ForwardOptions("official")
    convert(V41, tmp_path / "int4", "int4-g32")
    here = figures(windows, tmp_path / "int4", options, Resources(), V41)
    with PretendDevice() as pretended:
        resources = Resources(device=DEVICE, scratch=tmp_path)
        there = figures(windows, tmp_path / "int4", options, resources, V41)
    assert here.pop("device") == "cpu" and there.pop("device") == "cuda"
    assert pretended.products[0] > 1000 and pretended.products[1] == 0
    assert there == here and here["kl_mean"] > 0


class Picks(SilentObserver):
    """Keeps what the indexer of the first CSA layer chose."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def on_index(self, layer: str, picks: Tensor) -> None:
        self.found.setdefault(layer, []).append(picks.cpu())

    @property
    def first(self) -> Tensor:
        return torch.cat(next(iter(self.found.values())))


def picks(windows: list[Tensor], device: torch.device) -> Tensor:
    seen = Picks()
    with open_checkpoint(TINY) as checkpoint:
        model = StreamModel(CheckpointParams(checkpoint, device), ForwardOptions("official"), seen)
        stream_forward([model], CONFIG, windows)
    return seen.first


def test_the_indexers_kernel_chooses_alike(
    windows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its torch twin stands for it; sums in another order may exchange entries of equal score."""
    here = picks(windows, torch.device("cpu"))
    asked = []
    genuine = dispatch.index_top_k
    monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: False)
    monkeypatch.setattr(indexer, "uses_kernel", lambda x, config, options: x.is_cuda)
    monkeypatch.setattr(
        dispatch, "index_top_k", lambda *a, **k: asked.append(a[0].is_cuda) or genuine(*a, **k)
    )
    with PretendDevice():
        there = picks(windows, DEVICE)
    assert asked and all(asked)
    assert there.shape == here.shape and float((there == here).float().mean()) > 0.99
    valid = there >= 0
    assert bool((valid[:, :-1] | ~valid[:, 1:]).all()), "absent entries come last"
    assert bool(((there[:, 1:] > there[:, :-1]) | ~valid[:, 1:]).all())


def statistics(windows: list[Tensor], out: Path, device: torch.device) -> Stats:
    with open_checkpoint(TINY) as checkpoint:
        return calibrate_to(
            checkpoint, CONFIG, DrawnCorpus(windows[:1], windows[1:]), ForwardOptions(), 100, None,
            out, SilentProgress(), device=device,
        ).stats  # fmt: skip


def test_calibration_elsewhere(windows: list[Tensor], tmp_path: Path) -> None:
    statistics(windows, tmp_path / "here", torch.device("cpu"))
    with PretendDevice() as pretended:
        statistics(windows, tmp_path / "there", DEVICE)
    assert pretended.products[0] > 100
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_the_pretended_device_catches_mixing() -> None:
    with PretendDevice():
        there = torch.ones(3, device=DEVICE)
        assert there.device == DEVICE and (there * 2).is_cuda and not there.cpu().is_cuda
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def solved(
    windows: list[Tensor], recipe: Recipe, propagate: bool, out: Path, device: torch.device
) -> dict[str, bytes]:
    """Files of a solution."""
    with open_checkpoint(TINY) as checkpoint:
        settings = replace(solve_settings(checkpoint, recipe, propagate), sweeps=1)
        calibrate_to(
            checkpoint, CONFIG, DrawnCorpus(windows, []), ForwardOptions(), 4, settings, out,
            SilentProgress(), device=device,
        )  # fmt: skip
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled loops sum in another order than torch."""
    monkeypatch.setattr(dispatch, "uses_loops", lambda tensor: False)
    monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: False)


@pytest.mark.usefixtures("no_loops")
@pytest.mark.parametrize("propagate", [True, False])
def test_solving_elsewhere(windows: list[Tensor], propagate: bool, tmp_path: Path) -> None:
    """Moments, GPTQ, refinement, plain codes and packing, in one pass with two models or one."""
    recipe = Recipe("int3-g64" if propagate else "int4-g128", solver="gptq")
    here = solved(windows[1:], recipe, propagate, tmp_path / "here", torch.device("cpu"))
    with PretendDevice() as pretended:
        there = solved(windows[1:], recipe, propagate, tmp_path / "there", DEVICE)
    assert pretended.products[0] > 100 and pretended.products[1] == 0
    assert there == here and len(here) > CONFIG.num_hidden_layers


@pytest.mark.usefixtures("no_loops")
@pytest.mark.parametrize("name", ["q3_k", "q4_k"])
def test_block_types_are_solved_elsewhere(name: str, generator: torch.Generator) -> None:
    values = torch.randn(2, 9, 256, generator=generator)
    sources = [[codec.quantize(one, get_scheme("mxfp4"))] for one in values]
    rows = torch.randn(2, 300, 256, generator=generator)
    grams, fix = rows.mT @ rows / 300, 0.01 * rows[:, :256]
    here = solve_batch(sources, grams, fix, get_scheme(name), 1)
    with PretendDevice():
        there = solve_batch(
            sources, grams.to(DEVICE), fix.to(DEVICE), get_scheme(name), 1
        )  # fmt: skip
        assert all(q.codes.is_cuda for (q,) in there)
        found = [q.codes.cpu() for (q,) in there]
    assert all(torch.equal(a, q.codes) for a, (q,) in zip(found, here, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_figures(
    windows: list[Tensor], converted: Callable[[str], Path], products: torch.dtype
) -> None:
    options = ForwardOptions(matmul_dtype=products)
    here = figures(windows, converted("int4-g128"), options, Resources())
    there = figures(windows, converted("int4-g128"), options, Resources(device=DEVICE))
    for key in ("nll", "reference_perplexity", "kl_mean"):
        assert there[key] == pytest.approx(here[key], rel=1e-3), key
    assert figures(windows, TINY, options, Resources(device=DEVICE))["kl_mean"] == 0
