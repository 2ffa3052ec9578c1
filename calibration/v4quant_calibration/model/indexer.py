"""The indexer: which compressed entries a CSA query reads.

A small attention of its own scores every visible entry, score = sum_h w_h * relu(q_h . k), and the
`index_topk` best are kept. Queries come from the same low-rank query as attention's, keys from a
compressor of their own, head weights from the layer's input. The release rounds queries and keys to
FP4 after a Hadamard rotation; the rotation is orthonormal, so without the rounding it changes
nothing and is left out.

A query at position s sees s // 4-ish entries, so up to 4 * index_topk tokens everything is kept:
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

from v4quant_calibration.model.compressor import CompressorWeights, compress, load_compressor
from v4quant_calibration.model.numerics import (
    linear,
    product,
    quantized_input,
    require_finite,
    top_k_lowest_index,
)
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.rope import rotate_tail_
from v4quant_formats.model_config import CSA_RATIO, ModelConfig
from v4quant_kernels import dispatch
from v4quant_kernels.twins.activation import fake_quant_e2m1, hadamard
from v4quant_kernels.twins.indexer import pack_index_keys

KEY_BLOCK = 4096


@dataclass(frozen=True)
class IndexerWeights:
    """wq_b `[heads * D, q_lora_rank]`, weights_proj `[heads, hidden]`, the key compressor."""

    wq_b: Tensor
    weights_proj: Tensor
    compressor: CompressorWeights


def load_indexer(params: Params, prefix: str) -> IndexerWeights:
    """Read the indexer called `prefix`, e.g. "layers.2.attn.indexer"."""
    return IndexerWeights(
        params(f"{prefix}.wq_b"),
        params(f"{prefix}.weights_proj"),
        load_compressor(params, f"{prefix}.compressor"),
    )


def index_keys(
    x: Tensor,
    weights: IndexerWeights,
    table: Tensor,
    config: ModelConfig,
    options: ForwardOptions,
) -> Tensor:
    """Index keys of a sequence x `[S, hidden]`: float32 `[S // 4, index_head_dim]`, or rows of
    packed bytes for the kernel."""
    keys = compress(x, weights.compressor, CSA_RATIO, table, config)
    if uses_kernel(keys, options):
        return pack_index_keys(*dispatch.quantize_index_vectors(keys))
    return _rounded(keys, options)


def uses_kernel(x: Tensor, options: ForwardOptions) -> bool:
    """Whether the kernel that takes FP4 vectors does the work: where they are, on CUDA."""
    return options.official and x.is_cuda


def choose_entries(
    x: Tensor,
    low_rank: Tensor,
    first: int,
    keys: Tensor,
    weights: IndexerWeights,
    table: Tensor,
    config: ModelConfig,
    options: ForwardOptions,
    what: str,
) -> Tensor:
    """Entries chosen for queries first .. first + q - 1.

    x `[q, hidden]`, low_rank `[q, q_lora_rank]` and table `[q, rope_dim / 2]` belong to the
    queries; keys `[n, index_head_dim]` are the entries the last query sees, more than
    index_topk. int64 `[q, index_topk]`, ascending, -1 where a query sees fewer.
    """
    heads, dim = config.index_n_heads, config.index_head_dim
    queries = linear(quantized_input(low_rank, options), weights.wq_b, options)
    queries = rotate_tail_(queries.view(-1, heads, dim), table)
    head_weights = linear(x, weights.weights_proj, options) * (dim * heads) ** -0.5
    if keys.dtype == torch.uint8:
        return _choose_packed(queries, keys, head_weights, first, config.index_topk, what)
    queries = _rounded(queries, options)
    scores = torch.cat(
        [_scores(queries, part, head_weights, options) for part in torch.split(keys, KEY_BLOCK)],
        dim=-1,
    )
    positions = torch.arange(first, first + x.shape[0], device=x.device)
    seen = ((positions + 1) // CSA_RATIO).unsqueeze(-1)
    hidden = torch.arange(keys.shape[0], device=x.device) >= seen
    picks = top_k_lowest_index(scores.masked_fill_(hidden, -torch.inf), config.index_topk, what)
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


def _rounded(x: Tensor, options: ForwardOptions) -> Tensor:
    return fake_quant_e2m1(hadamard(x)) if options.official else x
