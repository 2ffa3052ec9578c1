"""Attention, shared experts and head solved on the rows they multiply."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.forward.logits import head_inputs
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.rounding.second_moments import CrossSums, correction, damped, gram_sum
from v4quant_calibration.rounding.solvers import optimal
from v4quant_calibration.solve.dense_solver import source_matrix
from v4quant_calibration.solve.models import SolvedParams
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solution import Solution, load_solution, stage_file
from v4quant_calibration.solve.solve import solve
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import load_model_config
from v4quant_kernels.codec import dequantize
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES

TINY = Path(__file__).parents[2] / "data" / "tiny-a"
CONFIG = load_model_config(TINY)
LAYER = "layers.1"  # with compressor and indexer
ATTENTION = [f"{LAYER}.attn.{m}" for m in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")]
SHARED = [f"{LAYER}.ffn.shared_experts.{w}" for w in ("w1", "w2", "w3")]
COMPRESSOR = [f"{LAYER}.attn.compressor.{m}" for m in ("wkv", "wgate")]
SCHEME, FINER = SCHEMES["q4_0"], SCHEMES["q5_0"]
SCHEMES_OF = dict.fromkeys([*ATTENTION, *SHARED, "head"], SCHEME) | dict.fromkeys(COMPRESSOR, FINER)


def run(checkpoint: Checkpoint, windows: list[Tensor], folder: Path, propagate: bool) -> Solution:
    settings = SolveSettings(SCHEMES["mxfp4"], propagate, schemes=SCHEMES_OF)
    options, progress = ForwardOptions(), SilentProgress()
    return solve(checkpoint, CONFIG, windows, options, 1, settings, folder, progress)


@pytest.fixture(scope="module")
def solved(
    checkpoint: Checkpoint, windows: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "out"
    run(checkpoint, windows, folder, propagate=False).close()
    return folder


class Watch(SilentObserver):
    """Rows of the layer's attention matrices, and of its experts."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def on_linear(self, module: str, x: Tensor) -> None:
        if module.startswith(f"{LAYER}."):
            self.rows.setdefault(module, []).append(x)

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        if layer == LAYER:
            self.rows[f"{layer}.ffn.shared_experts.w1"] = [x]


def test_errors_of_outputs_fall(
    checkpoint: Checkpoint, windows: list[Tensor], solved: Path
) -> None:
    """On the rows they multiply, solved matrices are wrong by less than the encoder's."""
    watch = Watch()
    params = CheckpointParams(checkpoint)
    streams = stream_forward([StreamModel(params, observer=watch)], CONFIG, windows)[0]
    rows = {module: torch.cat(found, -2) for module, found in watch.rows.items()}
    rows["head"] = head_inputs(params, streams, 0, streams.shape.tokens, CONFIG)
    shared = {
        f"{LAYER}.attn.wkv": [f"{LAYER}.attn.wkv", f"{LAYER}.attn.wq_a", *COMPRESSOR],
        f"{LAYER}.attn.wq_b": [f"{LAYER}.attn.wq_b", f"{LAYER}.attn.indexer.wq_b"],
        SHARED[0]: [SHARED[0], SHARED[2]],
    }
    assert rows.keys() >= {f"{LAYER}.attn.{m}" for m in ("wkv", "wq_b", "wo_a", "wo_b")}
    with closing(load_solution(solved, checkpoint.digest())) as solution:
        for key, x in rows.items():
            for module in shared.get(key, [key]):
                source, scheme = source_matrix(checkpoint, module), SCHEMES_OF[module]
                q = solution.solved(module, scheme, source.shape)
                assert q is not None and q.shape == source.shape
                moments = x.reshape(-1, x.shape[-1]).square().mean(0)
                plain = optimal(source, scheme, moments).tensor
                errors = [_lost(source, other, x) for other in (q, plain)]
                assert errors[0] < 0.9 * errors[1], module


def _lost(source: object, other: object, x: Tensor) -> float:
    """Squared error of the outputs; x may be in groups, as wo_a's rows then are."""
    error = dequantize(other) - dequantize(source)  # type: ignore[arg-type]
    groups = x if x.ndim == 3 else x.unsqueeze(0)
    parts = error.chunk(len(groups))
    return sum(float((g @ e.mT).square().sum()) for g, e in zip(groups, parts, strict=True))


def test_only_what_is_named(checkpoint: Checkpoint, solved: Path) -> None:
    params, original = SolvedParams(checkpoint, solved), CheckpointParams(checkpoint)
    for module in (*SCHEMES_OF, "embed", "layers.2.attn.wq_a", f"{LAYER}.ffn.experts.0.w1"):
        assert torch.equal(params(module), original(module)) == (module not in SCHEMES_OF), module
    params.close()
    assert not stage_file(solved, "layers.2.attn").exists()


def test_resumes(
    checkpoint: Checkpoint, windows: list[Tensor], solved: Path, tmp_path: Path
) -> None:
    """With propagation; the head alone missing, it alone is solved again, to the same bytes."""
    folder = tmp_path / "out"
    run(checkpoint, windows, folder, propagate=True).close()
    kept = {file: file.read_bytes() for file in folder.iterdir()}
    assert kept[stage_file(folder, "head")] != stage_file(solved, "head").read_bytes()
    stage_file(folder, "head").unlink()
    stage_file(folder, f"{LAYER}.attn").unlink()
    run(checkpoint, windows, folder, propagate=True).close()
    assert {file: file.read_bytes() for file in folder.iterdir()} == kept


def test_sums_in_pieces(generator: torch.Generator) -> None:
    """Corrections from pieces are those from whole rows, and of the textbook's formula."""
    x = torch.randn(300, 24, generator=generator)
    lost = 0.3 * x @ torch.randn(24, 24, generator=generator)
    weights = torch.rand(300, generator=generator)
    gram = damped(gram_sum(x, x, weights) / 300)
    pieces = CrossSums(24, x.device)
    for part in torch.arange(300).split(70):
        pieces.add(lost[part], x[part], weights[part])
    whole = CrossSums(24, x.device)
    whole.add(lost, x, weights)
    torch.testing.assert_close(pieces.correction(gram), whole.correction(gram))
    wide = x.double() * weights.double().unsqueeze(1)
    expected = (lost.double().mT @ wide / 300) @ torch.linalg.inv(gram)
    found = whole.correction(gram).double()
    share = float((found * expected).sum() / expected.square().sum())
    assert 0.9 < share <= 1.0
    torch.testing.assert_close(found, share * expected, rtol=1e-3, atol=1e-4)
    assert float(correction(0 * lost, x, gram).abs().max()) == 0
