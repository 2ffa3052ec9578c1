"""Writes what `llama-perplexity --kl-divergence --kl-divergence-base FILE` compares a model with.

A row's codes need its largest, its smallest and the sum of its exponentials, so a block of rows is
gathered from its tiles before it is written: rows of a tile times the vocabulary in float32, which
`--max-memory` counts (memory.py). Arithmetic is float32 as llama.cpp's, so that codes are the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from v4quant.evaluation.kld_file import RANGE, KldError, KldShape
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.forward.logits import LogitTile
from v4quant_formats.shards import FilePlan, ShardWriter
from v4quant_formats.spec import TensorSpec

_LARGEST = 65535
_ROWS = 16
_SMALLEST = np.float32(1e-30)


class KldWriter:
    """Writes one model's logits as they are computed."""

    def __init__(
        self, path: Path, corpus: Corpus, vocab_size: int, place: Path | None = None
    ) -> None:
        """Plan the file `path`, written to `place` if given. Raises KldError unless all windows
        have one length of at least 3."""
        windows = corpus.windows
        lengths = sorted({len(w) for w in windows})
        if len(lengths) != 1 or lengths[0] < 3:
            raise KldError(
                f"{path}: a base file needs windows of one length of 3 tokens or more, these have "
                f"{lengths[0]} to {lengths[-1]}; drop the short ones"
            )
        self._shape = shape = KldShape(lengths[0], vocab_size, len(windows))
        text = torch.stack(windows).numpy().astype("<i4").tobytes()
        header = shape.header() + text
        size = (shape.n_chunk * shape.rows, shape.row_bytes)
        rows = TensorSpec("rows", "U8", size, offset=len(header))
        self._first = len(header)
        self._writer = ShardWriter(
            place or path, FilePlan(header, (rows,), shape.nbytes), nameless=True
        )
        self._block = torch.empty(0)

    def __call__(self, piece: LogitTile) -> None:
        """Take one tile; the scored model's logits stand at index 1 (0 when alone)."""
        scored = piece.logits[1] if len(piece.logits) > 1 else piece.logits[0]
        whole = scored.shape[1] == self._shape.n_vocab
        if whole:
            self._write(piece.start, scored.float().cpu())
            return
        if piece.first == 0:
            self._block = torch.empty(piece.stop - piece.start, self._shape.n_vocab)
        self._block[:, piece.first : piece.last] = scored
        if piece.last == self._shape.n_vocab:
            self._write(piece.start, self._block)
            self._block = torch.empty(0)

    def _write(self, start: int, logits: Tensor) -> None:
        """Write those of the rows [n, vocab] from position `start` on that the file holds."""
        places = [(i, self._shape.place(start + i)) for i in range(len(logits))]
        held = [(i, place) for i, place in places if place is not None]
        for begin in range(0, len(held), _ROWS):
            some = held[begin : begin + _ROWS]
            rows = encode_rows(logits[[i for i, _ in some]].numpy())
            for (_, place), row in zip(some, rows, strict=True):
                self._writer.add_piece("rows", place - self._first, torch.from_numpy(row))

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._writer.abort()


def encode_rows(
    logits: np.ndarray[tuple[int, int], np.dtype[np.float32]],
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Rows `[n, row bytes]` of logits `[n, vocab]`, finite."""
    count, vocab = logits.shape
    peak = logits.max(1, keepdims=True)
    least = np.maximum(logits.min(1, keepdims=True), peak - np.float32(RANGE))
    log_sum = np.log(np.exp(logits - peak).sum(1, keepdims=True, dtype=np.float64))
    scale = (peak - least) / np.float32(_LARGEST)
    scale[scale < _SMALLEST] = 0  # all logits are alike; one divided by less may be infinite
    inverse = np.divide(np.float32(1), scale, where=scale > 0, out=np.zeros_like(scale))
    codes = np.rint(inverse * (logits - least)).clip(0, _LARGEST)
    rows = np.zeros((count, 4 + 2 * ((vocab + 1) // 2)), dtype="<u2")
    start = np.concatenate([scale, least - peak - log_sum.astype(np.float32)], 1)
    rows[:, :4] = start.astype("<f4").view("<u2")
    rows[:, 4 : 4 + vocab] = codes
    return rows.view(np.uint8)
