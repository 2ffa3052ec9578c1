"""Corpora: text, JSONL or token ids, cut into windows a model is scored or calibrated on.

A corpus file becomes one *part* with a name, so that results can be broken down. Text is tokenized
in one pass per document with the checkpoint's own tokenizer.json and cut into windows of
`seq_len` tokens that start with BOS, which the release's tokenizer does not add by itself. Token
ids (.npy, or safetensors with `input_ids`) are taken as they are, a row a window, nothing added.
When fewer tokens are wanted than a file holds, windows are taken evenly from its whole length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from v4quant_kernels.errors import V4QuantError

MAX_CORPUS_BYTES = 4 * 2**30
DEFAULT_SEQ_LEN = 512
JSONL_SUFFIXES = (".jsonl", ".ndjson")


class CorpusError(V4QuantError):
    """A corpus that cannot be read, is too short, or does not fit the model's vocabulary."""


@dataclass(frozen=True)
class CorpusPart:
    """One file's windows: int64 token ids [length], BOS included."""

    name: str
    windows: list[Tensor]

    @property
    def tokens(self) -> int:
        """Tokens over all windows."""
        return sum(len(w) for w in self.windows)


@dataclass(frozen=True)
class Corpus:
    """Parts in the order given. `windows` flattens them; `part_of` names each window's part."""

    parts: list[CorpusPart]

    @property
    def windows(self) -> list[Tensor]:
        """All windows, part by part."""
        return [w for part in self.parts for w in part.windows]

    @property
    def part_of(self) -> list[int]:
        """Index of the part each window belongs to."""
        return [i for i, part in enumerate(self.parts) for _ in part.windows]

    @property
    def tokens(self) -> int:
        """Tokens over all parts."""
        return sum(part.tokens for part in self.parts)


@dataclass(frozen=True)
class CorpusRequest:
    """What to cut: window length (None: 512 for text, whole rows for ids), and how many tokens in
    all (None: everything).

    `bos_token_id` is prepended to every window of text; `vocab_size` bounds the ids.
    """

    seq_len: int | None
    tokens: int | None
    bos_token_id: int
    vocab_size: int


def load_corpus(files: Sequence[Path], tokenizer: Path, request: CorpusRequest) -> Corpus:
    """Read files into windows; the token budget is shared evenly among the files.

    tokenizer: the checkpoint's tokenizer.json, needed for text. Raises CorpusError naming the file
    when it cannot be read, holds ids outside the vocabulary, or is too short for what was asked.
    """
    if not files:
        raise CorpusError("no corpus given; use --corpus FILE")
    if request.seq_len is not None and request.seq_len < 2:
        raise CorpusError(f"--seq-len {request.seq_len} leaves nothing to predict; use at least 2")
    if request.tokens is not None and request.tokens < 2:
        raise CorpusError(f"--tokens {request.tokens} leaves nothing to predict; use at least 2")
    encoder = _Encoder(tokenizer)
    share = None if request.tokens is None else -(-request.tokens // len(files))
    parts = []
    for file in files:
        documents = _read_documents(file, encoder)
        windows = [w for d in documents for w in _cut(file, d, request) if len(w) >= 2]
        parts.append(CorpusPart(file.stem, _choose(file, windows, share)))
    return Corpus(parts)


@dataclass(frozen=True)
class _Document:
    """Token ids of one document; `is_text` ones still need BOS."""

    ids: Tensor
    is_text: bool


class _Encoder:
    """The checkpoint's tokenizer, loaded when the first text needs it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokenizer: Tokenizer | None = None

    def __call__(self, text: str) -> _Document:
        if self._tokenizer is None:
            if not self._path.is_file():
                raise CorpusError(
                    f"{self._path}: missing; a text corpus needs the checkpoint's tokenizer.json "
                    "(or give token ids as .npy)"
                )
            try:
                self._tokenizer = Tokenizer.from_file(str(self._path))
            except Exception as error:  # noqa: BLE001  (tokenizers raises bare Exception)
                raise CorpusError(f"{self._path}: is no usable tokenizer ({error})") from None
        # Half a surrogate pair, which JSON can spell, has no UTF-8 form for the tokenizer.
        text = text.encode(errors="replace").decode()
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return _Document(torch.tensor(ids, dtype=torch.int64), is_text=True)


def _read_documents(file: Path, encode: _Encoder) -> list[_Document]:
    """The documents of a file, tokenized."""
    try:
        if file.stat().st_size > MAX_CORPUS_BYTES:
            raise CorpusError(f"{file}: larger than {MAX_CORPUS_BYTES >> 30} GiB; split it")
        if file.suffix == ".npy":
            return _rows(file, torch.from_numpy(np.load(file, allow_pickle=False)))
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return _rows(file, opened.get_tensor("input_ids"))
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CorpusError(f"{file}: no such corpus file") from None
    except (OSError, EOFError, TypeError, ValueError, SafetensorError) as error:
        raise CorpusError(f"{file}: cannot be read as a corpus ({error})") from None
    if file.suffix in JSONL_SUFFIXES:
        return [encode(t) for t in _jsonl_texts(file, text)]
    return [encode(text)]


def _rows(file: Path, ids: Tensor) -> list[_Document]:
    integral = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() not in (1, 2) or not integral:
        raise CorpusError(f"{file}: token ids must be integers of shape [sequences, length]")
    return [_Document(row, is_text=False) for row in torch.atleast_2d(ids.long())]


def _jsonl_texts(file: Path, content: str) -> list[str]:
    texts = []
    # Not splitlines: JSON strings may hold U+2028 and other characters it would break lines at.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise CorpusError(f"{file}: line {number} is not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CorpusError(f'{file}: line {number} has no "text" string')
        texts.append(row["text"])
    return texts


def _cut(file: Path, document: _Document, request: CorpusRequest) -> list[Tensor]:
    """Windows of one document. A shorter last piece is kept only when it is the only one."""
    ids = document.ids
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < request.vocab_size:
        raise CorpusError(
            f"{file}: holds token ids {int(ids.min())} to {int(ids.max())}, but the model's "
            f"vocabulary has {request.vocab_size}; corpus and model do not belong together"
        )
    if not document.is_text:
        return list(ids.split(request.seq_len or max(len(ids), 1)))
    body = (request.seq_len or DEFAULT_SEQ_LEN) - 1
    bos = torch.tensor([request.bos_token_id])
    pieces = ids.split(body)
    return [torch.cat((bos, p)) for i, p in enumerate(pieces) if len(p) == body or i == 0]


def _choose(file: Path, windows: list[Tensor], share: int | None) -> list[Tensor]:
    """Windows spread evenly over the file until they hold `share` tokens."""
    if not windows:
        raise CorpusError(f"{file}: is too short: it gives no window of at least 2 tokens")
    if share is None:
        return windows
    available = sum(len(w) for w in windows)
    if available < share:
        raise CorpusError(
            f"{file}: is too short: its windows hold {available:,} tokens, but {share:,} were "
            "asked of it; give more text or fewer --tokens"
        )
    count = min(len(windows), -(-share * len(windows) // available))
    chosen = _spread(windows, count)
    # Windows of unequal length: those chosen may hold less than their number promises.
    while (held := sum(map(len, chosen))) < share:
        count = min(len(windows), count * share // held + 1)
        chosen = _spread(windows, count)
    return chosen


def _spread(windows: list[Tensor], count: int) -> list[Tensor]:
    return [windows[i * len(windows) // count] for i in range(count)]
