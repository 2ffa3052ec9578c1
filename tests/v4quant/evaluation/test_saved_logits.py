"""Saved logits as a reference: the figures of the run that wrote them, and refusals by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.conversion import TINY
from v4quant.evaluation.evaluate import (
    EvaluationError,
    LogitFiles,
    Resources,
    evaluate_checkpoint,
)
from v4quant.evaluation.saved_logits import LogitsError, SavedLogits
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.evaluation.evaluate import Measures, Room, evaluate_saved
from v4quant_calibration.evaluation.scoring import TileSize
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.errors import FormatError
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

FIGURES = ("kl_mean", "kl_p99", "nll", "reference_perplexity", "top1_agreement", "top5_agreement",
           "perplexity_ratio", "delta_p_rms", "flips_weighted")  # fmt: skip


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    ids = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    return Corpus([CorpusPart("a", list(ids[:160].split(40)))])


def run(folder: Path, corpus: Corpus, base: Path | None = None, **more: Any) -> dict[str, Any]:
    options = ForwardOptions(
        activations=more.pop("activations", "plain"),
        matmul_dtype=more.pop("products", torch.float32),
    )
    with open_checkpoint(folder) as mine:
        reference = open_checkpoint(base) if base else None
        return evaluate_checkpoint(mine, reference, corpus, options, SilentProgress(), **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    kinds = {"whole": None, "top": 16, "every": 384}
    for name, top_k in kinds.items():
        run(TINY, corpus, files=LogitFiles(folder / name, top_k))
    return {name: folder / name for name in kinds}


@pytest.fixture(scope="module")
def beside(converted: Callable[[str], Path], corpus: Corpus) -> dict[str, Any]:
    """Both models run."""
    return run(converted("int4-g128"), corpus, TINY, weights=False)


def test_whole_logits_give_the_figures_of_a_run(
    saved: dict[str, Path], beside: dict[str, Any], converted: Callable[[str], Path], corpus: Corpus
) -> None:
    found = run(converted("int4-g128"), corpus, files=LogitFiles(reference=saved["whole"]))
    for key in FIGURES:
        assert found[key] == pytest.approx(beside[key], rel=1e-6), key
    assert found["reference_logits"]["kl"] == "whole vocabulary"
    assert "layers" not in found and found["reference"] is None
    assert "the candidate again" in found["noise_floor"]["description"]
    assert found["noise_floor"]["kl_mean"] > 0 and found["verdict"]["above_floor"]
    # In tiles of the vocabulary too.
    with open_checkpoint(converted("int4-g128")) as mine, SavedLogits(saved["whole"]) as logits:
        room = Room(tile=TileSize(rows=50, columns=100))
        tiled = evaluate_saved(mine, logits, corpus, ForwardOptions(), SilentProgress(), room=room)
    assert tiled["kl_mean"] == pytest.approx(found["kl_mean"], rel=1e-5)
    # With the source's weights for comparison.
    tight = run(converted("int4-g128"), corpus, TINY, files=LogitFiles(reference=saved["whole"]),
                resources=Resources(max_memory=10**9))  # fmt: skip
    assert tight["kl_mean"] == pytest.approx(found["kl_mean"], rel=1e-9)
    assert "findings" in tight


def test_top_k_bounds_kl_from_below(
    saved: dict[str, Path], beside: dict[str, Any], converted: Callable[[str], Path], corpus: Corpus
) -> None:
    candidate = converted("int4-g128")
    few = run(candidate, corpus, files=LogitFiles(reference=saved["top"]))
    every = run(candidate, corpus, files=LogitFiles(reference=saved["every"]))
    assert every["kl_mean"] == pytest.approx(beside["kl_mean"], rel=1e-4)
    assert 0 < few["kl_mean"] < every["kl_mean"]
    assert few["reference_logits"]["top_k"] == 16 and few["reference_logits"]["kl"] == "lower bound"
    for key in ("nll", "reference_perplexity", "top1_agreement", "top5_agreement", "delta_p_rms"):
        assert few[key] == pytest.approx(beside[key], rel=1e-5), key


def test_top_k_file_by_definition(saved: dict[str, Path], corpus: Corpus) -> None:
    whole, top = load_file(saved["whole"]), load_file(saved["top"])
    logprobs = torch.log_softmax(whole["logits"].double(), -1)
    best, _ = logprobs.topk(16, -1)
    torch.testing.assert_close(top["top_logprobs"].double(), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs.gather(2, top["top_ids"].long()), best, rtol=0, atol=1e-5)
    rest = 1 - best.exp().sum(-1)
    torch.testing.assert_close(top["rest"].double(), rest, rtol=0, atol=1e-6)
    following = torch.stack(corpus.windows)[:, 1:]
    expected = logprobs[:, :-1].gather(2, following.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(top["target_logprobs"][:, :-1].double(), expected, rtol=0, atol=1e-5)


def test_a_checkpoint_against_its_own_logits(saved: dict[str, Path], corpus: Corpus) -> None:
    same = run(TINY, corpus, files=LogitFiles(reference=saved["whole"]))
    assert same["kl_max"] == 0 and same["top1_agreement"] == 1
    near = run(TINY, corpus, files=LogitFiles(reference=saved["top"]))
    assert near["kl_max"] < 1e-6 and near["top1_agreement"] == 1
    assert not near["verdict"]["above_floor"]


def test_other_text_is_refused(saved: dict[str, Path], corpus: Corpus) -> None:
    files = LogitFiles(reference=saved["top"])
    ids = torch.cat(corpus.windows)
    for windows, problem in (
        (corpus.windows[:3], "holds 4 windows of 40 tokens, the text is 3 of 40"),
        (list(ids[:156].split(39)), "the text is 4 of 39"),
        ([*corpus.windows[:3], corpus.windows[3].flip(0)], "window 3 is other text"),
    ):
        with pytest.raises(LogitsError, match=problem):
            run(TINY, Corpus([CorpusPart("a", windows)]), files=files)
    with pytest.raises(LogitsError, match="--activations plain"):
        run(TINY, corpus, files=files, activations="official")
    with pytest.raises(LogitsError, match="--products f32"):
        run(TINY, corpus, files=files, products=torch.bfloat16)


def test_other_checkpoints_are_refused(
    saved: dict[str, Path], converted: Callable[[str], Path], corpus: Corpus, tmp_path: Path
) -> None:
    other = converted("int8-g32")
    run(other, corpus, files=LogitFiles(tmp_path / "other"))
    files = LogitFiles(reference=tmp_path / "other")
    with pytest.raises(LogitsError, match="not the --reference"):
        run(converted("int4-g128"), corpus, TINY, files=files)
    with pytest.raises(LogitsError, match="not the source this was converted from"):
        run(converted("int4-g128"), corpus, files=files)
    tensors = load_file(saved["whole"])
    tensors["logits"] = tensors["logits"][:, :, :200].contiguous()
    save_file(tensors, tmp_path / "narrow")
    with pytest.raises(LogitsError, match="logits of 200 tokens, the model has 384"):
        run(TINY, corpus, files=LogitFiles(reference=tmp_path / "narrow"))


@pytest.mark.parametrize(
    ("tensor", "value", "problem"),
    [
        ("logits", torch.nan, "NaN or infinity"),
        ("top_logprobs", torch.inf, "NaN, infinity"),
        ("rest", torch.nan, "NaN, infinity"),
        ("top_ids", -1, "negative ids"),
        ("top_ids", 384, "outside the model's vocabulary"),
    ],
)
def test_damaged_values_are_refused(
    saved: dict[str, Path], corpus: Corpus, tmp_path: Path, tensor: str, value: float, problem: str
) -> None:
    tensors = load_file(saved["whole" if tensor == "logits" else "top"])
    tensors[tensor].view(-1)[7] = value
    save_file(tensors, tmp_path / "damaged")
    with pytest.raises(LogitsError, match=problem):
        run(TINY, corpus, files=LogitFiles(reference=tmp_path / "damaged"))


def test_files_that_are_no_saved_logits(saved: dict[str, Path], tmp_path: Path) -> None:
    whole = load_file(saved["whole"])
    bad: dict[str, dict[str, torch.Tensor]] = {
        "no ids": {"logits": whole["logits"]},
        "half": whole | {"logits": whole["logits"].half()},
        "flat": whole | {"logits": whole["logits"].flatten(0, 1)},
        "scalar": whole | {"logits": torch.zeros(())},
        "facts": whole | {"v4quant": torch.frombuffer(bytearray(b"[1"), dtype=torch.uint8)},
        "few": {k: v[..., :3].contiguous() if "top_" in k else v
                for k, v in load_file(saved["top"]).items()},
    }  # fmt: skip
    for name, tensors in bad.items():
        save_file(tensors, tmp_path / name)
        with pytest.raises(LogitsError, match=name):
            SavedLogits(tmp_path / name)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(FormatError):
        SavedLogits(tmp_path / "junk")
    stranger = {k: v for k, v in whole.items() if k != "v4quant"}
    save_file(stranger, tmp_path / "stranger")
    with SavedLogits(tmp_path / "stranger") as opened:
        assert opened.facts is None


def test_requests_that_make_no_sense(
    saved: dict[str, Path], corpus: Corpus, tmp_path: Path
) -> None:
    files = LogitFiles(reference=saved["top"])
    with pytest.raises(EvaluationError, match="leave --draft"):
        run(TINY, corpus, files=files, measures=Measures(draft=True))
    for top_k in (4, 385):
        with pytest.raises(LogitsError, match="must be 5 to 384"):
            run(TINY, corpus, files=LogitFiles(tmp_path / "x", top_k))
    assert list(tmp_path.iterdir()) == []


def test_perplexity_of_saved_logits_is_the_text_s(saved: dict[str, Path], corpus: Corpus) -> None:
    found = run(TINY, corpus, files=LogitFiles(reference=saved["top"]))
    logits = load_file(saved["whole"])["logits"].double().numpy()
    ids = torch.stack(corpus.windows).numpy()
    total = 0.0
    for row, text in zip(logits, ids, strict=True):
        for s in range(len(text) - 1):
            total += (
                np.log(np.exp(row[s] - row[s].max()).sum()) + row[s].max() - row[s, text[s + 1]]
            )
    assert found["reference_perplexity"] == pytest.approx(math.exp(total / (4 * 39)), rel=1e-5)
    json.dumps(found)
