"""DSpark's stages against the release's own inference code, and what is made of their guesses.

`dspark.reference.safetensors` was computed once by the inference code published with the 0731
release, as it stands in public copies, token by token with its ring cache, in float32 on
dequantized weights of the synthetic checkpoint made here; its GPU kernels were replaced by plain
torch (in the "official" part with their rounding). None of that code is here. The trunk ran there
as well, so the whole way from token ids to draft logits is compared. Blocks were drafted from
`anchors`, each conditioned on its own greedy guesses (`output_ids`, behind the text's token).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.calibration.oracle_loader import OracleParams
from tests.support.shard_bytes import EditableCheckpoint
from tests.support.synthetic import Request, write_checkpoint
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.evaluation.draft_acceptance import accepted_run
from v4quant_calibration.evaluation.evaluate import Measures, Room, evaluate, evaluate_all
from v4quant_calibration.forward.drafts import Drafts, drafts_of, stream_dspark
from v4quant_calibration.forward.logits import markov_rows, stream_logits
from v4quant_calibration.forward.scratch import Scratch
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model.dspark import DraftBlocks, DraftError, confidence, draft_blocks
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solve import solve
from v4quant_calibration.statistics.collect import calibrate
from v4quant_formats.model_config import ModelConfig, load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import get_scheme

REFERENCE = Path(__file__).parents[2] / "data" / "dspark.reference.safetensors"
SIZES = {
    "num_hidden_layers": 3,
    "n_routed_experts": 4,
    "sliding_window": 16,
    "index_topk": 64,
    "q_lora_rank": 128,
}
STAGES = ("mtp.0", "mtp.1", "mtp.2")
DRAFT = Measures(draft=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dspark") / "checkpoint"
    write_checkpoint(out, Request("flash-dspark", overrides=tuple(SIZES.items())))
    return out


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return load_model_config(folder)


@pytest.fixture(scope="module")
def params(folder: Path) -> OracleParams:
    return OracleParams(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Tensor]:
    with safe_open(REFERENCE, "pt") as file, open_checkpoint(folder) as checkpoint:
        made_for = (file.metadata() or {})["checkpoint"]
        assert made_for == checkpoint.digest(), "synthetic checkpoints changed: compute it again"
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def draft(
    params: Params,
    config: ModelConfig,
    sequences: list[Tensor],
    blocks: DraftBlocks,
    options: ForwardOptions,
) -> tuple[Tensor, Tensor]:
    """Logits `[rows, vocab]` and confidence `[rows]` of all blocks."""
    model = StreamModel(params, options)
    taps = Drafts("dspark", STAGES).taps(config, 1)
    stream_forward([model], config, sequences, taps=taps)
    (rows,) = stream_dspark([model], config, STAGES, blocks, [taps.of(0)])
    tiles = stream_logits(
        [model], config, [rows], stage=STAGES[-1], previous=blocks.previous, rows=10_000
    )
    markov = markov_rows(params, config, STAGES[-1], blocks.previous)
    return next(iter(tiles)).logits[0], confidence(params, config, "mtp.2", rows, markov, 7)


def reference_blocks(
    reference: dict[str, Tensor], config: ModelConfig, mode: str
) -> tuple[Tensor, DraftBlocks]:
    assert config.dspark is not None
    ids, anchors = reference["input_ids"], reference["anchors"]
    previous = reference[f"{mode}.output_ids"][:, :-1].flatten()
    given = torch.full_like(previous, config.dspark.noise_token_id)
    given[:: config.dspark.block_size] = ids[anchors + 1]
    return ids, DraftBlocks(config.dspark.block_size, (anchors,), given, previous)


@pytest.mark.parametrize("chunks", [{}, {"query_chunk": 16, "row_chunk": 128}])
def test_plain_agrees_with_the_releases_code(
    params: OracleParams, config: ModelConfig, reference: dict[str, Tensor], chunks: dict[str, int]
) -> None:
    ids, blocks = reference_blocks(reference, config, "plain")
    logits, sure = draft(params, config, [ids], blocks, ForwardOptions(**chunks))  # type: ignore[arg-type]
    expected = reference["plain.logits"].flatten(0, 1)
    error = (logits - expected).abs().max().item()
    print(error)
    assert error < 1e-5 * expected.abs().max().item()
    assert torch.equal(logits.argmax(-1), reference["plain.output_ids"][:, 1:].flatten())
    assert (sure - reference["plain.confidence"].flatten()).abs().max().item() < 1e-6


def test_official_agrees_but_for_ties(
    params: OracleParams, config: ModelConfig, reference: dict[str, Tensor]
) -> None:
    """A value between two FP8 codes may fall on either side, and may then choose another expert."""
    ids, blocks = reference_blocks(reference, config, "official")
    logits, sure = draft(params, config, [ids], blocks, ForwardOptions("official"))
    error = (logits - reference["official.logits"].flatten(0, 1)).abs()
    plain = (reference["plain.logits"] - reference["official.logits"]).abs()
    print(error.median(), error.max(), plain.median())
    assert error.median() < 1e-6
    assert plain.median() > 1e-3
    assert (error.amax(-1) < 1e-3).double().mean() > 0.8
    assert (sure - reference["official.confidence"].flatten()).abs().max().item() < 5e-3


@pytest.mark.parametrize("what", ["position", "noise", "context", "previous"])
def test_the_comparison_would_notice(
    params: OracleParams, config: ModelConfig, reference: dict[str, Tensor], what: str
) -> None:
    """What engines got wrong in public moves logits by thousands of times the tolerance."""
    ids, blocks = reference_blocks(reference, config, "plain")
    noise = torch.where(blocks.token_ids == 500, 499, blocks.token_ids)
    wrong = {
        "position": (config, replace(blocks, anchors=(blocks.anchors[0] - 1,))),
        "noise": (config, replace(blocks, token_ids=noise)),
        "context": (replace(config, sliding_window=15), blocks),
        "previous": (config, replace(blocks, previous=blocks.previous.roll(1))),
    }[what]
    logits, _ = draft(params, wrong[0], [ids], wrong[1], ForwardOptions())
    moved = (logits - reference["plain.logits"].flatten(0, 1)).abs().max().item()
    print(moved)
    assert moved > 1e-2


def test_blocks_are_no_part_of_each_others_context(
    params: OracleParams, config: ModelConfig
) -> None:
    """Many sequences at once, some too short for a block, and every block on its own."""
    seed = torch.seed()
    print("seed", seed)
    sequences = [torch.randint(3, 500, (n,)) for n in (40, 3, 8, 26, 7)]
    blocks = draft_blocks(sequences, config)
    assert [len(a) for a in blocks.anchors] == [7, 0, 1, 4, 0]
    together, _ = draft(params, config, sequences, blocks, ForwardOptions(query_chunk=11))
    row = 0
    for ids, anchors in zip(sequences, blocks.anchors, strict=True):
        for anchor in anchors:
            rows = slice(row, row + blocks.size)
            place = int(anchor) + 1
            assert blocks.token_ids[rows].tolist() == [int(ids[place])] + [500] * 4
            assert torch.equal(blocks.previous[rows], ids[place : place + 5])
            given = DraftBlocks(5, (anchor[None],), blocks.token_ids[rows], blocks.previous[rows])
            # Nothing behind the anchor is looked at.
            alone, _ = draft(params, config, [ids[:place]], given, ForwardOptions())
            torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-5)
            row += blocks.size
    assert row == len(together)


@pytest.fixture(scope="module")
def corpus(reference: dict[str, Tensor]) -> Corpus:
    windows = list(reference["input_ids"].split(30))
    return Corpus([CorpusPart("a", [*windows, windows[0][:5]])])


def draft_of(candidate: Path, base: Path | None, corpus: Corpus) -> dict[str, object]:
    options, silent = ForwardOptions(), SilentProgress()
    with open_checkpoint(candidate) as mine:
        if base is None:
            found = evaluate(mine, None, corpus, options, silent, measures=DRAFT)
        else:
            with open_checkpoint(base) as original:
                (found,) = evaluate_all([mine], original, corpus, options, silent, measures=DRAFT)
    result: dict[str, object] = json.loads(json.dumps(found["draft"]))
    return result


def test_figures_by_definition(
    folder: Path, params: OracleParams, config: ModelConfig, corpus: Corpus
) -> None:
    """Token by token, from whole logits of trunk and draft."""
    blocks = draft_blocks(corpus.windows, config)
    logits, sure = draft(params, config, corpus.windows, blocks, ForwardOptions())
    model = StreamModel(params)
    streams = stream_forward([model], config, corpus.windows)
    (tile,) = stream_logits([model], config, streams, rows=1000)
    trunk = tile.logits[0].split([len(w) for w in corpus.windows])
    hits, text, row = [], [], 0
    for ids, main, anchors in zip(corpus.windows, trunk, blocks.anchors, strict=True):
        for anchor in anchors.tolist():
            for k in range(5):
                guess = int(logits[row].argmax())
                hits.append(guess == int(main[anchor + 1 + k].argmax()))
                text.append(guess == int(ids[anchor + 2 + k]))
                row += 1
    runs = [next((k for k in range(5) if not hits[b + k]), 5) for b in range(0, len(hits), 5)]
    found = draft_of(folder, None, corpus)
    mine = found["candidate"]
    assert isinstance(mine, dict)
    assert found["tokens"] == len(hits) == 5 * 10 and found["block_size"] == 5
    assert mine["target_agreement"] == pytest.approx(sum(hits) / len(hits))
    assert mine["text_agreement"] == pytest.approx(sum(text) / len(text))
    assert mine["accepted_length"] == pytest.approx(sum(runs) / len(runs))
    assert mine["by_position"] == pytest.approx([sum(hits[k::5]) / len(runs) for k in range(5)])
    expected = sure.sigmoid().view(-1, 5).mean(0).tolist()
    assert mine["confidence_by_position"] == pytest.approx(expected, abs=1e-6)


def test_a_run_ends_at_the_first_miss() -> None:
    hits = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.float64)
    assert accepted_run(hits).tolist() == [2, 0, 5]


def test_a_changed_draft_shows_beside_the_same_trunk(
    folder: Path, tmp_path: Path, config: ModelConfig, corpus: Corpus
) -> None:
    """A Markov table that makes every guess token 7 hits where the text, or the trunk, has a 7."""
    edited = EditableCheckpoint.read(folder)
    for module, row in (("markov_w1", slice(None)), ("markov_w2", 7)):
        tensor = edited[f"mtp.2.markov_head.{module}.weight"]
        values = torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16).view(tensor.shape)
        values[row] = 8.0
        tensor.data = values.view(torch.uint8).numpy().tobytes()
    stubborn = edited.write(tmp_path / "stubborn")
    found = draft_of(stubborn, folder, corpus)
    print(found)
    before, after = found["reference"], found["candidate"]
    assert isinstance(before, dict) and isinstance(after, dict)
    assert found["change"] == pytest.approx(after["target_agreement"] - before["target_agreement"])
    assert found["accepted_length_change"] == pytest.approx(
        after["accepted_length"] - before["accepted_length"]
    )
    blocks = draft_blocks(corpus.windows, config).anchors
    guessed = [
        w[(anchors[:, None] + 2 + torch.arange(5)).flatten()]
        for w, anchors in zip(corpus.windows, blocks, strict=True)
    ]
    share = (torch.cat(guessed) == 7).double().mean().item()
    assert after["text_agreement"] == pytest.approx(share)


class Stopping(SilentProgress):
    """Fails when the trunk is done."""

    def start(self, label: str, total: int, unit: str) -> None:
        if label == "Scoring":
            raise KeyboardInterrupt


def test_a_stopped_run_keeps_what_the_trunk_left(
    folder: Path, tmp_path: Path, corpus: Corpus
) -> None:
    whole = draft_of(folder, None, corpus)
    options = ForwardOptions()
    with open_checkpoint(folder) as mine:
        with pytest.raises(KeyboardInterrupt), Scratch(tmp_path, "a" * 64) as store:
            evaluate(mine, None, corpus, options, Stopping(), measures=DRAFT, room=Room(store))
        with Scratch(tmp_path, "a" * 64) as store:
            assert store.finished == SIZES["num_hidden_layers"]
            silent = SilentProgress()
            again = evaluate(mine, None, corpus, options, silent, measures=DRAFT, room=Room(store))
    assert json.loads(json.dumps(again["draft"])) == whole


def test_without_drafts_there_is_a_note(folder: Path, tmp_path: Path, corpus: Corpus) -> None:
    edited = EditableCheckpoint.read(folder)
    for shard in edited.shards.values():
        for name in [n for n in shard if n.startswith("mtp.")]:
            del shard[name]
    bare = edited.write(tmp_path / "bare")
    path = bare / "config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if "dspark" not in k}
    assert f"{bare} holds no draft" in str(draft_of(bare, folder, corpus)["note"])
    path.write_text(json.dumps(kept))
    assert f"{bare} holds no draft" in str(draft_of(bare, folder, corpus)["note"])


def test_short_text_is_refused(folder: Path, tmp_path: Path, corpus: Corpus) -> None:
    short = Corpus([CorpusPart("a", [w[:7] for w in corpus.windows])])
    with pytest.raises(DraftError, match="no window has 8 tokens"):
        draft_of(folder, None, short)
    settings = SolveSettings(get_scheme("int4-g32"))
    with open_checkpoint(folder) as checkpoint, pytest.raises(DraftError, match="8 tokens"):
        config = load_model_config(folder)
        options, silent = ForwardOptions(), SilentProgress()
        solve(checkpoint, config, short.windows, options, 1, settings, tmp_path / "s", silent)


class Rows(SilentObserver):
    """Second moments of every expert's inputs, by the rows themselves."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}

    def on_expert_input(self, layer: str, expert: int, x: Tensor) -> None:
        key = layer, expert
        self.sums[key] = self.sums.get(key, 0) + x.double().square().sum(0)
        self.counts[key] = self.counts.get(key, 0) + len(x)


def test_calibration_covers_every_stage(
    folder: Path, params: OracleParams, config: ModelConfig, corpus: Corpus
) -> None:
    watcher = Rows()
    model = StreamModel(params, ForwardOptions(), watcher)
    taps = Drafts("dspark", STAGES).taps(config, 1)
    stream_forward([model], config, corpus.windows, taps=taps)
    blocks = draft_blocks(corpus.windows, config)
    stream_dspark([model], config, STAGES, blocks, [taps.of(0)])
    with open_checkpoint(folder) as checkpoint:
        assert drafts_of(checkpoint, config) == Drafts("dspark", STAGES)
        found = calibrate(
            checkpoint, config, corpus.windows, ForwardOptions(), 2, SilentProgress()
        ).stats
    for stage in STAGES:
        stats = found.stages[stage]
        assert int(stats.tokens.sum()) == len(blocks.token_ids) * config.num_experts_per_tok
        for expert in range(config.n_routed_experts):
            if not (count := watcher.counts.get((stage, expert), 0)):
                continue
            assert int(stats.tokens[expert]) == count
            torch.testing.assert_close(stats.sums["w13"][expert], watcher.sums[stage, expert])


def test_stages_are_solved(
    folder: Path, tmp_path: Path, config: ModelConfig, corpus: Corpus
) -> None:
    scheme = get_scheme("int4-g32")
    settings = SolveSettings(scheme, sweeps=1)
    with open_checkpoint(folder) as checkpoint:
        solution = solve(
            checkpoint, config, corpus.windows, ForwardOptions(), 1, settings,
            tmp_path / "solved", SilentProgress(),
        )  # fmt: skip
        shape = (config.moe_intermediate_size, config.hidden_size)
        for stage in STAGES:
            assert solution.solved(f"{stage}.ffn.experts.1.w1", scheme, shape) is not None
        solution.close()


def test_starved_experts_of_stages_draw_more_text(
    folder: Path, config: ModelConfig, corpus: Corpus
) -> None:
    windows = corpus.windows
    with open_checkpoint(folder) as checkpoint:
        found = calibrate(
            checkpoint, config, windows[:1], ForwardOptions(), 10**6, SilentProgress(), windows[1:]
        )
    assert len(found.windows) == len(windows)
    assert set(STAGES) <= set(found.stats.stages)
