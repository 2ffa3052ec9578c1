"""How often a text looks up each row of V4.1's Engram tables.

Which rows a token reads follows from token ids alone, so they are counted without a forward pass.
A calibration text uses a small part of a table: only rows it uses are kept, with their counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.engram import hash_rows
from v4quant_calibration.model.params import TOKEN_MAP, Params
from v4quant_calibration.model.router import image_positions
from v4quant_formats.model_config import ModelConfig


@dataclass(frozen=True)
class RowUse:
    """Rows of a table that a text used, int64 [n] ascending, and how often, int64 [n]."""

    rows: Tensor
    counts: Tensor

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(rows counted from `start`, counts) of the rows from `start` to `stop` - 1."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        return self.rows[first:last] - start, self.counts[first:last]


def table_use(params: Params, config: ModelConfig, windows: Sequence[Tensor]) -> dict[str, RowUse]:
    """The use of every table, by its module, over windows of int64 token ids; empty for V4."""
    if config.v41 is None or not config.v41.engram_tables:
        return {}
    token_map = params(TOKEN_MAP).cpu()
    pad = int(token_map[config.v41.engram_pad_token_id])
    found = {}
    for facts in config.layers:
        if facts.engram is None:
            continue
        table = config.v41.engram_tables[facts.engram]
        parts = []
        for ids in windows:
            dead = image_positions(ids.cpu(), config)
            rows = hash_rows(ids.cpu(), (len(ids),), dead, table, token_map, pad)[~dead]
            parts.append(RowUse(*rows.flatten().unique(return_counts=True)))
        found[f"{facts.name}.engram.embed"] = merged_use(parts)
    return found


def merged_use(parts: Iterable[RowUse]) -> RowUse:
    """The use of a table by several texts together."""
    listed = list(parts)
    rows = torch.cat([part.rows for part in listed])
    counts = torch.cat([part.counts for part in listed])
    kinds, index = rows.unique(return_inverse=True)
    return RowUse(kinds, torch.zeros_like(kinds).index_add_(0, index, counts))
