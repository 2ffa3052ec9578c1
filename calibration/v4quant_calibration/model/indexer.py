"""The indexer: which compressed entries a query reads.

A small attention of its own scores every visible entry, score = sum_h w_h * relu(q_h . k), and the
`index_topk` best are kept. Queries come from the same low-rank query as attention's, head weights
from the layer's input, and keys, in V4, from a compressor of their own; in V4.1 from the latents of
the entries themselves, before these are turned. The release rounds queries and keys to FP4, V4
after a Hadamard rotation; the rotation is orthonormal, so without the rounding it changes nothing
and is left out. In V4.1 a choice may be bounded by candidate blocks (`candidates.py`).

A query at position s sees s // ratio entries, so up to ratio * index_topk tokens all are kept:
nothing of the indexer, weights included, is touched for shorter sequences. Beyond that, scores
exist only for one block of queries at a time, and their per-head form only for one block of keys.
Equal scores (relu makes exact zeros) go to the earlier entry.

On CUDA, keys that are rounded to FP4 are also kept so, as packed rows, and the project's kernel
scores and selects: the same products, exact in float32, in another order of summing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.candidates import Candidates
from v4quant_calibration.model.compressor import (
    CompressorWeights,
    entries_of,
    load_compressor,
    pool,
)
from v4quant_calibration.model.numerics import (
    linear,
    product,
    quantized_input,
    require_finite,
    rms_norm,
    rounded_index,
    roundings,
    top_k_lowest_index,
)
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.rope import rotate_tail_
from v4quant_formats.model_config import LayerFacts, ModelConfig
from v4quant_kernels import dispatch
from v4quant_kernels.twins.indexer import pack_index_keys

KEY_BLOCK = 4096


@dataclass(frozen=True)
class KeyWeights:
    """V4.1's keys from latents: wk `[D, head_dim]`, norm `[D]`."""

    wk: Tensor
    norm: Tensor


@dataclass(frozen=True)
class IndexerWeights:
    """wq_b `[heads * D, q_lora_rank]`, weights_proj `[heads, hidden]`, and what makes the keys:
    V4's compressor, or V4.1's key weights in a layer that makes entries."""

    wq_b: Tensor
    weights_proj: Tensor
    compressor: CompressorWeights | None
    keys: KeyWeights | None


def load_indexer(params: Params, prefix: str, facts: LayerFacts) -> IndexerWeights:
    """Read the indexer called `prefix`, e.g. "layers.2.attn.indexer"."""
    wq_b, weights_proj = params(f"{prefix}.wq_b"), params(f"{prefix}.weights_proj")
    if facts.has_key_compressor:
        compressor = load_compressor(params, f"{prefix}.compressor", facts)
        return IndexerWeights(wq_b, weights_proj, compressor, None)
    if not facts.makes_entries:
        return IndexerWeights(wq_b, weights_proj, None, None)
    keys = KeyWeights(params(f"{prefix}.wk"), params(f"{prefix}.k_norm"))
    return IndexerWeights(wq_b, weights_proj, None, keys)


def index_keys(
    x: Tensor,
    latents: Tensor,
    weights: IndexerWeights,
    table: Tensor,
    facts: LayerFacts,
    config: ModelConfig,
    options: ForwardOptions,
) -> Tensor:
    """Index keys of a sequence: float32 `[S // ratio, index_head_dim]`, or rows of packed bytes for
    the kernel.

    x `[S, hidden]`: the layer's input; latents `[S // ratio, head_dim]`: its entries' latents.
    """
    if weights.compressor is not None:
        keys = pool(x, weights.compressor, facts, config)
    else:
        assert weights.keys is not None, facts
        keys = linear(latents, weights.keys.wk, options)
        keys = rms_norm(keys, weights.keys.norm, config.rms_norm_eps)
    keys = entries_of(keys, table, facts.ratio)
    if uses_kernel(keys, config, options):
        return pack_index_keys(*dispatch.quantize_index_vectors(keys))
    return rounded_index(keys, config, options)


def uses_kernel(x: Tensor, config: ModelConfig, options: ForwardOptions) -> bool:
    """Whether the kernel that rotates and takes FP4 vectors does the work: for V4, on CUDA."""
    fits = options.rounds_index and roundings(config).rotates_index
    return fits and dispatch.uses_triton(x, "auto")


def choose_entries(
    x: Tensor,
    low_rank: Tensor,
    first: int,
    keys: Tensor,
    weights: IndexerWeights,
    table: Tensor,
    facts: LayerFacts,
    config: ModelConfig,
    options: ForwardOptions,
    candidates: Candidates | None,
) -> Tensor:
    """Entries chosen for queries first .. first + q - 1, among candidates where there are such.

    x `[q, hidden]`, low_rank `[q, q_lora_rank]` and table `[q, rope_dim / 2]` belong to the
    queries; keys `[n, index_head_dim]` are the entries the last query sees, more than
    index_topk. int64 `[q, index_topk]`, ascending, -1 where a query sees fewer.
    """
    heads, dim, what = config.index_n_heads, config.index_head_dim, f"{facts.name}.attn.indexer"
    queries = linear(quantized_input(low_rank, config, options), weights.wq_b, options)
    queries = rotate_tail_(queries.view(-1, heads, dim), table)
    head_weights = linear(x, weights.weights_proj, options) * (dim * heads) ** -0.5
    if keys.dtype == torch.uint8:
        return _choose_packed(queries, keys, head_weights, first, config.index_topk, what)
    queries = rounded_index(queries, config, options)
    scores = torch.cat(
        [_scores(queries, part, head_weights, options) for part in torch.split(keys, KEY_BLOCK)],
        dim=-1,
    )
    positions = torch.arange(first, first + x.shape[0], device=x.device)
    seen = ((positions + 1) // facts.ratio).unsqueeze(-1)
    hidden = torch.arange(keys.shape[0], device=x.device) >= seen
    scores.masked_fill_(hidden, -torch.inf)
    if candidates is not None:
        scores = candidates.restrict(scores, seen, what)
    picks = top_k_lowest_index(scores, config.index_topk, what)
    return picks.masked_fill_(picks >= seen, -1)


def _choose_packed(
    queries: Tensor, keys: Tensor, head_weights: Tensor, first: int, top_k: int, what: str
) -> Tensor:
    """`choose_entries` by the kernel, keys packed."""
    require_finite(queries, what)  # FP4 has no NaN to tell it later
    require_finite(head_weights, what)
    codes, scale = dispatch.quantize_index_vectors(queries)
    positions = torch.arange(first, first + queries.shape[0], device=queries.device)
    picks = dispatch.index_top_k(codes, scale, keys, head_weights, top_k, positions)
    absent = keys.shape[0]
    ordered = picks.masked_fill(picks < 0, absent).sort(dim=-1).values
    return ordered.masked_fill_(ordered == absent, -1)


def _scores(queries: Tensor, keys: Tensor, head_weights: Tensor, options: ForwardOptions) -> Tensor:
    """sum_h w_h * relu(q_h . k): queries `[q, heads, D]`, keys `[n, D]` give `[q, n]`."""
    each = product(queries.flatten(0, 1), keys.mT, options.matmul_dtype).relu_()
    per_head = each.view(*queries.shape[:2], -1)
    return torch.bmm(head_weights.unsqueeze(1), per_head).squeeze(1)
