"""V4.1 evaluated, calibrated and solved like V4, and what its shared state asks of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.conversion import convert
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.evaluation.evaluate import Measures, evaluate, evaluate_all
from v4quant_calibration.evaluation.needle import DEPTHS, make_needles
from v4quant_calibration.forward.checkpoint_params import CheckpointParams, model_config
from v4quant_calibration.forward.drafts import drafts_of
from v4quant_calibration.forward.scratch import Scratch
from v4quant_calibration.forward.stream import MemoryStore, StreamModel, stream_forward
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import TOKEN_MAP
from v4quant_calibration.solve.models import SolvedParams
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solve import solve
from v4quant_calibration.statistics.collect import calibrate
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import ConfigError, load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES

DATA = Path(__file__).parents[2] / "data"
TINY = DATA / "v41-tiny"
CONFIG = load_model_config(TINY)
STAGES = [layer.name for layer in CONFIG.layers] + ["mtp.0", "mtp.1", "mtp.2"]


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    with open_checkpoint(TINY) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return load_file(DATA / "v41-tiny.reference.safetensors")["input_ids"][0]


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    out = tmp_path_factory.mktemp("v41") / "int4"
    convert(TINY, out, "int4-g32")
    with open_checkpoint(out) as opened:
        yield opened


@pytest.fixture(scope="module")
def result(checkpoint: Checkpoint, candidate: Checkpoint, ids: Tensor) -> list[dict[str, Any]]:
    """An int4 conversion, and the reference held against itself."""
    corpus = Corpus([CorpusPart("text", [ids[:120], ids[120:201]])])

    def encode(text: str) -> Tensor:
        return torch.tensor([3 + byte % 200 for byte in text.encode()][::12])

    measures = Measures(draft=True, needles=make_needles(corpus, encode, CONFIG.bos_token_id))
    return evaluate_all(
        [candidate, checkpoint], checkpoint, corpus, ForwardOptions(), SilentProgress(),
        measures=measures,
    )  # fmt: skip


def test_a_checkpoint_against_itself_is_no_damage(result: list[dict[str, Any]]) -> None:
    itself = result[1]
    assert itself["kl_mean"] == 0 and itself["top1_agreement"] == 1
    for row, layer in zip(itself["layers"], CONFIG.layers, strict=True):
        assert (row["name"], row["kind"]) == (layer.name, layer.kind)
        assert row["local_relative_error"] == row["stream_relative_error"] == 0
        assert row["router_agreement"] == 1
        assert row["index_agreement"] == (1 if layer.makes_choice else None)
    assert itself["draft"]["change"] == 0


def test_a_conversion_is_told_layer_by_layer(result: list[dict[str, Any]]) -> None:
    damaged = result[0]
    assert damaged["kl_mean"] > 1e-3
    assert all(0 < row["local_relative_error"] < 0.5 for row in damaged["layers"])
    counts = {row["name"]: row["tokens_per_expert"] for row in damaged["coverage"]["layers"]}
    assert list(counts) == STAGES[:12]
    assert {len(row) for row in counts.values()} == {12}
    assert [row["depth"] for row in damaged["needle"]["depths"]] == [*DEPTHS, None]
    shares = damaged["draft"]["candidate"]
    assert len(shares["by_position"]) == 5 and 0 <= shares["target_agreement"] <= 1


def test_other_checkpoints_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(TINY, folder)
    shutil.copy(DATA / "tiny-a" / "config.json", folder / "config.json")
    with (
        open_checkpoint(folder) as mixed,
        pytest.raises(ConfigError, match=r"config\.json is V4's, but the tensors are V4\.1's"),
    ):
        model_config(mixed)
    shutil.copy(TINY / "config.json", folder / "config.json")
    (folder / "tokenizer.json").unlink()
    corpus = Corpus([CorpusPart("x", [torch.arange(3, 90)])])
    with (
        open_checkpoint(folder) as bare,
        pytest.raises(ConfigError, match=r"tokenizer\.json: file is missing, but Engram"),
    ):
        evaluate(bare, None, corpus, ForwardOptions(), SilentProgress())


class Killed(Exception):
    """The process dies."""


@pytest.mark.parametrize("after", [3, 5, 6, 7, 9, 11])
def test_a_killed_run_goes_on_with_the_same_bits(
    after: int, checkpoint: Checkpoint, ids: Tensor, tmp_path: Path
) -> None:
    """Between a source and its readers, of entries, choices and candidate blocks alike."""
    params = CheckpointParams(checkpoint)
    sequences = [ids[:130], ids[130:150]]

    def run(store: Scratch | MemoryStore, dies: bool) -> Tensor:
        def stop(_layer: str, done: int, _all: int) -> None:
            if dies and done == after:
                raise Killed

        taps = drafts_of(checkpoint, CONFIG).taps(CONFIG, 1)
        streams = stream_forward(
            [StreamModel(params)], CONFIG, sequences, progress=stop, store=store, taps=taps
        )
        rows = [t.read(0, 150).flatten(1) for t in taps.of(0)]
        final = streams[0]
        return torch.cat([final.read(0, 150).flatten(1), final.read_pre(0, 150), *rows], 1)

    with Scratch(tmp_path, "a" * 64) as store, pytest.raises(Killed):
        run(store, dies=True)
    with Scratch(tmp_path, "a" * 64) as store:
        assert store.finished == after - 1
        found = run(store, dies=False)
    assert torch.equal(found, run(MemoryStore(), dies=False))


def test_statistics_cover_stages_of_other_sizes(checkpoint: Checkpoint, ids: Tensor) -> None:
    """Draft stages have fewer experts than the trunk's layers, and fewer of them a token."""
    windows, reserve = list(ids[:120].split(60)), list(ids[120:].split(60))
    found = calibrate(checkpoint, CONFIG, windows, ForwardOptions(), 12, SilentProgress(), reserve)
    stats, drawn = found.stats, sum(len(w) for w in found.windows)
    assert list(stats.stages) == STAGES
    assert drawn > 120, "some expert was starved, so more text was drawn"
    for name, stage in stats.stages.items():
        facts = CONFIG.facts(name)
        assert len(stage.tokens) == facts.experts == (8 if facts.draft else 12)
        if not facts.draft:
            assert int(stage.tokens.sum()) == drawn * facts.experts_per_token
        assert bool((stage.sums["w13"][stage.tokens > 0].sum(1) > 0).all())
    drafted = {int(stats.stages[f"mtp.{k}"].tokens.sum()) for k in range(3)}
    assert len(drafted) == 1 and drafted.pop() % CONFIG.facts("mtp.0").experts_per_token == 0


@pytest.mark.parametrize("propagate", [False, True])
def test_solving(propagate: bool, checkpoint: Checkpoint, ids: Tensor, tmp_path: Path) -> None:
    """Experts of layers and drafts, and attention of layers that read others' entries."""
    dense = ["layers.1.attn.wkv", "layers.5.attn.wq_b", "layers.6.attn.wo_b", "layers.11.attn.wq_a"]
    experts = [f"layers.{n}.ffn.experts.{e}.w1" for n in (1, 7) for e in range(12)]
    experts += [f"layers.{n}.ffn.experts.{e}.w3" for n in (1, 7) for e in range(12)]
    experts += [f"mtp.1.ffn.experts.{e}.w2" for e in range(8)]
    schemes = dict.fromkeys([*dense, *experts], SCHEMES["q4_0"])
    settings = SolveSettings(SCHEMES["q4_0"], propagate, sweeps=1, schemes=schemes)
    out, windows = tmp_path / "out", list(ids[:160].split(80))
    with closing(
        solve(checkpoint, CONFIG, windows, ForwardOptions(), 8, settings, out, SilentProgress())
    ) as solution:
        attention = {".".join(module.split(".")[:3]) for module in dense}
        assert set(solution.stages) == {*STAGES, *attention}
    params, before = SolvedParams(checkpoint, out), CheckpointParams(checkpoint)
    with closing(params):
        for module in (*dense, experts[0], experts[-1]):
            error = float((params(module) - before(module)).norm() / before(module).norm())
            assert 0 < error < 0.2, module
        rows, table = torch.tensor([5, 2, 2]), "layers.1.engram.embed"
        assert torch.equal(params.gather(table, rows), before.gather(table, rows))
        assert torch.equal(params(TOKEN_MAP), before(TOKEN_MAP))
