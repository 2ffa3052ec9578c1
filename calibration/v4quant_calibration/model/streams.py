"""Streams: what a model carries from layer to layer, and the only thing that grows with the text.

Between two layers a model is its residual streams, `hc_mult * hidden` numbers per token, in V4.1
with the `hc_mult` weights by which the next sublayer reads them ("pre"). The tokens
of all sequences lie end to end, so that a layer can take any range of them: attention goes sequence
by sequence, experts take as many tokens as memory allows. Where the rows live is not the layer's
business: here they live in memory, in `scratch.py` in files. A GPU gets the rows in work only: the
streams of all models and tokens are what would not fit there.

Rows are stored in the dtype they are computed in, so storing never changes a result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

PIECE = 1024


@dataclass(frozen=True)
class StreamShape:
    """What a layer's rows look like.

    lengths: tokens of each sequence. row: (hc_mult, hidden). dtype: of the arithmetic. device:
    where rows that are read appear. pre: how many reading weights a row carries, or none.
    """

    lengths: tuple[int, ...]
    row: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    pre: int = 0

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return sum(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows at rest."""
        return self.tokens * (self.row_bytes + self.pre_bytes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row at rest, reading weights apart."""
        return self.row[0] * self.row[1] * self.dtype.itemsize

    @property
    def pre_bytes(self) -> int:
        """Bytes of one row's reading weights."""
        return self.pre * self.dtype.itemsize


class Streams(ABC, Sequence[Tensor]):
    """The rows of all sequences of one model. Item i is sequence i, `[T_i, hc_mult, hidden]`."""

    def __init__(self, shape: StreamShape) -> None:
        """Rows are undefined until they are written."""
        self.shape = shape
        self._starts = (0, *accumulate(shape.lengths))

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 over all sequences; not to be changed in place."""

    @abstractmethod
    def write(self, start: int, rows: Tensor) -> None:
        """Replace the rows from `start` on."""

    @abstractmethod
    def read_pre(self, start: int, stop: int) -> Tensor:
        """Reading weights of rows start .. stop - 1, `[n, shape.pre]`."""

    @abstractmethod
    def write_pre(self, start: int, weights: Tensor) -> None:
        """Replace the reading weights from row `start` on."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each sequence."""
        return list(zip(self._starts, self._starts[1:], strict=False))

    def __len__(self) -> int:
        return len(self.shape.lengths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.read(*self.spans[index])

    def __iter__(self) -> Iterator[Tensor]:
        return (self.read(*span) for span in self.spans)


class MemoryStreams(Streams):
    """Rows in the host's memory."""

    def __init__(self, shape: StreamShape) -> None:
        """Allocate the rows."""
        super().__init__(shape)
        self._rows = torch.empty((shape.tokens, *shape.row), dtype=shape.dtype)
        self._pre = torch.empty((shape.tokens, shape.pre), dtype=shape.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        """A view of the rows; a copy where the arithmetic is on a GPU."""
        return self._rows[start:stop].to(self.shape.device)

    def write(self, start: int, rows: Tensor) -> None:
        """Copy rows in."""
        self._rows[start : start + rows.shape[0]] = rows

    def read_pre(self, start: int, stop: int) -> Tensor:
        """As `read`."""
        return self._pre[start:stop].to(self.shape.device)

    def write_pre(self, start: int, weights: Tensor) -> None:
        """As `write`."""
        self._pre[start : start + weights.shape[0]] = weights


def spans(start: int, stop: int, size: int | None) -> list[tuple[int, int]]:
    """Cut start .. stop - 1 into ranges of `size` (None: one)."""
    step = size or max(stop - start, 1)
    return [(first, min(first + step, stop)) for first in range(start, stop, step)]


def distance(a: Streams, b: Streams | None) -> float:
    """Frobenius norm of a - b over all rows, or of a, summed in float64."""
    total = 0.0
    for start, stop in spans(0, a.shape.tokens, PIECE):
        rows = a.read(start, stop)
        if b is not None:
            rows = rows - b.read(start, stop)
        total += float(rows.double().square_().sum())
    return float(total**0.5)
