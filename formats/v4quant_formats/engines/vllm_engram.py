"""Where vLLM 0.33 keeps V4.1's Engram tables, and what they take there.

By default they lie in the host's pinned memory, cut by hash heads over the GPUs, and rows are read
from there. PyTorch's allocator rounds a pinned tensor up to a power of two: 202.8 GB of tables take
283.5 GB. Huge pages (`use_thp`) round nothing; `cpu_offload: false` puts each GPU's share on it.
Read from `models/deepseek_v41/common/engram.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from v4quant_formats.model_config import Dimensions

_SCALED = 32  # columns of a row that share a scale byte


@dataclass(frozen=True)
class TablePlace:
    """Bytes of all tables in the host's memory and on each GPU, and vLLM's option for it."""

    host: int
    card: int
    option: str


def table_places(config: Dimensions, gpus: int) -> list[TablePlace]:
    """The places, vLLM's default first; one that takes nothing where there are no tables."""
    shares = _shares(config, gpus)
    if not shares:
        return [TablePlace(0, 0, "")]
    bare = sum(codes + scales for share in shares for codes, scales in share)
    pinned = sum(_rounded(n) for share in shares for pair in share for n in pair)
    card = max(sum(codes + scales for codes, scales in share) for share in shares)
    return [
        TablePlace(pinned, 0, ""),
        TablePlace(bare, 0, '--engram-config {"use_thp": true}'),
        TablePlace(0, card, '--engram-config {"cpu_offload": false}'),
    ]


def _shares(config: Dimensions, gpus: int) -> list[list[tuple[int, int]]]:
    """For each GPU and table: bytes of codes and of scales."""
    if config.v41 is None or not config.v41.engram_tables:
        return []
    width, tables = config.v41.engram_head_dim, config.v41.engram_tables
    heads = -(-config.v41.engram_columns // gpus)
    rows = [
        [sum(t.primes[rank * heads : (rank + 1) * heads]) for t in tables] for rank in range(gpus)
    ]
    return [[(n * width, n * (width // _SCALED)) for n in own] for own in rows]


def _rounded(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
