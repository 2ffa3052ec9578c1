"""llama.cpp's base files of `llama-perplexity --kl-divergence-base`, read and written.

The file (little-endian) begins with `_logits_`, then int32 `n_ctx`, `n_vocab` and `n_chunk`, then
the text, int32 [n_chunk, n_ctx], then rows of the second half of every chunk: of its positions
n_ctx / 2 to n_ctx - 2, whose successors it knows. A row is float32 `scale` and `min`, then a uint16
code for every token, padded to an even number: the token's log-probability is scale * code + min.
Code 0 says "min or less", which is 16 nats below the best token unless all are nearer.

So the file knows every distribution but for the tokens far below the best. KL is taken over the
others and "any other" (see saved_logits.py: a lower bound), whose share is what is missing to 1, at
most that of as many tokens at `min`. Rounding to codes moves a log-probability by 1.2e-4 at most.

llama.cpp puts BOS in the place of each chunk's first token when it runs the model, not in the file,
where it then only begins the text.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.evaluation.token_scores import BEST, Softmax, compared
from v4quant_formats.errors import FormatError
from v4quant_formats.system import bytes_at, open_for_reading, open_regular
from v4quant_kernels.errors import V4QuantError

MAGIC = b"_logits_"
SUFFIX = ".kld"
_START = struct.Struct("<8s3i")
RANGE = 16.0
"""Nats below the best token that have codes."""
# Rows decoded at once: what it takes stays small beside a tile of logits.
_ROWS = 16
# By how much codes may miss a sum of 1: rounding moves it by far less.
_SUM_ERROR = 0.01
_MOST_TEXT = 2**30


class KldError(V4QuantError):
    """A base file that is damaged, or that does not fit the model or what was asked of it."""


def is_kld(path: Path) -> bool:
    """Whether a file begins as such a base file does. False for what cannot be read."""
    try:
        with open_regular(path) as file:
            return path.is_file() and file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class KldShape:
    """n_chunk windows of n_ctx tokens, with rows over n_vocab for their second halves."""

    n_ctx: int
    n_vocab: int
    n_chunk: int

    @property
    def first(self) -> int:
        """The first position of a chunk that has a row."""
        return self.n_ctx // 2

    @property
    def rows(self) -> int:
        """Rows of a chunk."""
        return self.n_ctx - 1 - self.first

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return 8 + 4 * ((self.n_vocab + 1) // 2)

    @property
    def text_bytes(self) -> int:
        """Bytes of the token ids."""
        return 4 * self.n_ctx * self.n_chunk

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return _START.size + self.text_bytes + self.n_chunk * self.rows * self.row_bytes

    def header(self) -> bytes:
        """What stands before the text."""
        return _START.pack(MAGIC, self.n_ctx, self.n_vocab, self.n_chunk)

    def place(self, position: int) -> int | None:
        """Byte where the row of a position, counted over all chunks, begins; None: it has none."""
        chunk, within = divmod(position, self.n_ctx)
        if not self.first <= within < self.n_ctx - 1:
            return None
        row = chunk * self.rows + within - self.first
        return _START.size + self.text_bytes + row * self.row_bytes


class KldFile:
    """A base file as the reference of a run; see `SavedReference`."""

    top_k = None
    kl = "lower bound"
    facts = None

    def __init__(self, path: Path) -> None:
        """Open the file and check its size. Raises KldError and FormatError."""
        self.path = path
        try:
            self._file = open_for_reading(path)
        except OSError as error:
            raise KldError(f"{path}: cannot be read ({error.strerror or error})") from None
        try:
            self.shape = self._read_shape()
        except BaseException:
            os.close(self._file)
            raise

    def _read_shape(self) -> KldShape:
        start = bytes_at(self._file, _START.size, 0)
        if len(start) < _START.size or start[: len(MAGIC)] != MAGIC:
            raise KldError(f"{self.path}: is not a base file of llama-perplexity")
        _, n_ctx, n_vocab, n_chunk = _START.unpack(start)
        shape = KldShape(n_ctx, n_vocab, n_chunk)
        if n_ctx < 3 or n_vocab < BEST or n_chunk < 1 or shape.text_bytes > _MOST_TEXT:
            raise KldError(
                f"{self.path}: its header names {n_chunk} chunks of {n_ctx} tokens over a "
                f"vocabulary of {n_vocab}; the file is damaged"
            )
        size = os.fstat(self._file).st_size
        if size != shape.nbytes:
            raise KldError(
                f"{self.path}: has {size:,} bytes, its header asks for {shape.nbytes:,}: "
                f"llama-perplexity was stopped, or the file is incomplete; make it again"
            )
        return shape

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> KldFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def known(self) -> Tensor:
        """Whether a position has a row, bool [positions of all chunks]."""
        within = torch.arange(self.shape.n_ctx)
        rows = (within >= self.shape.first) & (within < self.shape.n_ctx - 1)
        return rows.repeat(self.shape.n_chunk)

    def corpus(self, tokens: int | None, bos_token_id: int) -> Corpus:
        """The text as the model reads it: the first chunks that hold `tokens` (None: all).

        Raises KldError for more than there are.
        """
        shape = self.shape
        chunks = shape.n_chunk if tokens is None else -(-tokens // shape.n_ctx)
        if chunks > shape.n_chunk:
            raise KldError(
                f"{self.path}: holds {shape.n_chunk * shape.n_ctx:,} tokens, but {tokens:,} were "
                "asked of it; give fewer --tokens"
            )
        ids = self._ids(chunks)
        if not 0 <= int(ids.min()) <= int(ids.max()) < shape.n_vocab:
            raise KldError(f"{self.path}: its text has ids outside its vocabulary; it is damaged")
        if int(ids[0, 0]) == bos_token_id:
            ids[:, 0] = bos_token_id
        return Corpus([CorpusPart(self.path.stem, list(ids))])

    def check(self, corpus: Corpus, vocab_size: int) -> None:
        """Raise KldError unless the file is about this vocabulary, and begins with this text."""
        shape = self.shape
        if shape.n_vocab != vocab_size:
            raise KldError(
                f"{self.path}: is of a vocabulary of {shape.n_vocab:,} tokens, the model has "
                f"{vocab_size:,}"
            )
        windows = corpus.windows
        if {len(w) for w in windows} != {shape.n_ctx} or len(windows) > shape.n_chunk:
            raise KldError(f"{self.path}: holds other text than is scored; leave --corpus out")
        mine, text = self._ids(len(windows)), torch.stack(windows)
        bos = text[1:, 0] == text[0, 0]
        mine[1:, 0] = torch.where(bos, text[1:, 0], mine[1:, 0])
        if not torch.equal(mine, text):
            raise KldError(f"{self.path}: holds other text than is scored; leave --corpus out")

    def _ids(self, chunks: int) -> Tensor:
        """The first chunks' ids as the file has them, int64 [chunks, n_ctx]."""
        data = self.read(_START.size, 4 * self.shape.n_ctx * chunks)
        return torch.from_numpy(data.view("<i4").astype(np.int64)).view(chunks, self.shape.n_ctx)

    def begin(self, start: int, model: Softmax) -> _Rows:
        """The rows from position `start` on."""
        return _Rows(self, start, model)

    def read(self, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Bytes of the file. Raises FormatError when it has become shorter."""
        data = bytes_at(self._file, count, start)
        if len(data) != count:
            raise FormatError(f"{self.path}: became shorter while it was read")
        return np.frombuffer(bytearray(data), dtype=np.uint8)


class _Rows:
    """Some positions' rows beside a model's logits, a stretch of the vocabulary after another."""

    def __init__(self, file: KldFile, start: int, model: Softmax) -> None:
        count = model.targets.shape[0]
        self._file, self._model = file, model
        self._places = [file.shape.place(start + i) for i in range(count)]
        self._held = [i for i, place in enumerate(self._places) if place is not None]
        self._scale, self._least = torch.zeros(count), torch.zeros(count)
        for i, place in self._rows(self._held):
            scale, least = file.read(place, 8).view("<f4").tolist()
            if not (0 <= scale <= RANGE and -1e4 < least <= 0):
                raise KldError(
                    f"{file.path}: the row of position {start + i} is damaged (scale {scale}, "
                    f"least log-probability {least})"
                )
            self._scale[i], self._least[i] = scale, least
        # Of tokens with codes: share p and p * (log p - logit); tokens without; the model's share.
        self._p, self._gap, self._others = torch.zeros(3, count, dtype=torch.float64)
        self._mine = torch.full((count,), -torch.inf, dtype=torch.float64)
        self._target = torch.zeros(count)
        self._best, self._ids = torch.empty(count, 0), torch.empty(count, 0, dtype=torch.int64)
        self._start = start

    def _rows(self, which: list[int]) -> Iterator[tuple[int, int]]:
        for i in which:
            place = self._places[i]
            assert place is not None
            yield i, place

    def add(self, logits: Tensor, first: int) -> None:
        """Read the same entries of the file, a few rows at a time."""
        count, width = logits.shape
        log_p = torch.full((count, min(BEST, width)), -torch.inf)
        ids = torch.zeros(log_p.shape, dtype=torch.int64)
        for begin in range(0, len(self._held), _ROWS):
            which = self._held[begin : begin + _ROWS]
            codes = [self._file.read(place + 8 + 2 * first, 2 * width).view("<u2")
                     for _, place in self._rows(which)]  # fmt: skip
            found = torch.from_numpy(np.stack(codes).astype(np.float32))
            rows = torch.tensor(which)
            log_p[rows], ids[rows] = self._add_rows(rows, found, logits[rows], first)
        best = torch.cat([self._best, log_p], 1)
        self._best, kept = best.topk(min(BEST, best.shape[1]), -1)
        self._ids = torch.cat([self._ids, ids + first], 1).gather(1, kept)

    def _add_rows(
        self, rows: Tensor, codes: Tensor, logits: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Sum what codes float32 `[n, c]` say; their best log-probabilities and places."""
        scale = self._scale[rows].unsqueeze(1)
        log_p = codes * scale + self._least[rows].unsqueeze(1)
        place = self._model.targets[rows] - first
        here = (place >= 0) & (place < codes.shape[1])
        target = log_p.gather(1, place.clamp(0, codes.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self._target[rows] = torch.where(here, target, self._target[rows])
        coded = (codes > 0) | (scale == 0)
        p = torch.where(coded, log_p.exp(), 0)
        self._p[rows] += p.sum(1, dtype=torch.float64)
        self._gap[rows] += (p * (log_p - logits)).sum(1, dtype=torch.float64)
        self._others[rows] += (~coded).sum(1)
        mine = torch.where(coded, logits, -torch.inf).double().logsumexp(1)
        self._mine[rows] = torch.logaddexp(self._mine[rows], mine)
        best, ids = log_p.topk(min(BEST, codes.shape[1]), -1)
        return best, ids

    def columns(self) -> dict[str, Tensor]:
        """Columns of TokenRecords; of positions without a row they mean nothing.

        Raises KldError for rows that are no distributions.
        """
        held = torch.zeros(len(self._p), dtype=torch.bool)
        held[self._held] = True
        most = self._others * self._least.double().exp()  # the share of tokens without codes
        wrong = held & ((self._p > 1 + _SUM_ERROR) | (self._p + most < 1 - _SUM_ERROR))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise KldError(
                f"{self._file.path}: the probabilities of position {self._start + row} sum to "
                f"{float(self._p[row]):.4f}; the file is damaged"
            )
        rest = torch.minimum((1 - self._p).clamp_min(0), most)
        shares = self._p.clamp_min(1e-30)
        scaled = (1 - rest) / shares
        kl = scaled * self._gap
        kl += (1 - rest) * (scaled.clamp_min(1e-30).log() + self._model.log_sum)
        rest_q = (1 - (self._mine - self._model.log_sum).exp()).clamp_min(1e-9)
        kl += torch.where(rest > 0, rest * (rest.clamp_min(1e-30).log() - rest_q.log()), 0)
        top_p = self._best[:, 0].double().exp().clamp_max(1)
        return compared(self._model, self._ids, -self._target.double(), top_p, kl)
