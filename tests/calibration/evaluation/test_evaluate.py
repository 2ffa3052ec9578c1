"""Evaluation: nothing for nothing, something for damage, and the layer that made it by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.shard_bytes import EditableCheckpoint
from v4quant.evaluation.evaluate import EvaluationError, LogitFiles, evaluate_checkpoint
from v4quant.evaluation.saved_logits import LogitsError
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart, CorpusRequest, load_corpus
from v4quant_calibration.evaluation.divergence import BLOCK_TOKENS, DivergenceError
from v4quant_calibration.evaluation.evaluate import Measures, evaluate
from v4quant_calibration.evaluation.noise_floor import EXACT, PRODUCTS, STREAMS
from v4quant_calibration.evaluation.scoring import token_blocks
from v4quant_calibration.model.numerics import NonFiniteActivation
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress

DATA = Path(__file__).parents[2] / "data"
TINY = DATA / "tiny-a"
FLOOR_KEYS = {"kl_mean", "kl_p99", "top1_agreement", "perplexity", "reference_perplexity"}


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(DATA / "tiny-a.reference.safetensors")


@pytest.fixture(scope="module")
def corpus(reference: dict[str, Tensor]) -> Corpus:
    """The stored ids in four windows, in two parts."""
    windows = list(reference["input_ids"][0].split(math.ceil(reference["input_ids"].numel() / 4)))
    return Corpus([CorpusPart("one", windows[:2]), CorpusPart("two", windows[2:])])


def compare(candidate: Path, reference: Path | None, corpus: Corpus, **more: Any) -> dict[str, Any]:
    with open_checkpoint(candidate) as mine:
        base = None if reference is None else open_checkpoint(reference)
        try:
            options = more.pop("options", ForwardOptions())
            return evaluate_checkpoint(mine, base, corpus, options, SilentProgress(), **more)
        finally:
            if base is not None:
                base.close()


@pytest.fixture(scope="module")
def itself(corpus: Corpus) -> dict[str, Any]:
    return compare(TINY, TINY, corpus)


def test_a_checkpoint_against_itself(itself: dict[str, Any], corpus: Corpus) -> None:
    assert itself["kl_mean"] == itself["kl_max"] == itself["kl_mean_stderr"] == 0
    assert itself["top1_agreement"] == itself["top5_agreement"] == 1
    assert itself["perplexity"] == itself["reference_perplexity"]
    assert itself["perplexity_ratio"] == 1 and itself["perplexity_ratio_stderr"] == 0
    assert itself["verdict"]["above_floor"] is False
    for row in itself["layers"]:
        assert row["stream_relative_error"] == row["local_relative_error"] == 0
        assert row["router_agreement"] == 1
        assert row["index_agreement"] == (1 if row["kind"] == "csa" else None)
        assert row["expert_output_largest"] == row["expert_output_median"] == 0
    # A window's last token is predicted but nothing is predicted from it.
    assert itself["tokens"] == corpus.tokens - len(corpus.windows)
    histogram = itself["kl_histogram"]
    assert sum(histogram["counts"]) == sum(histogram["floor_counts"]) == itself["tokens"]


def test_the_floor_is_a_small_positive_number(itself: dict[str, Any]) -> None:
    floor = itself["noise_floor"]
    assert floor.keys() >= FLOOR_KEYS
    assert 0 < floor["kl_mean"] < 0.05
    assert 0.8 < floor["top1_agreement"] <= 1


def test_the_larger_of_two_floors_counts(itself: dict[str, Any], corpus: Corpus) -> None:
    found = compare(TINY, TINY, corpus, measures=Measures(floors=2), weights=False)
    floor = found["noise_floor"]
    assert [run["description"] for run in floor["runs"]] == [STREAMS, PRODUCTS]
    values = [run["kl_mean"] for run in floor["runs"]]
    print("floors", values)
    assert 0 < min(values) < max(values) < 0.1
    assert floor["kl_mean"] == max(values)
    chosen = floor["runs"][values.index(max(values))]
    assert {k: v for k, v in floor.items() if k != "runs"} == chosen
    (only,) = itself["noise_floor"]["runs"]
    assert only == floor["runs"][0]


def test_several_candidates_are_scored_as_alone(
    converted: Callable[[str], Path], corpus: Corpus
) -> None:
    schemes = ("int4-g128", "int8-g32", "int4-g32")
    folders = [converted(scheme) for scheme in schemes]
    others = [open_checkpoint(folder) for folder in folders[1:]]
    together = compare(folders[0], TINY, corpus, others=others)
    for other in others:
        other.close()
    shared = {"noise_floor", "coverage"}
    for folder, part in zip(folders, (together, *together["others"]), strict=True):
        alone = compare(folder, TINY, corpus)
        for key in alone.keys() & part.keys() - shared:
            assert part[key] == alone[key], key
        assert together["noise_floor"] == alone["noise_floor"]
        assert together["coverage"] == alone["coverage"]
    assert not any(shared & part.keys() for part in together["others"])
    assert [p["candidate"]["scheme"] for p in together["others"]] == list(schemes[1:])


def test_several_candidates_read_the_reference_as_often_as_one(
    converted: Callable[[str], Path], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Corpus([CorpusPart("a", [w[:20] for w in corpus.windows[:2]])])
    reads: list[Path] = []
    plain_read = Checkpoint.read

    def counting(self: Checkpoint, name: str) -> Tensor:
        reads.append(self.path)
        return plain_read(self, name)

    first, second = converted("int8-g32"), converted("fp8")
    monkeypatch.setattr(Checkpoint, "read", counting)
    compare(first, TINY, few)
    once = reads.count(TINY)
    with open_checkpoint(second) as other:
        compare(first, TINY, few, others=[other])
    assert reads.count(TINY) == 2 * once
    assert reads.count(second) > 100


def test_candidates_need_a_reference(corpus: Corpus, tmp_path: Path) -> None:
    with open_checkpoint(TINY) as other:
        with pytest.raises(EvaluationError, match="--reference"):
            compare(TINY, None, corpus, others=[other])
        with pytest.raises(EvaluationError, match="--save-logits"):
            compare(TINY, TINY, corpus, others=[other], files=LogitFiles(tmp_path / "x"))


def test_perplexity_by_definition(
    itself: dict[str, Any], corpus: Corpus, reference: dict[str, Tensor]
) -> None:
    """From the stored logits of the first window, which begins like the stored sequence."""
    first = Corpus([CorpusPart("a", [corpus.windows[0]] * 8)])
    found = compare(TINY, None, first)
    ids = corpus.windows[0]
    logs = reference["logits_plain"].reshape(-1, 384)[: len(ids) - 1].double().log_softmax(-1)
    nll = -logs[torch.arange(len(ids) - 1), ids[1:]].mean()
    assert found["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(float(nll)), rel=1e-4)
    # Eight equal blocks: no spread at all.
    assert found["perplexity_stderr"] == pytest.approx(0, abs=1e-9)
    assert "kl_mean" not in found and "noise_floor" not in found and found["reference"] is None


def test_coverage_counts_the_reference_routing(itself: dict[str, Any], corpus: Corpus) -> None:
    layers = itself["coverage"]["layers"]
    assert [r["name"] for r in layers] == [f"layers.{i}" for i in range(4)]
    assert all(sum(r["tokens_per_expert"]) == 2 * corpus.tokens for r in layers)


@pytest.mark.parametrize("scheme", ["int8-g32", "fp8", "mxfp4", "nvfp4"])
def test_exact_casts_cost_nothing(
    converted: Callable[[str], Path], corpus: Corpus, itself: dict[str, Any], scheme: str
) -> None:
    found = compare(converted(scheme), TINY, corpus)
    print(scheme, found["kl_mean"], "floor", found["noise_floor"]["kl_mean"])
    assert found["verdict"]["above_floor"] is False
    assert found["kl_mean"] == 0
    assert found["perplexity"] == itself["perplexity"]
    assert all(row["local_relative_error"] == 0 for row in found["layers"])
    assert {row["weight_relative_rms"] for row in found["layers"]} <= {0.0}


def test_a_lossy_conversion_is_measurable(converted: Callable[[str], Path], corpus: Corpus) -> None:
    found = compare(converted("int4-g128"), TINY, corpus)
    assert found["kl_mean"] > 0 and found["top1_agreement"] < 1
    for row in found["layers"]:
        assert 0 < row["local_relative_error"] < 0.3
        assert 0.02 < row["weight_relative_rms"] <= row["weight_largest"] < 0.2
    assert found["findings"] == []
    assert found["candidate"]["expert_bits_per_weight"] == pytest.approx(4.125, abs=0.02)
    assert found["reference"]["expert_bits_per_weight"] == pytest.approx(4.25)
    assert [part["name"] for part in found["corpora"]] == ["one", "two"]
    assert sum(part["tokens"] for part in found["corpora"]) == found["tokens"]


def double_scale(folder: Path, expert: str) -> Path:
    """The tiny checkpoint with every scale of one expert's w2 one power of two higher."""
    edited = EditableCheckpoint.read(TINY)
    tensor = edited[f"{expert}.w2.scale"]
    tensor.data = bytes(b + 1 for b in tensor.data)
    return edited.write(folder)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_damage_stands_out_where_it_is(tmp_path: Path, corpus: Corpus, layer: int) -> None:
    damaged = double_scale(tmp_path / "damaged", f"layers.{layer}.ffn.experts.1")
    found = compare(damaged, TINY, corpus)
    local = [row["local_relative_error"] for row in found["layers"]]
    print("local", local)
    # Only the damaged layer errs on the reference's input; before it nothing differs at all.
    assert local[layer] > 0.01
    assert all(error == 0 for i, error in enumerate(local) if i != layer)
    stream = [row["stream_relative_error"] for row in found["layers"]]
    assert all(error == 0 for error in stream[:layer])
    assert all(error > 0 for error in stream[layer:])
    assert [f["where"] for f in found["findings"]] == [f"layers.{layer}.ffn.experts.1.w2"]
    assert found["layers"][layer]["weight_worst"] == "1.w2"
    # Twice the last matrix is twice the output, of this expert alone.
    for i, row in enumerate(found["layers"]):
        assert row["expert_output_largest"] == pytest.approx(float(i == layer), abs=1e-5)
        assert row["expert_output_median"] == 0
    assert found["layers"][layer]["expert_output_worst"] == 1
    assert found["verdict"]["above_floor"] is True
    assert found["verdict"]["grade"] in ("small", "clear", "damaged")


def test_a_damaged_indexer_chooses_otherwise(tmp_path: Path, corpus: Corpus) -> None:
    edited = EditableCheckpoint.read(TINY)
    weight = edited["layers.1.attn.indexer.wq_b.weight"]
    weight.data = weight.data[::-1]
    found = compare(edited.write(tmp_path / "x"), TINY, corpus, weights=False)
    agreement = [row["index_agreement"] for row in found["layers"]]
    print("index agreement", agreement)
    assert agreement[0] is agreement[2] is None
    assert 0 < agreement[1] < 0.9
    assert agreement[1] < agreement[3] < 1


def test_without_weights_the_manifest_answers(
    converted: Callable[[str], Path], corpus: Corpus
) -> None:
    few = Corpus([CorpusPart("a", [w[:40] for w in corpus.windows[:2]])])
    measured = compare(converted("int4-g128"), TINY, few)
    stated = compare(converted("int4-g128"), TINY, few, weights=False)
    assert "findings" not in stated and "weights" not in stated
    for one, other in zip(measured["layers"], stated["layers"], strict=True):
        assert one["weight_relative_rms"] == pytest.approx(other["weight_relative_rms"], rel=1e-6)
    assert {
        row["weight_relative_rms"] for row in compare(TINY, TINY, few, weights=False)["layers"]
    } == {None}


def test_saved_logits_are_the_stored_ones(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    """--save-logits on ids from a safetensors file: the oracle's logits, twice."""
    ids = reference["input_ids"][:1].repeat(2, 1)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    request = CorpusRequest(None, None, 0, 384)
    corpus = load_corpus([tmp_path / "ids.safetensors"], TINY / "tokenizer.json", request)
    expected = reference["logits_plain"].reshape(1, -1, 384)
    for base in (None, TINY):
        compare(TINY, base, corpus, files=LogitFiles(tmp_path / "logits.safetensors"))
        saved = load_file(tmp_path / "logits.safetensors")
        assert saved.keys() == {"logits", "input_ids", "v4quant"}
        assert torch.equal(saved["input_ids"], ids)
        assert saved["logits"].dtype == torch.float32
        assert saved["logits"].shape == (2, ids.shape[1], 384)
        worst = (saved["logits"] - expected).abs().max() / expected.abs().max()
        assert float(worst) < 1e-4


def test_saved_logits_are_the_candidates(
    tmp_path: Path, converted: Callable[[str], Path], corpus: Corpus
) -> None:
    one = Corpus([CorpusPart("a", [w[:60] for w in corpus.windows[:2]])])
    compare(converted("int4-g128"), TINY, one, files=LogitFiles(tmp_path / "beside.safetensors"))
    compare(converted("int4-g128"), None, one, files=LogitFiles(tmp_path / "alone.safetensors"))
    beside, alone = (load_file(tmp_path / f"{n}.safetensors") for n in ("beside", "alone"))
    assert torch.equal(beside["logits"], alone["logits"])


def test_logits_need_equal_windows(tmp_path: Path, corpus: Corpus) -> None:
    uneven = Corpus([CorpusPart("a", [corpus.windows[0], corpus.windows[1][:9]])])
    with pytest.raises(LogitsError, match="one length"):
        compare(TINY, None, uneven, files=LogitFiles(tmp_path / "logits.safetensors"))
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_no_logits_behind(tmp_path: Path, corpus: Corpus) -> None:
    one = Corpus([CorpusPart("a", [corpus.windows[0][:12]])])
    with pytest.raises(DivergenceError, match="1 block"):
        compare(TINY, None, one, files=LogitFiles(tmp_path / "logits.safetensors"))
    assert list(tmp_path.iterdir()) == []


def test_blocks_never_span_windows() -> None:
    """Long windows are cut into 512s, short texts finer; a block belongs to one window."""
    lengths = [1000, 10, 600] * 4
    long = Corpus([CorpusPart("a", [torch.arange(n) for n in lengths])])
    blocks = token_blocks(long)
    assert [len(b) for b in blocks] == lengths
    assert [len(b.unique()) for b in blocks] == [2, 1, 2] * 4
    assert len(torch.cat(blocks).unique()) == 20
    assert int(torch.bincount(torch.cat(blocks)).max()) == BLOCK_TOKENS
    (short,) = token_blocks(Corpus([CorpusPart("a", [torch.arange(200)])]))
    assert len(short.unique()) == 8
    (tiny,) = token_blocks(Corpus([CorpusPart("a", [torch.arange(16)])]))
    assert len(tiny.unique()) == 1


def test_long_windows_have_several_blocks(corpus: Corpus) -> None:
    """A single window of 600 tokens still has an error bar."""
    ids = torch.cat(corpus.windows).repeat(3)[:600]
    found = compare(TINY, None, Corpus([CorpusPart("a", [ids])]))
    assert found["tokens"] == 599 and found["perplexity_stderr"] > 0


def test_different_models_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    other = EditableCheckpoint.read(TINY)
    other.config["routed_scaling_factor"] = 2.5
    folder = other.write(tmp_path / "other")
    with pytest.raises(DivergenceError, match=r"different models: 'routed_scaling_factor' is 2\.5"):
        compare(folder, TINY, corpus)


def test_nan_in_a_weight_is_named(tmp_path: Path, corpus: Corpus) -> None:
    edited = EditableCheckpoint.read(TINY)
    tensor = edited["layers.2.attn.q_norm.weight"]
    tensor.data = b"\xc0\x7f" + tensor.data[2:]
    folder = edited.write(tmp_path / "nan")
    with pytest.raises(V4QuantError, match=r"layers\.2\.attn\.q_norm\.weight.*NaN"):
        compare(folder, TINY, corpus)


@pytest.mark.parametrize(
    ("module", "part"),
    [("ffn.shared_experts", "w2"), ("ffn.experts.2", "w2"), ("attn", "wo_b")],
)
def test_overflow_in_the_computation_is_named(
    tmp_path: Path, corpus: Corpus, module: str, part: str
) -> None:
    """Finite weights whose product is not: the attention or the expert is named."""
    edited = EditableCheckpoint.read(TINY)
    tensor = edited[f"layers.1.{module}.{part}.scale"]
    tensor.data = bytes(254 for _ in tensor.data)
    folder = edited.write(tmp_path / "huge")
    with pytest.raises(NonFiniteActivation, match=rf"huge: layers\.1\.{re.escape(module)}: "):
        compare(folder, None, corpus)


def test_not_finite_logits_are_named(tmp_path: Path, corpus: Corpus) -> None:
    edited = EditableCheckpoint.read(TINY)
    tensor = edited["head.weight"]
    tensor.data = b"\x7f\x7f" * (len(tensor.data) // 2)  # the largest BF16
    folder = edited.write(tmp_path / "head")
    with pytest.raises(
        DivergenceError, match=r"head: logits of tokens 0 to .* NaN or infinity .* head"
    ):
        compare(folder, None, corpus)


def test_official_activations_change_the_answer(corpus: Corpus, itself: dict[str, Any]) -> None:
    found = compare(TINY, TINY, corpus, options=ForwardOptions(activations="official"))
    assert found["kl_mean"] == 0 and found["activations"] == "official"
    assert found["perplexity"] != itself["perplexity"]


@pytest.mark.parametrize("activations", ["plain", "official"])
def test_bf16_products_are_said_and_compared_with_their_own(
    corpus: Corpus, itself: dict[str, Any], activations: Any
) -> None:
    options = ForwardOptions(activations, matmul_dtype=torch.bfloat16)
    found = compare(TINY, TINY, corpus, options=options, measures=Measures(floors=2))
    assert found["kl_mean"] == 0 and found["products"] == "bf16"
    assert itself["products"] == "f32" and found["perplexity"] != itself["perplexity"]
    described = [run["description"] for run in found["noise_floor"]["runs"]]
    assert described == [STREAMS, EXACT]
    assert all(run["kl_mean"] > 0 for run in found["noise_floor"]["runs"])


def test_a_sink_sees_reference_candidate_and_floor(corpus: Corpus) -> None:
    slices = []
    with open_checkpoint(TINY) as checkpoint:
        evaluate(checkpoint, checkpoint, corpus, ForwardOptions(), SilentProgress(), slices.append)
    assert all(len(piece.logits) == 3 for piece in slices)
    assert all(torch.equal(piece.logits[0], piece.logits[1]) for piece in slices)
    assert not torch.equal(slices[0].logits[0], slices[0].logits[2])
    assert sum(piece.stop - piece.start for piece in slices) == corpus.tokens
