"""Candidate blocks: V4.1's later indexers choose only where an earlier one found something.

The candidate source scores every visible entry, as indexers do. Blocks of consecutive entries are
then ranked by their best score, the newest visible block first of all, and the best of them are
kept for each query. Index sources behind it score within these; its own choice is not bounded.
While all blocks fit, nothing is kept and nothing bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from v4quant_calibration.model.caches import SharedCaches
from v4quant_calibration.model.numerics import top_k_lowest_index
from v4quant_formats.model_config import LayerFacts, ModelConfig


@dataclass(frozen=True)
class Candidates:
    """What bounds the choice of a block of queries, or is to bound later ones.

    row: the first query's place among the tokens of all sequences.
    """

    facts: LayerFacts
    config: ModelConfig
    caches: SharedCaches
    row: int

    def restrict(self, scores: Tensor, seen: Tensor, what: str) -> Tensor:
        """Scores `[q, n]` with entries outside the candidate blocks at -inf.

        Of the candidate source they stay as they are, and its blocks are kept. seen: int64
        `[q, 1]`, entries a query sees; those it does not are at -inf already.
        """
        v41 = self.config.v41
        assert v41 is not None
        size, count = v41.candidate_block_size, v41.candidate_topk_blocks
        if -(-scores.shape[1] // size) <= count:
            return scores
        if self.facts.candidate_source == self.facts.number:
            self.caches.keep_blocks(self.row, best_blocks(scores, seen, size, count, what))
            return scores
        kept = self.caches.blocks(self.row, self.row + scores.shape[0])
        return scores.masked_fill(outside(kept, scores.shape[1], size), -torch.inf)


def best_blocks(scores: Tensor, seen: Tensor, size: int, count: int, what: str) -> Tensor:
    """The `count` best blocks of `size` entries by their largest score, the newest one among them.

    scores `[q, n]` of more than `count` blocks, -inf where an entry is not seen. int64
    `[q, count]`, ascending where present, -1 where a query sees fewer.
    """
    padded = pad(scores, (0, -scores.shape[1] % size), value=-torch.inf)
    best = padded.view(scores.shape[0], -1, size).amax(-1)
    newest = ((seen - 1) // size).clamp(min=0)
    pinned = best.gather(1, newest).masked_fill(seen > 0, torch.inf)
    best = best.scatter(1, newest, pinned)
    found = top_k_lowest_index(best, count, what)
    return found.masked_fill(best.gather(1, found) == -torch.inf, -1)


def outside(blocks: Tensor, entries: int, size: int) -> Tensor:
    """Bool `[q, entries]`: entries in none of a query's blocks, int64 `[q, count]`, -1 absent."""
    marks = torch.ones(
        blocks.shape[0], 1 + -(-entries // size), dtype=torch.bool, device=blocks.device
    )
    # Column 0 takes the marks of absent blocks (-1) and is cut off.
    marks.scatter_(1, blocks + 1, False)
    return marks[:, 1:].repeat_interleave(size, 1)[:, :entries]
