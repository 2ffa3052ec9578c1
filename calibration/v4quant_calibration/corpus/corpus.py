"""Corpora: text, JSONL or token ids, cut into windows a model is scored or calibrated on.

A corpus file becomes a *part* with a name, so that results can be broken down. Text is tokenized
in one pass per document with the checkpoint's own tokenizer.json and cut into windows of
`seq_len` tokens that start with BOS, which the release's tokenizer does not add by itself. A chat
(a JSONL row with `messages`) becomes text by the release's encoding; the BOS that brings along is
the first window's, not a second one. Chats of one file and mode are a part named after both.
Token ids (.npy, or safetensors with `input_ids`) are taken as they are, a row per window, nothing
added. When fewer tokens are wanted than a file holds, windows are taken evenly from its whole
length. Several files share the tokens evenly, as far as they hold so many; where one does not, all
of it is taken, and the others make up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4quant_calibration.corpus.chat_dialects import DEFAULT_MODE, DEFAULT_RELEASE
from v4quant_calibration.corpus.chat_keys import MESSAGES
from v4quant_calibration.corpus.chat_marks import BOS
from v4quant_calibration.corpus.errors import CorpusError
from v4quant_calibration.corpus.row_text import RowText, row_text
from v4quant_calibration.corpus.sampling import (
    CHARS_A_TOKEN,
    check_memory,
    excerpts,
    pieces,
    rows_apart,
    wanted_chars,
)
from v4quant_calibration.corpus.text_files import (
    MAX_CORPUS_BYTES,
    holds_rows,
    read_rows,
    read_text,
    stem_of,
)
from v4quant_calibration.corpus.tokenizer import TextTokenizer
from v4quant_formats.errors import FormatError
from v4quant_formats.system import require_regular

DEFAULT_SEQ_LEN = 512
_ALL = 2**60


@dataclass(frozen=True)
class CorpusPart:
    """Windows of one file, and of one mode if they are chats: int64 ids [length] with BOS."""

    name: str
    windows: list[Tensor]

    @property
    def tokens(self) -> int:
        """Tokens over all windows."""
        return sum(len(w) for w in self.windows)


@dataclass(frozen=True)
class Corpus:
    """Parts in the order given. `windows` flattens them; `part_of` names each window's part.

    skipped_rows: rows that were left out because they cannot be read; of long files only those
    that were sampled are looked at.
    """

    parts: list[CorpusPart]
    skipped_rows: int = 0

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

    `bos_token_id` is prepended to every window of text; `vocab_size` bounds the ids. `mode` is how
    chats are encoded whose row names none, `release` whose format that is. `chat_keys` says under
    which keys rows have chats (`chat_keys.CHAT_KEYS`), `skip_bad_rows` how many rows of a file may
    be left out because they cannot be read. `enough` says how many tokens of a long text will do
    where it is not `tokens`; `memory` how many bytes reading may take (None: any).
    """

    seq_len: int | None
    tokens: int | None
    bos_token_id: int
    vocab_size: int
    mode: str = DEFAULT_MODE
    release: str = DEFAULT_RELEASE
    chat_keys: str = MESSAGES
    skip_bad_rows: int = 0
    enough: int | None = None
    memory: int | None = None

    @property
    def chars(self) -> int | None:
        """Characters that a long text need not exceed; None for all of it."""
        return wanted_chars(self.enough or self.tokens)


def load_corpus(
    files: Sequence[Path], tokenizer: Path | TextTokenizer, request: CorpusRequest
) -> Corpus:
    """Read files into windows; the token budget is shared evenly, as far as files hold so much.

    tokenizer: the checkpoint's tokenizer.json, needed for text. Raises CorpusError naming the file
    when it cannot be read or holds ids outside the vocabulary, and when all together are too short
    for what was asked.
    """
    if not files:
        raise CorpusError("no corpus given; use --corpus FILE")
    if request.seq_len is not None and request.seq_len < 2:
        raise CorpusError(f"--seq-len {request.seq_len} leaves nothing to predict; use at least 2")
    if request.tokens is not None and request.tokens < 2:
        raise CorpusError(f"--tokens {request.tokens} leaves nothing to predict; use at least 2")
    encode = TextTokenizer(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    read = [_read_documents(file, encode, request) for file in files]
    held = [_windows(file, found, request) for file, found in zip(files, read, strict=True)]
    if any(found.sampled for found in read) and sum(map(_tokens, held)) < (request.tokens or 0):
        # Tokens of more characters than any text has: then all of it.
        return load_corpus(files, encode, replace(request, enough=_ALL))
    parts: list[CorpusPart] = []
    for windows, share in zip(held, _shares(files, held, request.tokens), strict=True):
        parts += _by_part(windows if share is None else _choose(windows, share))
    return Corpus(parts, sum(found.skipped for found in read))


@dataclass(frozen=True)
class _Document:
    """Token ids of one document without BOS, or as a file of ids gives them (`as_is`)."""

    part: str
    ids: Tensor
    as_is: bool = False


@dataclass(frozen=True)
class _Documents:
    """Those of one file, and how many of its rows were left out."""

    documents: list[_Document]
    skipped: int = 0
    sampled: bool = False


@dataclass(frozen=True)
class _Window:
    """One window, and the name of the part it belongs to."""

    part: str
    ids: Tensor


def _by_part(windows: list[_Window]) -> list[CorpusPart]:
    """Windows grouped by part, in the order in which parts first occur."""
    grouped: dict[str, list[Tensor]] = {}
    for window in windows:
        grouped.setdefault(window.part, []).append(window.ids)
    return [CorpusPart(name, ids) for name, ids in grouped.items()]


def _read_documents(file: Path, encode: TextTokenizer, request: CorpusRequest) -> _Documents:
    """The documents of a file, tokenized."""
    check_memory(file, holds_rows(file), request.memory)
    try:
        if file.stat().st_size > MAX_CORPUS_BYTES:
            raise CorpusError(f"{file}: larger than {MAX_CORPUS_BYTES >> 30} GiB; split it")
        require_regular(file)
        if file.suffix == ".npy":
            return _rows(file, _load_npy(file))
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return _rows(file, opened.get_tensor("input_ids"))
        if not holds_rows(file):
            return _text_documents(stem_of(file), read_text(file), encode, request)
    except FileNotFoundError:
        raise CorpusError(f"{file}: no such corpus file") from None
    except FormatError as error:
        raise CorpusError(str(error)) from None
    except (OSError, EOFError, TypeError, ValueError, SafetensorError) as error:
        raise CorpusError(f"{file}: cannot be read as a corpus ({error})") from None
    return _row_documents(file, encode, request)


def _text_documents(
    name: str, text: str, encode: TextTokenizer, request: CorpusRequest
) -> _Documents:
    """A text as one document, or a long one's excerpts, of which each begins a window."""
    chars = request.chars
    if chars is None or len(text) <= chars:
        return _Documents([_Document(name, _encoded(text, encode))])
    length = CHARS_A_TOKEN * (request.seq_len or DEFAULT_SEQ_LEN)
    parts = excerpts(text, chars, length)
    return _Documents([_Document(name, encode(part)) for part in parts], sampled=True)


def _encoded(text: str, encode: TextTokenizer) -> Tensor:
    """Ids of a text, a piece after another where it is long."""
    ids = [encode(piece) for piece in pieces(text)]
    return torch.cat(ids) if ids else encode(text)


def _load_npy(file: Path) -> Tensor:
    """The array of a .npy file, as a tensor. Raises CorpusError."""
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False))
    except Exception as error:  # noqa: BLE001  (a header is parsed as Python, whose errors it raises)
        raise CorpusError(f"{file}: cannot be read as token ids ({error})") from None


def _rows(file: Path, ids: Tensor) -> _Documents:
    integral = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() not in (1, 2) or not integral:
        raise CorpusError(f"{file}: token ids must be integers of shape [sequences, length]")
    rows = torch.atleast_2d(ids.long())
    return _Documents([_Document(file.stem, row, as_is=True) for row in rows])


def _row_documents(file: Path, encode: TextTokenizer, request: CorpusRequest) -> _Documents:
    """A document a row, without the rows that may be left out and cannot be read."""
    name, documents, skipped = stem_of(file), list[_Document](), 0
    apart = rows_apart(file, request.chars)
    for number, (where, row) in enumerate(read_rows(file)):
        if number % apart:
            continue
        try:
            found = row_text(where, row, request.mode, request.release, request.chat_keys)
        except CorpusError as error:
            if skipped >= request.skip_bad_rows:
                raise _too_many(error, skipped) from None
            skipped += 1
            continue
        documents.append(_row_document(where, name, found, encode, request))
    return _Documents(documents, skipped, apart > 1)


def _too_many(error: CorpusError, skipped: int) -> CorpusError:
    """The error of a row that may not be left out as those before it were."""
    if not skipped:
        return error
    rows = "row" if skipped == 1 else "rows"
    return CorpusError(
        f"{error}; {skipped:,} bad {rows} before it, all that --skip-bad-rows allows"
    )


def _row_document(
    where: str, name: str, row: RowText, encode: TextTokenizer, request: CorpusRequest
) -> _Document:
    """A row in one pass; a chat's BOS is checked and taken off, windows get their own."""
    if row.mode is None:
        return _Document(name, _encoded(row.text, encode))
    ids = encode(row.text)
    if ids[:1].tolist() != [request.bos_token_id]:
        raise CorpusError(
            f"{where}: the tokenizer does not make {BOS} the model's BOS, token "
            f"{request.bos_token_id}; chats need the tokenizer.json of a DeepSeek-V4"
        )
    return _Document(f"{name} ({row.mode})", ids[1:])


def _cut(file: Path, document: _Document, request: CorpusRequest) -> list[_Window]:
    """Windows of one document. A shorter last piece is kept only when it is the only one."""
    ids, part = document.ids, document.part
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < request.vocab_size:
        raise CorpusError(
            f"{file}: holds token ids {int(ids.min())} to {int(ids.max())}, but the model's "
            f"vocabulary has {request.vocab_size}; corpus and model do not belong together"
        )
    if document.as_is:
        return [_Window(part, p) for p in ids.split(request.seq_len or max(len(ids), 1))]
    body = (request.seq_len or DEFAULT_SEQ_LEN) - 1
    bos = torch.tensor([request.bos_token_id])
    kept = [p for i, p in enumerate(ids.split(body)) if len(p) == body or i == 0]
    return [_Window(part, torch.cat((bos, p))) for p in kept]


def _windows(file: Path, found: _Documents, request: CorpusRequest) -> list[_Window]:
    """All windows of a file. Raises CorpusError when there is none."""
    windows = [w for d in found.documents for w in _cut(file, d, request) if len(w.ids) >= 2]
    if not windows:
        without = f" without the {found.skipped:,} rows that were skipped" if found.skipped else ""
        raise CorpusError(f"{file}: is too short: it gives no window of at least 2 tokens{without}")
    return windows


def _shares(
    files: Sequence[Path], held: Sequence[list[_Window]], tokens: int | None
) -> list[int | None]:
    """Tokens to take of each file; None for all of it."""
    if tokens is None:
        return [None] * len(files)
    available = [_tokens(windows) for windows in held]
    if sum(available) < tokens:
        names = ", ".join(str(file) for file in files)
        raise CorpusError(
            f"{names}: is too short: its windows hold {sum(available):,} tokens, but {tokens:,} "
            "were asked of it; give more text or fewer --tokens"
        )
    whole: set[int] = set()
    while True:
        rest = tokens - sum(available[i] for i in whole)
        share = -(-rest // max(1, len(files) - len(whole)))
        short = {i for i, n in enumerate(available) if i not in whole and n < share}
        if not short:
            return [None if i in whole else share for i in range(len(files))]
        whole |= short


def _choose(windows: list[_Window], share: int) -> list[_Window]:
    """Windows spread evenly over a file until they hold `share` tokens, which it does."""
    available = _tokens(windows)
    count = min(len(windows), -(-share * len(windows) // available))
    chosen = _spread(windows, count)
    # Windows of unequal length: those chosen may hold less than their number promises.
    while (held := _tokens(chosen)) < share:
        count = min(len(windows), count * share // held + 1)
        chosen = _spread(windows, count)
    return chosen


def _spread(windows: list[_Window], count: int) -> list[_Window]:
    return [windows[i * len(windows) // count] for i in range(count)]


def _tokens(windows: list[_Window]) -> int:
    return sum(len(w.ids) for w in windows)
