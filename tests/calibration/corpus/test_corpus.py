"""Corpora: what becomes of text, JSONL and token ids, and what is refused by name.

The tokenizer here knows one word per id ("w17" is 17), so expected windows can be written down.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus
from v4quant_calibration.corpus.errors import CorpusError
from v4quant_calibration.corpus.tokenizer import TokenizerError

VOCABULARY = 100
BOS = 99


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"?": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def draw() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed: {seed}")
    return random.Random(seed)


def request(
    seq_len: int | None = None, tokens: int | None = None, vocab_size: int = VOCABULARY
) -> CorpusRequest:
    return CorpusRequest(seq_len, tokens, BOS, vocab_size)


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def lists(windows: list[Tensor]) -> list[list[int]]:
    assert all(w.dtype == torch.int64 for w in windows)
    return [w.tolist() for w in windows]


def some_ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(VOCABULARY - 1) for _ in range(count)]


def test_text_windows_start_with_bos(tmp_path: Path, tokenizer: Path, draw: random.Random) -> None:
    ids = some_ids(draw, 23)
    file = tmp_path / "prose.txt"
    file.write_text(words(ids))
    corpus = load_corpus([file], tokenizer, request(seq_len=8))
    # 23 = 3 * 7 + 2: the rest of two is not worth a window.
    assert lists(corpus.windows) == [[BOS, *ids[i : i + 7]] for i in (0, 7, 14)]
    assert corpus.tokens == 24
    assert [p.name for p in corpus.parts] == ["prose"]


def test_short_text_is_one_window(tmp_path: Path, tokenizer: Path, draw: random.Random) -> None:
    ids = some_ids(draw, 5)
    file = tmp_path / "short.txt"
    file.write_text(words(ids))
    assert lists(load_corpus([file], tokenizer, request()).windows) == [[BOS, *ids]]


def test_default_window_is_512_tokens(tmp_path: Path, tokenizer: Path, draw: random.Random) -> None:
    file = tmp_path / "long.txt"
    file.write_text(words(some_ids(draw, 1100)))
    assert [len(w) for w in load_corpus([file], tokenizer, request()).windows] == [512, 512]


def test_jsonl_documents_do_not_mix(tmp_path: Path, tokenizer: Path, draw: random.Random) -> None:
    first, second = some_ids(draw, 9), some_ids(draw, 3)
    file = tmp_path / "rows.jsonl"
    rows = [{"text": words(first), "more": 1}, {"text": words(second)}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    corpus = load_corpus([file], tokenizer, request(seq_len=5))
    assert lists(corpus.windows) == [[BOS, *first[:4]], [BOS, *first[4:8]], [BOS, *second]]


def test_jsonl_lines_end_at_newlines_only(tmp_path: Path, tokenizer: Path) -> None:
    """A JSON string may hold U+2028 and U+0085, at which str.splitlines would cut it."""
    file = tmp_path / "rows.jsonl"
    text = json.dumps({"text": "w1\u2028w2\u0085w3"}, ensure_ascii=False)
    file.write_text(text + "\r\n" + text, encoding="utf-8")
    assert lists(load_corpus([file], tokenizer, request()).windows) == [[BOS, 1, 2, 3]] * 2


def test_half_a_surrogate_pair_is_text(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "w1 \\ud800 w2"}')
    unknown = VOCABULARY - 1
    assert lists(load_corpus([file], tokenizer, request()).windows) == [[BOS, 1, unknown, 2]]


def ids_npy(path: Path, ids: Tensor) -> Path:
    file = path / "ids.npy"
    np.save(file, ids.numpy().astype(np.uint16))
    return file


def ids_safetensors(path: Path, ids: Tensor) -> Path:
    file = path / "ids.safetensors"
    save_file({"input_ids": ids.int(), "other": torch.zeros(3)}, file)
    return file


@pytest.mark.parametrize("write", [ids_npy, ids_safetensors])
def test_ids_are_taken_as_they_are(
    tmp_path: Path, tokenizer: Path, draw: random.Random, write: Callable[[Path, Tensor], Path]
) -> None:
    rows = [some_ids(draw, 10) for _ in range(3)]
    file = write(tmp_path, torch.tensor(rows))
    absent = tmp_path / "no-tokenizer.json"
    assert lists(load_corpus([file], absent, request()).windows) == rows
    cut = [piece for row in rows for piece in (row[:4], row[4:8], row[8:])]
    assert lists(load_corpus([file], absent, request(seq_len=4)).windows) == cut
    # A piece of one token predicts nothing.
    assert [len(w) for w in load_corpus([file], absent, request(seq_len=3)).windows] == [3] * 9


def test_one_row_of_ids(tmp_path: Path, tokenizer: Path) -> None:
    file = ids_npy(tmp_path, torch.arange(12))
    assert lists(load_corpus([file], tokenizer, request()).windows) == [list(range(12))]


def test_windows_are_spread_evenly(tmp_path: Path, tokenizer: Path) -> None:
    file = ids_npy(tmp_path, torch.arange(40).unsqueeze(1).repeat(1, 10))
    chosen = load_corpus([file], tokenizer, request(tokens=75)).windows
    assert [int(w[0]) for w in chosen] == [0, 5, 10, 15, 20, 25, 30, 35]
    assert len(load_corpus([file], tokenizer, request(tokens=400)).windows) == 40


def test_the_budget_is_reached_with_windows_of_any_length(
    tmp_path: Path, tokenizer: Path, draw: random.Random
) -> None:
    for number in range(30):
        lengths = [draw.choice([2, 3, 5, 40]) for _ in range(draw.randrange(1, 30))]
        file = tmp_path / f"{number}.jsonl"
        rows = [json.dumps({"text": words(some_ids(draw, n - 1))}) for n in lengths]
        file.write_text("\n".join(rows))
        wanted = draw.randrange(2, sum(lengths) + 1)
        corpus = load_corpus([file], tokenizer, request(seq_len=40, tokens=wanted))
        assert wanted <= corpus.tokens <= sum(lengths)


def test_files_share_the_budget(tmp_path: Path, tokenizer: Path, draw: random.Random) -> None:
    files = []
    for name in ("a", "b", "c"):
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text(words(some_ids(draw, 900)))
    corpus = load_corpus(files, tokenizer, request(seq_len=10, tokens=100))
    assert [p.tokens for p in corpus.parts] == [40, 40, 40]
    assert corpus.part_of == [0] * 4 + [1] * 4 + [2] * 4
    again = load_corpus(files, tokenizer, request(seq_len=10, tokens=100))
    assert lists(again.windows) == lists(corpus.windows)


def test_what_a_short_file_lacks_the_others_give(
    tmp_path: Path, tokenizer: Path, draw: random.Random
) -> None:
    files = []
    for name, held in (("a", 899), ("b", 17), ("c", 899), ("d", 8)):
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text(words(some_ids(draw, held)))
    corpus = load_corpus(files, tokenizer, request(seq_len=10, tokens=400))
    # b gives its one whole window, d its only one; a and c share the rest.
    assert [p.tokens for p in corpus.parts] == [200, 10, 200, 9]
    with pytest.raises(CorpusError, match=r"a\.txt, .*d\.txt: is too short.*1,999 tokens.*2,020"):
        load_corpus(files, tokenizer, request(seq_len=10, tokens=2_020))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".npy", ".safetensors"])
def test_too_short(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    file = tmp_path / f"few{suffix}"
    if suffix == ".npy":
        np.save(file, np.arange(6))
    elif suffix == ".safetensors":
        save_file({"input_ids": torch.arange(6)}, file)
    else:
        file.write_text("w1 w2 w3 w4 w5" if suffix == ".txt" else '{"text": "w1 w2 w3 w4 w5"}')
    with pytest.raises(CorpusError, match=r"few\.\w+: is too short.*6 tokens.*7.*--tokens"):
        load_corpus([file], tokenizer, request(tokens=7))
    assert load_corpus([file], tokenizer, request(tokens=6)).tokens == 6


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def strings(path: Path) -> None:
    np.save(path, np.array(["a", "b"]))


def pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def truncated(path: Path) -> None:
    np.save(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-8])


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.arange(4))


BAD_ARRAYS: dict[str, Callable[[Path], None]] = {
    "empty file": empty_file,
    "strings": strings,
    "pickled": pickled,
    "truncated": truncated,
    "no tokens": lambda p: np.save(p, np.zeros((0,), np.int64)),
    "no rows": lambda p: np.save(p, np.zeros((0, 4), np.int64)),
    "empty rows": lambda p: np.save(p, np.zeros((3, 0), np.int64)),
    "rows of one": lambda p: np.save(p, np.zeros((3, 1), np.int64)),
    "floats": lambda p: np.save(p, np.zeros((3, 4))),
    "bools": lambda p: np.save(p, np.zeros((3, 4), bool)),
    "complex": lambda p: np.save(p, np.zeros((3, 4), np.complex64)),
    "scalar": lambda p: np.save(p, np.int64(3)),
    "cube": lambda p: np.save(p, np.zeros((2, 3, 4), np.int64)),
    "archive": archive,
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    file = tmp_path / "bad.npy"
    BAD_ARRAYS[kind](file)
    with pytest.raises(CorpusError, match=r"bad\.npy: "):
        load_corpus([file], tokenizer, request())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "is UTF-16"),
        ("a.txt", b"", "too short"),
        ("a.jsonl", b'{"text": "w1"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"words": "w1"}', 'line 1 has no "text"'),
        ("a.jsonl", b'["text"]', 'line 1 has no "text"'),
        ("a.jsonl", b'{"text": 3}', 'line 1 has no "text"'),
        ("a.safetensors", b"no header", "cannot be read"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, tokenizer: Path, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=f"{name}: .*{message}"):
        load_corpus([file], tokenizer, request())


def test_safetensors_without_input_ids(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "ids.safetensors"
    save_file({"ids": torch.arange(4)}, file)
    with pytest.raises(CorpusError, match=r"ids\.safetensors: .*input_ids"):
        load_corpus([file], tokenizer, request())


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**40])
def test_ids_outside_the_vocabulary(tmp_path: Path, tokenizer: Path, bad: int) -> None:
    file = tmp_path / "ids.npy"
    np.save(file, np.array([[1, 2], [3, bad]]))
    with pytest.raises(CorpusError, match=rf"ids\.npy: .*{bad}.*{VOCABULARY}"):
        load_corpus([file], tokenizer, request())


def test_a_tokenizer_of_another_model(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("w1 w50")
    with pytest.raises(CorpusError, match="do not belong together"):
        load_corpus([file], tokenizer, request(vocab_size=50))


def test_absent_things(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "a.txt"
    with pytest.raises(CorpusError, match=r"a\.txt: no such corpus file"):
        load_corpus([file], tokenizer, request())
    with pytest.raises(CorpusError, match="cannot be read"):
        load_corpus([tmp_path], tokenizer, request())
    with pytest.raises(CorpusError, match="--corpus"):
        load_corpus([], tokenizer, request())
    file.write_text("w1 w2")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: missing"):
        load_corpus([file], tmp_path / "tokenizer.json", request())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: is not a usable tokenizer"):
        load_corpus([file], tmp_path / "tokenizer.json", request())


@pytest.mark.parametrize(("seq_len", "tokens"), [(1, None), (0, None), (None, 0), (None, -3)])
def test_nothing_to_predict(
    tmp_path: Path, tokenizer: Path, seq_len: int | None, tokens: int | None
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("w1 w2")
    with pytest.raises(CorpusError, match="nothing to predict"):
        load_corpus([file], tokenizer, request(seq_len, tokens))
