"""FP4 indexer scores in Triton; the twin of `ref.indexer.indexer_logits`.

One program takes BS keys and BQ consecutive tokens: it decodes its keys once and reuses them for
every token, since decoding keys again for each query is what makes a straightforward kernel slow.
An E2M1 number times a power of two is exact in bfloat16, so products are exact and the tensor cores
accumulate in float32. The scores of one token are one small GEMM, keys x heads, then a relu and a
weighted sum over heads in registers.

A tile of keys that lies wholly beyond a token's end is not multiplied, only filled with -inf, so
the result is defined everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4quant_kernels.gpu.decode import decode_e2m1, decode_e8m0, round_to_bf16
from v4quant_kernels.gpu.interpreter import compute_type
from v4quant_kernels.ref.indexer import check_indexer_inputs, visible_keys


@triton.jit
def load_vectors(code_line, scale_line, inside, D: tl.constexpr):
    """float32 `[rows, D]` of packed E2M1 rows starting at the pointers `code_line` `[rows]`."""
    ROWS: tl.constexpr = code_line.shape[0]
    byte = tl.arange(0, D // 2)[None, :]
    pair = tl.load(code_line[:, None] + byte, mask=inside[:, None], other=0).to(tl.int32)
    group = tl.arange(0, D // 32)[None, :]
    scale = tl.load(scale_line[:, None] + group, mask=inside[:, None], other=127).to(tl.int32)
    values = tl.reshape(decode_e2m1(tl.join(pair & 15, pair >> 4)), (ROWS, D // 32, 32))
    return tl.reshape(values * decode_e8m0(scale)[:, :, None], (ROWS, D))


@triton.jit
def indexer_kernel(
    q_codes_ptr,
    q_scale_ptr,
    k_ptr,
    head_weights_ptr,
    end_ptr,
    logits_ptr,
    tokens,
    heads,
    num_keys,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BS: tl.constexpr,
    BQ: tl.constexpr,
    ROUND_PRODUCTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """logits[t, s] for BQ tokens and BS keys. Grid: (key tiles, token tiles)."""
    ROW: tl.constexpr = D // 2 + D // 32
    key = tl.program_id(0) * BS + tl.arange(0, BS)
    exists = key < num_keys
    k_line = k_ptr + key.to(tl.int64) * ROW
    keys = load_vectors(k_line, k_line + D // 2, exists, D).to(COMPUTE)
    head = tl.arange(0, HEADS)
    for i in range(BQ):
        token = (tl.program_id(1) * BQ + i).to(tl.int64)
        if token < tokens:
            end = tl.load(end_ptr + token)
            score = tl.full((BS,), float("-inf"), dtype=tl.float32)
            if tl.program_id(0) * BS < end:
                vector = token * heads + head
                query = load_vectors(
                    q_codes_ptr + vector * (D // 2),
                    q_scale_ptr + vector * (D // 32),
                    head < heads,
                    D,
                ).to(COMPUTE)
                weight = tl.load(head_weights_ptr + vector, mask=head < heads, other=0.0)
                product = tl.dot(keys, tl.trans(query), input_precision="ieee")
                if ROUND_PRODUCTS:
                    product = round_to_bf16(product)
                # Not maximum(product, 0): that would hide a NaN.
                product = tl.where(product < 0.0, 0.0, product)
                score = tl.sum(product * weight[None, :], axis=1)
                score = tl.where(key < end, score, float("-inf"))
            tl.store(logits_ptr + token * num_keys + key, score, mask=exists)


def indexer_logits(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    positions: Tensor | None = None,
    round_products: bool = False,
    *,
    keys_per_tile: int = 128,
    tokens_per_tile: int = 8,
    compute: tl.dtype | None = None,
) -> Tensor:
    """`ref.indexer.indexer_logits` on a GPU, or on CPU tensors under TRITON_INTERPRET=1.

    The tile sizes and `compute` are for tests and tuning.
    """
    if positions is None:
        positions = torch.arange(q_codes.shape[0], device=q_codes.device)
    check_indexer_inputs(q_codes, q_scale, k_packed, head_weights, positions)
    tokens, heads, half = q_codes.shape
    num_keys = k_packed.shape[0]
    logits = torch.empty(tokens, num_keys, dtype=torch.float32, device=q_codes.device)
    if logits.numel() == 0:
        return logits
    grid = (triton.cdiv(num_keys, keys_per_tile), triton.cdiv(tokens, tokens_per_tile))
    indexer_kernel[grid](
        q_codes.contiguous(),
        q_scale.view(torch.uint8).contiguous(),
        k_packed.contiguous(),
        head_weights.float().contiguous(),
        visible_keys(positions, num_keys),
        logits,
        tokens,
        heads,
        num_keys,
        D=2 * half,
        HEADS=max(16, triton.next_power_of_2(heads)),
        BS=keys_per_tile,
        BQ=tokens_per_tile,
        ROUND_PRODUCTS=round_products,
        COMPUTE=compute or compute_type(),
    )
    return logits
