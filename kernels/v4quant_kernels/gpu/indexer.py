"""FP4 indexer scores in Triton; the twin of `ref.indexer`.

The scores of one token are one small GEMM, keys x heads, then a relu and a weighted sum over heads
in registers. An E2M1 number times a power of two is exact in bfloat16, so products are exact and
the tensor cores accumulate in float32. relu(x) is taken as (x + |x|) / 2 with the half inside the
head weight: one instruction less than a comparison, and a NaN stays visible.

Where the FP4 numbers are decoded depends on how often they are used:

* **prefill**: many tokens share the keys. Queries and keys are expanded to bfloat16 once
  (`expand_kernel`), and a program keeps a tile of keys and walks over BQ tokens.
* **decode** and **ragged batches**: one token a program, each with keys of its own (`first_key`),
  decoded on the way in, a word of eight at a time: a packed key is 17 words, the last its scales.
  Memory holds 68 bytes a key and nothing else is read.

A tile of keys that lies wholly beyond a token's end is not multiplied, only filled with -inf, so
the result is defined everywhere.

`index_top_k` never holds the scores of a long context: it scores tokens and keys in pieces of at
most WORKSPACE scores, takes each piece's exact top-k and merges (`topk.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.gpu.decode import cast_to_bf16, load_bf16, round_to_bf16
from v4quant_kernels.gpu.interpreter import compute_type
from v4quant_kernels.gpu.topk import indices_of, merge_words, top_k_words
from v4quant_kernels.gpu.words import index_vectors
from v4quant_kernels.ref.indexer import WORKSPACE, check_indexer_inputs, pieces, visible_keys

_PREFILL_TOKENS = 8
"""From so many tokens on one set of keys, expanding them once pays."""


@triton.jit
def load_vectors(words_ptr, scale_ptr, vector, inside, WORDS, SCALES, COMPUTE: tl.constexpr):
    """COMPUTE `[rows, 128]` of packed vectors; rows of codes and scales are so many words apart."""
    wide = vector.to(tl.int64)
    word = tl.arange(0, 16)
    pointers = words_ptr + wide[:, None] * WORDS + word[None, :]
    words = tl.load(pointers, mask=inside[:, None], other=0)
    scales = tl.load(scale_ptr + wide * SCALES, mask=inside, other=0)
    return index_vectors(words, scales, COMPUTE)


@triton.jit
def expand_kernel(
    words_ptr, scale_ptr, out_ptr, vectors, WORDS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """bfloat16 out[v, :128] of packed vectors. Grid: tiles of BLOCK vectors."""
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = vector < vectors
    values = load_vectors(words_ptr, scale_ptr, vector, inside, WORDS, SCALES, tl.float32)
    pointers = out_ptr + vector.to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(pointers, cast_to_bf16(values), mask=inside[:, None])


@triton.jit
def load_tile(words_ptr, scale_ptr, vector, inside, WORDS: tl.constexpr, SCALES: tl.constexpr,
              EXPANDED: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """COMPUTE `[rows, 128]` of the vectors numbered `vector`, expanded before or decoded now."""
    if EXPANDED:
        pointers = words_ptr + vector.to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
        tile = load_bf16(pointers, inside[:, None], COMPUTE)
    else:
        tile = load_vectors(words_ptr, scale_ptr, vector, inside, WORDS, SCALES, COMPUTE)
    return tile


@triton.jit
def indexer_kernel(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    head_weights_ptr,
    end_ptr,
    first_key_ptr,
    logits_ptr,
    tokens,
    heads,
    total_keys,
    columns,
    skipped,
    HEADS: tl.constexpr,
    BS: tl.constexpr,
    BQ: tl.constexpr,
    RAGGED: tl.constexpr,
    EXPANDED: tl.constexpr,
    ROUND_PRODUCTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """logits[t, c] of key skipped + c for BQ tokens and BS keys. Grid: (key tiles, token tiles)."""
    column = tl.program_id(0) * BS + tl.arange(0, BS)
    key = skipped + column
    exists = column < columns
    row = key
    if RAGGED:
        row = key + tl.load(first_key_ptr + tl.program_id(1))
    inside = exists & (row < total_keys)
    keys = load_tile(k_ptr, k_scale_ptr, row, inside, 17, 17, EXPANDED, COMPUTE)
    head = tl.arange(0, HEADS)
    for i in range(BQ):
        token = (tl.program_id(1) * BQ + i).to(tl.int64)
        if token < tokens:
            end = tl.load(end_ptr + token)
            score = tl.full((BS,), float("-inf"), dtype=tl.float32)
            if skipped + tl.program_id(0) * BS < end:
                vector = token * heads + head
                query = load_tile(
                    q_ptr, q_scale_ptr, vector, head < heads, 16, 1, EXPANDED, COMPUTE
                )
                weight = tl.load(head_weights_ptr + vector, mask=head < heads, other=0.0) * 0.5
                product = tl.dot(keys, tl.trans(query), input_precision="ieee")
                if ROUND_PRODUCTS:
                    product = round_to_bf16(product)
                twice = product + tl.abs(product)
                score = tl.sum(twice * weight[None, :], axis=1)
                score = tl.where(key < end, score, float("-inf"))
            tl.store(logits_ptr + token * columns + column, score, mask=exists)


def _expand(words: Tensor, scales: Tensor, apart: tuple[int, int]) -> Tensor:
    """bfloat16 `[n, 128]` of packed vectors whose codes and scales are so many words apart."""
    vectors = words.numel() // apart[0]
    out = torch.empty(vectors, 128, dtype=torch.bfloat16, device=words.device)
    expand_kernel[(triton.cdiv(vectors, 32),)](
        words, scales, out, vectors, WORDS=apart[0], SCALES=apart[1], BLOCK=32
    )
    return out


def indexer_logits(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    positions: Tensor | None = None,
    round_products: bool = False,
    *,
    first_key: Tensor | None = None,
    num_keys: int | None = None,
    skipped: int = 0,
    keys_per_tile: int | None = None,
    tokens_per_tile: int | None = None,
    compute: tl.dtype | None = None,
) -> Tensor:
    """`ref.indexer.indexer_logits` on a GPU, or on CPU tensors under TRITON_INTERPRET=1.

    The tile sizes and `compute` are for tests and tuning.
    """
    if positions is None:
        positions = torch.arange(q_codes.shape[0], device=q_codes.device)
    check_indexer_inputs(q_codes, q_scale, k_packed, head_weights, positions, first_key)
    tokens, heads, half = q_codes.shape
    if half != 64:
        raise V4QuantError(f"indexer kernels take vectors of 128 channels, not {2 * half}")
    total = k_packed.shape[0]
    columns = total - skipped if num_keys is None else num_keys
    logits = torch.empty(tokens, columns, dtype=torch.float32, device=q_codes.device)
    if logits.numel() == 0:
        return logits
    ragged = first_key is not None
    expanded = not ragged and tokens >= _PREFILL_TOKENS
    tile = tokens_per_tile or (_PREFILL_TOKENS if expanded else 1)
    assert tile == 1 or not ragged, "tokens of a ragged batch share no keys"
    width = keys_per_tile or (128 if expanded else 256)
    queries = q_codes.contiguous().view(torch.int32)
    q_scales = q_scale.view(torch.uint8).contiguous().view(torch.int32)
    keys = k_packed.contiguous().view(torch.int32)
    k_scales = keys[:, 16:]
    if expanded:
        queries, keys = _expand(queries, q_scales, (16, 1)), _expand(keys, k_scales, (17, 17))
    end = visible_keys(positions, total if not ragged else skipped + columns)
    indexer_kernel[(triton.cdiv(columns, width), triton.cdiv(tokens, tile))](
        queries, q_scales, keys, k_scales, head_weights.float().contiguous(), end,
        first_key.int().contiguous() if first_key is not None else end,
        logits, tokens, heads, total, columns, skipped,
        HEADS=max(16, triton.next_power_of_2(heads)), BS=width, BQ=tile,
        RAGGED=ragged, EXPANDED=expanded, ROUND_PRODUCTS=round_products,
        COMPUTE=compute or compute_type(), num_warps=8 if width > 128 else 4,
    )  # fmt: skip
    return logits


def index_top_k(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    k: int,
    positions: Tensor | None = None,
    round_products: bool = False,
    *,
    first_key: Tensor | None = None,
    num_keys: int | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """`ref.indexer.index_top_k` on a GPU, or on CPU tensors under TRITON_INTERPRET=1."""
    tokens = q_codes.shape[0]
    if positions is None:
        positions = torch.arange(tokens, device=q_codes.device)
    columns = k_packed.shape[0] if num_keys is None else num_keys
    rows = []
    token_pieces, key_pieces = pieces(tokens, columns, workspace)
    for t in token_pieces:
        found = []
        for s in key_pieces:
            logits = indexer_logits(
                q_codes[t], q_scale[t], k_packed, head_weights[t], positions[t], round_products,
                first_key=None if first_key is None else first_key[t],
                num_keys=s.stop - s.start, skipped=s.start,
            )  # fmt: skip
            found.append((top_k_words(logits, k), s.start))
        rows.append(indices_of(merge_words(found, k)))
    if not rows:
        return torch.empty(0, k, dtype=torch.int64, device=q_codes.device)
    return torch.nn.functional.pad(torch.cat(rows), (0, k - rows[0].shape[1]), value=-1)
