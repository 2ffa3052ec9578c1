"""Attention of one layer: sliding window, compressed entries, sink, grouped output.

One latent head of `head_dim` values serves all query heads as key and as value. A query reads the
window's recent entries and, in layers with a ratio, entries that stand for that many tokens each:
all visible ones in HCA layers, an indexer's choice elsewhere. In V4.1 entries and choice may be
another layer's (`caches.py`). A block may overlap the window; its tokens are then seen twice, by
design. Each head has a learned sink, a score that takes part in the
softmax and carries no value; here it is a key of zeros whose score is replaced.

Memory is linear in the sequence: queries go in blocks of `query_chunk`, the whole path of a block
from low-rank query to output projection before the next, so that neither all queries nor all
scores exist at once. Keys of a block are the slice of the window it can reach and the compressed
entries it can see. When a CSA layer has very many of these, the chosen ones are gathered per query
instead; both ways give the same numbers up to float rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.caches import SharedCaches
from v4quant_calibration.model.candidates import Candidates
from v4quant_calibration.model.compressor import (
    CompressorWeights,
    entries_of,
    load_compressor,
    pool,
)
from v4quant_calibration.model.indexer import (
    IndexerWeights,
    choose_entries,
    index_keys,
    load_indexer,
)
from v4quant_calibration.model.numerics import (
    linear,
    product,
    quantized_input,
    rms_norm,
    round_compressed_,
    round_window_,
)
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.rope import rotate_tail_
from v4quant_calibration.model.streams import spans
from v4quant_formats.model_config import LayerFacts, ModelConfig

# Gathering costs a copy of every chosen entry for every query, so scoring this many times more
# entries than are chosen, densely, is still the cheaper way.
DENSE_FACTOR = 8


@dataclass(frozen=True)
class AttentionWeights:
    """Dense float32 weights of one layer's attention; compressor and indexer where it has them."""

    wq_a: Tensor
    q_norm: Tensor
    wq_b: Tensor
    wkv: Tensor
    kv_norm: Tensor
    wo_a: Tensor
    wo_b: Tensor
    sink: Tensor
    compressor: CompressorWeights | None
    indexer: IndexerWeights | None


@dataclass(frozen=True)
class AttentionLayer:
    """What all sequences of one layer share: facts, weights, rope table, and others' caches."""

    facts: LayerFacts
    weights: AttentionWeights
    table: Tensor
    config: ModelConfig
    options: ForwardOptions
    observer: Observer | None
    caches: SharedCaches | None = None


@dataclass(frozen=True)
class Entries:
    """KV of one sequence: window `[S, D]`, compressed `[S // ratio, D]`, index keys if needed.

    row: of its first token among the tokens of all sequences.
    """

    window: Tensor
    compressed: Tensor
    index_keys: Tensor | None
    row: int = 0


def load_attention(params: Params, facts: LayerFacts, use_indexer: bool) -> AttentionWeights:
    """Read the attention of a layer; the indexer only if asked for (long sequences need it)."""
    prefix = f"{facts.name}.attn"
    compressor = f"{prefix}.compressor"
    return AttentionWeights(
        wq_a=params(f"{prefix}.wq_a"),
        q_norm=params(f"{prefix}.q_norm"),
        wq_b=params(f"{prefix}.wq_b"),
        wkv=params(f"{prefix}.wkv"),
        kv_norm=params(f"{prefix}.kv_norm"),
        wo_a=params(f"{prefix}.wo_a"),
        wo_b=params(f"{prefix}.wo_b"),
        sink=params(f"{prefix}.attn_sink"),
        compressor=load_compressor(params, compressor, facts) if facts.makes_entries else None,
        indexer=load_indexer(params, f"{prefix}.indexer", facts)
        if use_indexer and facts.makes_choice
        else None,
    )


def indexer_matters(facts: LayerFacts, length: int, config: ModelConfig) -> bool:
    """Whether a sequence of `length` tokens has more compressed entries than an indexer keeps."""
    return facts.index_source is not None and length // facts.ratio > config.index_topk


class EntryBuilder:
    """Collects a sequence's KV entries from pieces of it, in order.

    A whole sequence's are needed before its first query is answered, since an entry may be read by
    any later one; they are a small part of the streams.
    """

    def __init__(self, layer: AttentionLayer, sequence: int, span: tuple[int, int]) -> None:
        """For the sequence of that number, whose tokens are rows span[0] .. span[1] - 1."""
        self._layer, self._sequence, self._row = layer, sequence, span[0]
        self._with_index = indexer_matters(layer.facts, span[1] - span[0], layer.config)
        self._window: list[Tensor] = []
        self._compressed: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._before: Tensor | None = None

    def add(self, x: Tensor, first: int) -> None:
        """Positions from `first` on: normalised inputs x `[n, hidden]`.

        All pieces but the last hold a multiple of 128 tokens.
        """
        layer, weights, facts = self._layer, self._layer.weights, self._layer.facts
        watch(layer, "wkv", quantized_input(x, layer.config, layer.options))
        self._window.append(window_entries(x, layer.table[first : first + x.shape[0]], layer))
        if weights.compressor is None:
            return
        # A CSA entry pools its own tokens and the block before them.
        lead = 0 if self._before is None else self._before.shape[0]
        whole = x if self._before is None else torch.cat([self._before, x])
        table = layer.table[first - lead :]
        latents = pool(whole, weights.compressor, facts, layer.config)
        if self._with_index and facts.makes_choice:
            assert weights.indexer is not None
            keys = index_keys(
                whole, latents, weights.indexer, table, facts, layer.config, layer.options
            )
            self._keys.append(keys[lead // facts.ratio :])
        found = entries_of(latents, table, facts.ratio)[lead // facts.ratio :]
        round_compressed_(found, layer.config, layer.options)
        self._compressed.append(found)
        self._before = x[-facts.ratio :].clone() if facts.overlaps else None

    def finish(self) -> Entries:
        """The entries of all pieces, kept for later layers; or those of an earlier one."""
        window, facts, caches = torch.cat(self._window), self._layer.facts, self._layer.caches
        if facts.kv_source is None or facts.makes_entries:
            compressed = torch.cat(self._compressed) if self._compressed else window[:0]
            keys = torch.cat(self._keys) if self._keys else None
            if caches is not None:
                caches.keep_entries(facts, self._sequence, compressed, keys)
            return Entries(window, compressed, keys, self._row)
        assert caches is not None, f"{facts.name} reads layer {facts.kv_source}'s entries"
        compressed = caches.entries(facts, self._sequence)
        wanted = self._with_index and facts.makes_choice
        keys = caches.keys(facts, self._sequence) if wanted else None
        return Entries(window, compressed, keys, self._row)


def window_entries(x: Tensor, table: Tensor, layer: AttentionLayer) -> Tensor:
    """Entries `[n, D]` of normalised inputs x `[n, hidden]`; table: the rope rows of each."""
    config, options = layer.config, layer.options
    entries = linear(quantized_input(x, config, options), layer.weights.wkv, options)
    entries = rms_norm(entries, layer.weights.kv_norm, config.rms_norm_eps)
    rotate_tail_(entries, table)
    round_window_(entries, config, options)
    return entries


def low_rank_queries(rounded: Tensor, layer: AttentionLayer) -> Tensor:
    """What queries are made of, `[n, q_lora_rank]`, from inputs as linears are given them."""
    low_rank = linear(rounded, layer.weights.wq_a, layer.options)
    return rms_norm(low_rank, layer.weights.q_norm, layer.config.rms_norm_eps)


def head_queries(low_rank: Tensor, table: Tensor, layer: AttentionLayer) -> Tensor:
    """Queries `[n, H, D]` of all heads; table: the rope rows of each."""
    config, options = layer.config, layer.options
    low_rank = quantized_input(low_rank, config, options)
    watch(layer, "wq_b", low_rank)
    queries = linear(low_rank, layer.weights.wq_b, options)
    queries = queries.view(-1, config.num_attention_heads, config.head_dim)
    if config.normalizes_heads:
        queries = rms_norm(queries, None, config.rms_norm_eps)
    return rotate_tail_(queries, table)


def attention(x: Tensor, first: int, entries: Entries, layer: AttentionLayer) -> Tensor:
    """Attention output of positions from `first` on: x normalised `[n, hidden]`, same out."""
    options = layer.options
    rounded = quantized_input(x, layer.config, options)
    output = torch.empty_like(x)
    for start, stop in spans(0, x.shape[0], options.query_chunk):
        low_rank = low_rank_queries(rounded[start:stop], layer)
        output[start:stop] = _query_block(x[start:stop], low_rank, first + start, entries, layer)
    return output


def _query_block(
    x: Tensor, low_rank: Tensor, first: int, entries: Entries, layer: AttentionLayer
) -> Tensor:
    """Queries first .. first + q - 1 from low-rank vector to output projection: `[q, hidden]`."""
    config, options = layer.config, layer.options
    last = first + x.shape[0]
    table = layer.table[first:last]
    queries = head_queries(low_rank, table, layer)
    start = max(0, first - config.sliding_window + 1)
    keys = [entries.window[start:last]]
    masks = [_window_mask(first, last, start, config.sliding_window, x.device)]
    gathered = None
    ratio = layer.facts.ratio
    seen = last // ratio if ratio else 0
    if seen:
        picks = _picks(x, low_rank, first, seen, entries, table, layer)
        if picks is not None and seen > DENSE_FACTOR * config.index_topk:
            gathered = (entries.compressed[picks.clamp(min=0)], picks >= 0)
        else:
            keys.append(entries.compressed[:seen])
            masks.append(_compressed_mask(first, last, seen, ratio, picks, x.device))
    output = attend(
        queries, torch.cat(keys), torch.cat(masks, -1), gathered, layer.weights.sink, options
    )
    return project(rotate_tail_(output, table.conj()), layer)


def _picks(
    x: Tensor,
    low_rank: Tensor,
    first: int,
    seen: int,
    entries: Entries,
    table: Tensor,
    layer: AttentionLayer,
) -> Tensor | None:
    """The choice for a block of queries, or None where all visible entries are read."""
    facts, config, caches = layer.facts, layer.config, layer.caches
    if facts.index_source is None or seen <= config.index_topk:
        return None
    row = entries.row + first
    if not facts.makes_choice:
        assert caches is not None, f"{facts.name} reads layer {facts.index_source}'s choice"
        return caches.choice(row, row + x.shape[0])
    assert layer.weights.indexer is not None and entries.index_keys is not None
    candidates = None
    if facts.candidate_source is not None:
        assert caches is not None, facts
        candidates = Candidates(facts, config, caches, row)
    picks = choose_entries(
        x,
        low_rank,
        first,
        entries.index_keys[:seen],
        layer.weights.indexer,
        table,
        facts,
        config,
        layer.options,
        candidates,
    )
    if caches is not None:
        caches.keep_choice(facts, row, picks)
    if layer.observer is not None:
        layer.observer.on_index(facts.name, picks)
    return picks


def _window_mask(first: int, last: int, start: int, window: int, device: torch.device) -> Tensor:
    """Bool `[q, keys]`: key t is read by query s when s - window < t <= s."""
    queries = torch.arange(first, last, device=device).unsqueeze(-1)
    keys = torch.arange(start, last, device=device)
    return (keys <= queries) & (keys > queries - window)


def _compressed_mask(
    first: int, last: int, seen: int, ratio: int, picks: Tensor | None, device: torch.device
) -> Tensor:
    """Bool `[q, seen]`: entry t is read by query s when its block is complete, and chosen."""
    if picks is None:
        queries = torch.arange(first, last, device=device).unsqueeze(-1)
        return torch.arange(seen, device=device) < (queries + 1) // ratio
    # Column 0 takes the marks of absent picks (-1) and is cut off.
    mask = torch.zeros(last - first, seen + 1, dtype=torch.bool, device=device)
    return mask.scatter_(1, picks + 1, True)[:, 1:]


def attend(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor,
    gathered: tuple[Tensor, Tensor] | None,
    sink: Tensor,
    options: ForwardOptions,
) -> Tensor:
    """Softmax attention with sink: `[q, H, D]`.

    queries `[q, H, D]`; keys `[n, D]` shared by the block under mask `[q, n]`; gathered: further
    keys of each query `[q, m, D]` and their mask `[q, m]`. Keys are values too.
    """
    count, heads, dim = queries.shape
    keys = torch.cat([torch.zeros_like(keys[:1]), keys])
    scaled = (queries * dim**-0.5).flatten(0, 1)
    scores = product(scaled, keys.mT, options.matmul_dtype).view(count, heads, -1)
    scores[..., 1:].masked_fill_(~mask.unsqueeze(1), -torch.inf)
    scores[..., 0] = sink
    if gathered is not None:
        entries, chosen = gathered
        further = product(scaled.view_as(queries), entries.mT, options.matmul_dtype)
        further.masked_fill_(~chosen.unsqueeze(1), -torch.inf)
        scores = torch.cat([scores, further], -1)
    shares = scores.softmax(-1)
    shared = shares[..., : keys.shape[0]]
    output = product(shared.flatten(0, 1), keys, options.matmul_dtype).view_as(queries)
    if gathered is not None:
        output += product(shares[..., keys.shape[0] :], gathered[0], options.matmul_dtype)
    return output


def project(output: Tensor, layer: AttentionLayer) -> Tensor:
    """Heads `[q, H, D]` to `[q, hidden]`: wo_a per group of heads, then wo_b over all groups."""
    config, options = layer.config, layer.options
    groups = config.o_groups
    grouped = output.view(output.shape[0], groups, -1).transpose(0, 1)
    first = layer.weights.wo_a.view(groups, config.o_lora_rank, -1)
    watch(layer, "wo_a", grouped)
    low_rank = product(grouped, first.mT, options.matmul_dtype).transpose(0, 1).flatten(1)
    low_rank = quantized_input(low_rank, config, options)
    watch(layer, "wo_b", low_rank)
    return linear(low_rank, layer.weights.wo_b, options)


def watch(layer: AttentionLayer, matrix: str, x: Tensor) -> None:
    """Show an observer the rows a matrix multiplies."""
    if layer.observer is not None:
        layer.observer.on_linear(f"{layer.facts.name}.attn.{matrix}", x)
