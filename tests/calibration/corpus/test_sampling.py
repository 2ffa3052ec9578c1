"""Long texts: no more is tokenized than is asked for, evenly spread, in bounded memory."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from v4quant_calibration.corpus import sampling
from v4quant_calibration.corpus.corpus import Corpus, CorpusRequest, load_corpus
from v4quant_calibration.corpus.errors import CorpusError
from v4quant_calibration.corpus.sampling import WHOLE, excerpts, pieces
from v4quant_calibration.corpus.tokenizer import TextTokenizer

BOS = 0


class Words(TextTokenizer):
    """A token a word, its number; counts the characters it is given, and the most at once."""

    def __init__(self) -> None:
        self.seen = self.most = 0

    def __call__(self, text: str) -> torch.Tensor:
        self.seen += len(text)
        self.most = max(self.most, len(text))
        return torch.tensor([int(w) for w in text.split()], dtype=torch.int64)


def write(file: Path, lines: list[str]) -> Path:
    """A text, or rows of one."""
    if file.suffix == ".jsonl":
        lines = [json.dumps({"text": line}) for line in lines]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def lines() -> list[str]:
    """Five million characters of numbers that rise along the text."""
    rng = random.Random(seed := secrets.randbits(32))
    print(f"seed {seed}")
    return [" ".join([str(i * 9000 // 20000)] * rng.randrange(20, 100)) for i in range(20000)]


def load(file: Path, tokens: int | None, words: Words, **more: int) -> Corpus:
    return load_corpus([file], words, CorpusRequest(32, tokens, BOS, 10000, **more))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_few_tokens_of_a_long_text(name: str, lines: list[str], tmp_path: Path) -> None:
    file, words = write(tmp_path / name, lines), Words()
    corpus = load(file, 2000, words)
    assert 2000 <= corpus.tokens < 2100
    assert words.seen <= 1.2 * WHOLE < file.stat().st_size / 3
    firsts = [int(w[1]) for w in corpus.windows]
    assert firsts == sorted(firsts) and firsts[0] < 900 and firsts[-1] > 8000
    for tenth in range(10):
        assert any(tenth * 900 <= f < (tenth + 1) * 900 for f in firsts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_short_texts_are_taken_whole(name: str, lines: list[str], tmp_path: Path) -> None:
    file, words = write(tmp_path / name, lines[::8]), Words()
    whole = load(file, None, Words())
    few = load(file, 2000, words)
    assert words.seen > 0.8 * file.stat().st_size or name.endswith("l")
    wanted = {tuple(w.tolist()) for w in whole.windows}
    assert {tuple(w.tolist()) for w in few.windows} <= wanted


def test_all_of_a_long_text_is_read_in_pieces(lines: list[str], tmp_path: Path) -> None:
    file, words = write(tmp_path / "a.txt", lines), Words()
    corpus = load(file, None, words)
    assert words.most <= WHOLE < words.seen
    ids = torch.cat([w[1:] for w in corpus.windows])
    wanted = torch.tensor([int(w) for line in lines for w in line.split()])
    assert torch.equal(ids, wanted[: len(ids)]) and len(wanted) - len(ids) < 32


def test_long_tokens_need_more_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of a hundred digits: what holds enough tokens elsewhere does not here."""
    monkeypatch.setattr(sampling, "WHOLE", 10_000)
    file = write(tmp_path / "a.txt", ["0" * 100 + str(i % 9000) for i in range(3000)])
    words = Words()
    assert load(file, 2500, words).tokens >= 2500
    with pytest.raises(CorpusError, match="too short"):
        load(file, 4000, Words())


def test_pieces_and_excerpts(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert "".join(pieces(text)) == text
    assert all(len(p) <= WHOLE and p.endswith("\n") for p in list(pieces(text))[:-1])
    assert "".join(pieces("x" * (WHOLE + 5))) == "x" * (WHOLE + 5)
    found = excerpts(text, WHOLE, 500)
    assert len(found) == WHOLE // 500 and all(0 < len(e) <= 500 for e in found)
    places = [text.find(e) for e in found[:20]]
    assert all(text[p - 1] in "\n " for p in places[1:])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.npy"])
def test_memory_for_reading_is_counted(name: str, lines: list[str], tmp_path: Path) -> None:
    if name.endswith("npy"):
        import numpy as np

        np.save(tmp_path / name, np.ones((50, 1000), np.uint16))
        file = tmp_path / name
    else:
        file = write(tmp_path / name, lines)
    told = rf"{name}: reading it takes about 0\.\d\d GB, and --max-memory leaves 0\.\d\d GB"
    with pytest.raises(CorpusError, match=told):
        load(file, 100, Words(), memory=10**5)
    assert load(file, 100, Words(), memory=10**9).tokens >= 100


def test_what_is_enough_bounds_a_reserve(lines: list[str], tmp_path: Path) -> None:
    check: Callable[..., Corpus] = load
    file, words = write(tmp_path / "a.txt", lines), Words()
    reserve = check(file, None, words, enough=4000)
    assert reserve.tokens > 4000 and words.seen <= 1.2 * WHOLE
