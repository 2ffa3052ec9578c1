"""llama.cpp's base files: the bytes by its definition, the figures by its sums, damage by name.

The encoder and the sums here are written from llama.cpp's perplexity tool, in float32, row by row.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.support.conversion import TINY
from v4quant.cli import cli
from v4quant.evaluation.evaluate import LogitFiles, evaluate_checkpoint
from v4quant.evaluation.kld_file import KldError, KldFile
from v4quant.evaluation.kld_writer import encode_rows
from v4quant.evaluation.saved_logits import LogitsError
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.evaluation.token_scores import Softmax
from v4quant_calibration.forward.logits import LogitTile
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

LENGTH = 40
FLOAT = np.float32


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    ids = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    return Corpus([CorpusPart("a", list(ids[:160].split(LENGTH)))])


def evaluated(folder: Path, corpus: Corpus, **files: Any) -> dict[str, Any]:
    with open_checkpoint(folder) as mine:
        return evaluate_checkpoint(
            mine, None, corpus, ForwardOptions(), SilentProgress(), LogitFiles(**files)
        )


def llama_row(logits: Any) -> bytes:
    """What llama.cpp's log_softmax writes of one row."""
    peak, low = logits.max(), logits.min()
    low = max(low, FLOAT(peak - FLOAT(16)))
    total = sum(float(x) for x in np.exp(logits - peak))
    log_sum = FLOAT(np.log(total))
    scale = FLOAT((peak - low) / FLOAT(65535))
    row = struct.pack("<2f", scale, FLOAT(FLOAT(low - peak) - log_sum))
    inverse = FLOAT(1) / scale if scale else FLOAT(0)
    codes = [int(np.rint(FLOAT(inverse * FLOAT(x - low)))) if x > low else 0 for x in logits]
    return row + struct.pack(f"<{len(codes) + len(codes) % 2}H", *codes, *([0] * (len(codes) % 2)))


def llama_file(path: Path, text: Any, logits: Any) -> Path:
    """text: ids [chunks, n_ctx]; logits [chunks, n_ctx, vocab]."""
    chunks, n_ctx = text.shape
    data = b"_logits_" + struct.pack("<3i", n_ctx, logits.shape[2], chunks)
    data += text.astype("<i4").tobytes()
    for chunk in logits:
        data += b"".join(llama_row(row) for row in chunk[n_ctx // 2 : n_ctx - 1])
    path.write_bytes(data)
    return path


def llama_kl(row: bytes, logits: Any, token: int) -> tuple[float, float]:
    """KL and the base's loss, as `--kl-divergence` sums them up."""
    scale, low = struct.unpack("<2f", row[:8])
    base = scale * np.frombuffer(row[8:], "<u2")[: len(logits)].astype(np.float64) + low
    mine = torch.log_softmax(torch.from_numpy(logits).double(), 0).numpy()
    counted = base > -16
    return float((np.exp(base) * (base - mine))[counted].sum()), -float(base[token])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("logits") / "whole.safetensors"
    evaluated(TINY, corpus, save=path)
    return {name: value.numpy() for name, value in load_file(path).items()}


def test_rows_have_the_bytes_that_llama_cpp_writes(generator: torch.Generator) -> None:
    for spread, vocab in ((1.0, 33), (9.0, 257), (40.0, 64), (0.0, 10), (1e-6, 12)):
        logits = (torch.randn(5, vocab, generator=generator) * spread + 3).numpy()
        for row, mine in zip(logits, encode_rows(logits), strict=True):
            theirs = llama_row(row)
            found = struct.unpack("<2f", mine[:8].tobytes())
            assert found == pytest.approx(struct.unpack("<2f", theirs[:8]), rel=1e-6, abs=1e-12)
            assert mine[8:].tobytes() == theirs[8:]


def test_a_file_that_is_written_is_llama_cpps(
    corpus: Corpus, whole: dict[str, Any], tmp_path: Path
) -> None:
    evaluated(TINY, corpus, save=tmp_path / "base.kld")
    data = (tmp_path / "base.kld").read_bytes()
    theirs = llama_file(tmp_path / "theirs", whole["input_ids"], whole["logits"]).read_bytes()
    assert len(data) == len(theirs)
    start = 20 + 4 * whole["input_ids"].size
    assert data[:start] == theirs[:start]
    mine, other = (np.frombuffer(d[start:], "<u2").astype(int) for d in (data, theirs))
    # Least log-probabilities may round otherwise in their last place.
    assert np.abs(mine - other).max() <= 1 and (mine != other).mean() < 0.01


def test_figures_are_those_of_llama_cpp(
    corpus: Corpus, whole: dict[str, Any], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    candidate = converted("int4-g128")
    file = llama_file(tmp_path / "base", whole["input_ids"], whole["logits"])
    found = evaluated(candidate, corpus, reference=file)
    evaluated(candidate, corpus, save=tmp_path / "mine")
    mine = load_file(tmp_path / "mine")["logits"].numpy()
    scored = [
        llama_kl(llama_row(whole["logits"][c, i]), mine[c, i], whole["input_ids"][c, i + 1])
        for c in range(4)
        for i in range(LENGTH // 2, LENGTH - 1)
    ]
    assert found["tokens"] == len(scored) == 4 * 19
    assert found["kl_mean"] == pytest.approx(np.mean([kl for kl, _ in scored]), rel=0.01)
    loss = float(np.mean([nll for _, nll in scored]))
    assert found["reference_perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
    assert found["reference_logits"]["kl"] == "lower bound"
    assert found["verdict"]["above_floor"]
    same = evaluated(TINY, corpus, reference=file)
    assert same["kl_mean"] < 1e-7 and same["top1_agreement"] == 1


def test_tails_without_codes_are_one_outcome(tmp_path: Path, generator: torch.Generator) -> None:
    """Logits over 40 nats, in stretches of the vocabulary: KL over coded tokens and "any other"."""
    vocab, text = 500, torch.randint(500, (2, 12), generator=generator)
    reference = torch.randn(2, 12, vocab, generator=generator) * 6
    other = reference + torch.randn(2, 12, vocab, generator=generator) * 0.3
    file = llama_file(tmp_path / "base", text.numpy(), reference.numpy())
    with KldFile(file) as opened:
        targets = text.roll(-1, 1).flatten()
        model = Softmax(targets)
        rows = opened.begin(0, model)
        for first in range(0, vocab, 130):
            piece = other.flatten(0, 1)[:, first : first + 130]
            model.add(piece, first)
            rows.add(piece, first)
        kl = rows.columns()["kl"].view(2, 12)
    p, q = (torch.log_softmax(x.double(), -1) for x in (reference, other))
    coded = reference > reference.amax(-1, keepdim=True) - 16
    exact = torch.where(coded, p.exp() * (p - q), 0).sum(-1)
    rest_p, rest_q = (torch.where(coded, 0, x.exp()).sum(-1) for x in (p, q))
    exact += torch.where(rest_p > 0, rest_p * (rest_p.log() - rest_q.log()), 0)
    torch.testing.assert_close(kl[:, 6:11], exact[:, 6:11], rtol=2e-3, atol=2.5e-4)


def test_a_file_in_tiles_is_the_same(
    tmp_path: Path, corpus: Corpus, generator: torch.Generator
) -> None:
    from v4quant.evaluation.kld_writer import KldWriter

    logits = torch.randn(160, 301, generator=generator)
    for name, columns in (("a.kld", 301), ("b.kld", 64)):
        writer = KldWriter(tmp_path / name, corpus, 301)
        for start in range(0, 160, 50):
            for first in range(0, 301, columns):
                last, stop = min(first + columns, 301), min(start + 50, 160)
                piece = logits[start:stop, first:last]
                writer(LogitTile(start, stop, first, last, [piece]))
        writer.close()
    assert (tmp_path / "a.kld").read_bytes() == (tmp_path / "b.kld").read_bytes()


def test_the_text_is_the_files(tmp_path: Path, whole: dict[str, Any]) -> None:
    """BOS takes the place of each chunk's first token where the text begins with it."""
    file = llama_file(tmp_path / "base", whole["input_ids"], whole["logits"])
    first = int(whole["input_ids"][0, 0])
    with KldFile(file) as opened:
        windows = torch.stack(opened.corpus(None, first).windows)
        assert windows[:, 0].tolist() == [first] * 4
        assert np.array_equal(windows[:, 1:].numpy(), whole["input_ids"][:, 1:])
        opened.check(opened.corpus(50, first), 384)
        assert len(opened.corpus(50, first).windows) == 2
        assert np.array_equal(torch.stack(opened.corpus(None, first + 1).windows),
                              whole["input_ids"])  # fmt: skip
        with pytest.raises(KldError, match="fewer --tokens"):
            opened.corpus(161, first)


def test_the_command_scores_the_files_own_text(tmp_path: Path, whole: dict[str, Any]) -> None:
    file = llama_file(tmp_path / "base.dat", whole["input_ids"], whole["logits"])
    words = ["evaluate", str(TINY), "--reference-logits", str(file), "--json"]
    found = CliRunner().invoke(cli, words, catch_exceptions=False)
    result = json.loads(found.stdout)
    assert result["tokens"] == 4 * 19 and result["kl_mean"] < 1e-7
    few = CliRunner().invoke(cli, [*words, "--tokens", "41"], catch_exceptions=False)
    assert json.loads(few.stdout)["tokens"] == 2 * 19
    for more, told in ((["--corpus", str(file)], "leave --corpus out"),
                       (["--seq-len", "20"], "leave --seq-len out")):  # fmt: skip
        refused = CliRunner().invoke(cli, [*words, *more])
        assert refused.exit_code == 1 and told in str(refused.exception)


def test_what_does_not_fit_is_refused(
    tmp_path: Path, corpus: Corpus, whole: dict[str, Any]
) -> None:
    uneven = Corpus([CorpusPart("a", [*corpus.windows[:3], corpus.windows[3][:20]])])
    with pytest.raises(KldError, match="windows of one length"):
        evaluated(TINY, uneven, save=tmp_path / "x.kld")
    with pytest.raises(LogitsError, match="leave --save-top-k out"):
        evaluated(TINY, corpus, save=tmp_path / "x.kld", top_k=16)
    assert not list(tmp_path.iterdir())
    file = llama_file(tmp_path / "base", whole["input_ids"], whole["logits"][..., :300])
    with pytest.raises(KldError, match="vocabulary"):
        evaluated(TINY, corpus, reference=file)
    file = llama_file(tmp_path / "base", whole["input_ids"], whole["logits"])
    other = Corpus([CorpusPart("a", [w.flip(0) for w in corpus.windows])])
    with pytest.raises(KldError, match="other text"):
        evaluated(TINY, other, reference=file)


DAMAGE: dict[str, tuple[int, bytes, str]] = {
    "no chunks": (16, struct.pack("<i", 0), "damaged"),
    "negative length": (8, struct.pack("<i", -40), "damaged"),
    "endless text": (16, struct.pack("<i", 2**31 - 1), "damaged"),
    "more chunks than rows": (16, struct.pack("<i", 5), "its header asks for"),
    "ids outside": (20, struct.pack("<i", 5000), "other text|outside its vocabulary"),
    "scale not a number": (20 + 640, struct.pack("<f", float("nan")), "row of position 20"),
    "least infinite": (24 + 640, struct.pack("<f", float("-inf")), "row of position 20"),
    "a sum of many": (24 + 640, struct.pack("<f", 0.0), "sum to"),
    "a sum of nothing": (24 + 640, struct.pack("<f", -60.0), "sum to"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told(damage: str, tmp_path: Path, corpus: Corpus, whole: dict[str, Any]) -> None:
    place, new, told = DAMAGE[damage]
    file = llama_file(tmp_path / "base", whole["input_ids"], whole["logits"])
    data = bytearray(file.read_bytes())
    data[place : place + len(new)] = new
    file.write_bytes(data)
    with pytest.raises(KldError, match=told):
        evaluated(TINY, corpus, reference=file)


def test_a_file_that_stops_is_told(tmp_path: Path, corpus: Corpus, whole: dict[str, Any]) -> None:
    data = llama_file(tmp_path / "base", whole["input_ids"], whole["logits"]).read_bytes()
    for length in (9, 19, 100, len(data) - 1):
        (tmp_path / "base").write_bytes(data[:length])
        with pytest.raises(KldError, match=r"incomplete|not a base file"):
            evaluated(TINY, corpus, reference=tmp_path / "base")


def test_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KldError, match=r"gone\.kld: cannot be read"):
        KldFile(tmp_path / "gone.kld")
    with pytest.raises(KldError, match="is not a regular file"):
        KldFile(tmp_path)
