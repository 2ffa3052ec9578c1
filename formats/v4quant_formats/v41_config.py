"""What only V4.1's config.json says: layers that own shared caches, and Engram's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from v4quant_formats.config_fields import (
    ConfigError,
    integer,
    is_integers,
    layer_ids,
    raise_first,
    short,
)
from v4quant_formats.engram import EngramTable, engram_tables

_MOST_COLUMNS = 4096
_MOST_ROWS = 2**40


@dataclass(frozen=True)
class V41:
    """What V4.1 adds: layers that own the shared caches, and Engram's n-gram tables.

    Behind layer `candidate_source_layer_id` (None: nowhere) index sources choose within its best
    `candidate_topk_blocks` blocks of `candidate_block_size` entries.
    """

    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    candidate_source_layer_id: int | None
    candidate_topk_blocks: int
    candidate_block_size: int
    engram_layer_ids: tuple[int, ...]
    engram_num_embeddings: tuple[int, ...]
    engram_head_dim: int
    engram_n_heads: int
    engram_max_ngram_size: int
    engram_vocab_size: int = field(compare=False)  # any number below the first prime means the same
    engram_pad_token_id: int
    engram_compressed_vocab_size: int

    @property
    def engram_columns(self) -> int:
        """Table rows looked up per token: n-gram sizes times heads."""
        return (self.engram_max_ngram_size - 1) * self.engram_n_heads

    @property
    def engram_tables(self) -> tuple[EngramTable, ...]:
        """Primes, offsets and multipliers of the Engram layers, in order."""
        return engram_tables(
            self.engram_layer_ids,
            self.engram_vocab_size,
            self.engram_n_heads,
            self.engram_max_ngram_size,
            self.engram_compressed_vocab_size,
        )


def parse_v41(text: dict[str, Any], layers: int, ratios: Sequence[int], where: str) -> V41:
    """V4.1's own fields of `text_config`. Raises ConfigError.

    layers: of the trunk; ratios: their compress_ratios, at least as many.
    """
    engram = layer_ids(text, "engram_layer_ids", layers, where)
    rows = text.get("engram_num_embeddings")
    if not is_integers(rows) or len(rows) != len(engram) or min(rows, default=1) < 1:
        raise ConfigError(f"{where}: 'engram_num_embeddings' must size each Engram layer's table")
    candidate = integer(text, "candidate_source_layer_id", where, minimum=-1)
    v41 = V41(
        kv_source_layer_ids=layer_ids(text, "kv_source_layer_ids", layers, where),
        index_source_layer_ids=layer_ids(text, "index_source_layer_ids", layers, where),
        candidate_source_layer_id=None if candidate < 0 else candidate,
        candidate_topk_blocks=integer(text, "candidate_topk_blocks", where),
        candidate_block_size=integer(text, "candidate_block_size", where),
        engram_layer_ids=engram,
        engram_num_embeddings=tuple(rows),
        engram_head_dim=integer(text, "engram_head_dim", where),
        engram_n_heads=integer(text, "engram_n_heads", where),
        engram_max_ngram_size=integer(text, "engram_max_ngram_size", where, minimum=2),
        engram_vocab_size=integer(text, "engram_vocab_size", where, minimum=2),
        engram_pad_token_id=integer(text, "engram_pad_token_id", where, minimum=0),
        engram_compressed_vocab_size=integer(text, "engram_compressed_vocab_size", where),
    )
    columns = v41.engram_columns * max(len(engram), 1)
    if columns > _MOST_COLUMNS:
        raise ConfigError(f"{where}: Engram would look up {columns:,} rows per token")
    if v41.engram_vocab_size > _MOST_ROWS:
        raise ConfigError(f"{where}: 'engram_vocab_size' is {short(v41.engram_vocab_size)}")
    _check_sources(v41, ratios[:layers], where)
    return v41


def _check_sources(v41: V41, ratios: Sequence[int], where: str) -> None:
    """Every layer with a ratio must find entries of that ratio, and a choice among them."""
    kv, index = v41.kv_source_layer_ids, v41.index_source_layer_ids
    owners, source = set(kv), None
    for layer, ratio in enumerate(ratios):
        source = layer if layer in owners else source
        if ratio and (source is None or ratios[source] != ratio):
            raise ConfigError(
                f"{where}: layer {layer} reads entries of {ratio} tokens, but kv_source_layer_ids "
                f"{list(kv)} names no layer that makes them for it"
            )
    without = sorted({s for s in kv if not ratios[s]} | {s for s in index if not ratios[s]})
    mute = sorted(set(kv) - set(index))
    candidate = v41.candidate_source_layer_id
    behind = [s for s in kv if candidate is not None and s > candidate]
    problems = [
        (bool(without), f"layers {without} are sources, but their compress_ratios are 0"),
        (bool(mute), f"KV sources {mute} are missing from index_source_layer_ids {list(index)}"),
        (
            candidate is not None and candidate not in index,
            f"candidate_source_layer_id {candidate} is not among index_source_layer_ids "
            f"{list(index)}",
        ),
        (
            bool(behind),
            f"KV sources {behind} lie behind the candidate source {candidate}, whose blocks count "
            "other entries",
        ),
    ]
    raise_first(problems, where)


def check_v41_forward(v41: V41, vocab_size: int, index_topk: int, where: str) -> None:
    """What the forward pass needs of V4.1's fields beyond their form. Raises ConfigError."""
    # With fewer, a query could not choose index_topk entries, and releases' code differs on what
    # becomes of the rest. The newest block may hold a single entry.
    entries = (v41.candidate_topk_blocks - 1) * v41.candidate_block_size + 1
    problems = [
        (
            v41.candidate_source_layer_id is not None and entries < index_topk,
            f"candidate blocks hold as few as {entries} entries, index_topk is {index_topk}",
        ),
        (
            v41.engram_pad_token_id >= vocab_size,
            f"engram_pad_token_id {v41.engram_pad_token_id} is outside the vocabulary",
        ),
    ]
    raise_first(problems, where)
    rows = tuple(table.rows for table in v41.engram_tables)
    if rows != v41.engram_num_embeddings:
        raise ConfigError(
            f"{where}: engram_num_embeddings is {list(v41.engram_num_embeddings)}, but the primes "
            f"that n-grams are hashed by add up to {list(rows)} rows; engram_vocab_size, "
            "engram_n_heads or engram_max_ngram_size is another model's"
        )
