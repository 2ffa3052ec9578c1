"""Shared caches: what V4.1's source layers leave for the layers behind them.

Compressed entries and their index keys, an indexer's choice, and the blocks that bound later
choices. They are a small part of the streams and live where these do. Each kind has room for one
source, since a layer reads the last source before it; a run that is continued finds what the last
finished layers left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from v4quant_calibration.model.streams import Streams, StreamShape
from v4quant_formats.model_config import LayerFacts, ModelConfig

OpenRows = Callable[[str, StreamShape], Streams]
"""Room for rows of a kind; the same name is only asked for once."""


class SharedCaches:
    """The caches of one model, over all sequences."""

    def __init__(
        self, open_rows: OpenRows, shape: StreamShape, config: ModelConfig, keeps: bool = True
    ) -> None:
        """shape: of the model's streams. Without `keeps` nothing is written."""
        self._open_rows, self._shape, self._config = open_rows, shape, config
        self._rooms: dict[str, Streams] = {}
        self._keeps = keeps

    def reading(self) -> SharedCaches:
        """The same caches, which a run beside the model's own reads and leaves alone."""
        other = SharedCaches(self._open_rows, self._shape, self._config, keeps=False)
        other._rooms = self._rooms
        return other

    def keep_entries(
        self, facts: LayerFacts, sequence: int, entries: Tensor, keys: Tensor | None
    ) -> None:
        """A source's entries `[n, head_dim]` of a sequence, and keys where a choice needs them."""
        if not self._keeps or not facts.lends_entries:
            return
        room = self._entries(facts)
        room.write(room.spans[sequence][0], entries.unsqueeze(1))
        if keys is not None:
            room = self._keys(facts)
            room.write(room.spans[sequence][0], keys.unsqueeze(1))

    def entries(self, facts: LayerFacts, sequence: int) -> Tensor:
        """The entries `[n, head_dim]` a layer reads of its source."""
        return self._entries(facts)[sequence][:, 0]

    def keys(self, facts: LayerFacts, sequence: int) -> Tensor:
        """The index keys `[n, index_head_dim]` of those."""
        return self._keys(facts)[sequence][:, 0]

    def keep_choice(self, facts: LayerFacts, row: int, picks: Tensor) -> None:
        """A source's choice for queries from `row` on, int64 `[q, index_topk]`."""
        if self._keeps and facts.lends_choice:
            self._tokens("choice", picks.shape[1]).write(row, picks.int().unsqueeze(1))

    def choice(self, start: int, stop: int) -> Tensor:
        """The last choice kept for queries start .. stop - 1, int64 `[q, index_topk]`."""
        return self._tokens("choice", self._config.index_topk).read(start, stop)[:, 0].long()

    def keep_blocks(self, row: int, blocks: Tensor) -> None:
        """Candidate blocks of queries from `row` on, int64 `[q, count]`."""
        if self._keeps:
            self._tokens("blocks", blocks.shape[1]).write(row, blocks.int().unsqueeze(1))

    def blocks(self, start: int, stop: int) -> Tensor:
        """Candidate blocks of queries start .. stop - 1, int64 `[q, count]`."""
        assert self._config.v41 is not None
        count = self._config.v41.candidate_topk_blocks
        return self._tokens("blocks", count).read(start, stop)[:, 0].long()

    def _entries(self, facts: LayerFacts) -> Streams:
        return self._compressed("entries", facts.ratio, self._config.head_dim)

    def _keys(self, facts: LayerFacts) -> Streams:
        return self._compressed("keys", facts.ratio, self._config.index_head_dim)

    def _compressed(self, kind: str, ratio: int, width: int) -> Streams:
        lengths = tuple(length // ratio for length in self._shape.lengths)
        shape = replace(self._shape, lengths=lengths, row=(1, width), pre=0)
        return self._room(f"{kind}-{ratio}", shape)

    def _tokens(self, kind: str, width: int) -> Streams:
        return self._room(kind, replace(self._shape, row=(1, width), dtype=torch.int32, pre=0))

    def _room(self, name: str, shape: StreamShape) -> Streams:
        if name not in self._rooms:
            self._rooms[name] = self._open_rows(name, shape)
        return self._rooms[name]
