"""FP4 indexer scores and selection in Triton; the twin of `ref.indexer`.

What the machine's tensor cores multiply is an *operand* (`index_vectors.py`): bfloat16 on sm_80,
E4M3 on sm_89 and sm_90, the packed numbers themselves where block-scaled products exist (sm_100,
sm_120). Products are exact in all three. Sums are float32, but for FP8 tensor cores of sm_89 and
sm_90, which keep 13 bits behind the point of the largest product while they add; operand="bf16"
avoids that.

Where numbers are decoded depends on how often they are used. In a **prefill** many tokens share the
keys: queries and keys are expanded once, and `shared_kernel` keeps a tile of keys while tokens pass
by. A **decoding** token, or each token of a **ragged** batch with keys of its own (`first_key`),
meets its keys once: `own_kernel` decodes them on the way in.

`index_top_k` never holds the scores of a long context: it scores tokens and keys in pieces of at
most WORKSPACE scores, takes each piece's exact top-k and merges (`topk.py`). Keys are expanded once
for all pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.gpu.index_scores import own_kernel, shared_kernel
from v4quant_kernels.gpu.index_vectors import expand_keys, expand_queries
from v4quant_kernels.gpu.interpreter import compute_type
from v4quant_kernels.gpu.tiles import IndexTile, choose_index_tile
from v4quant_kernels.gpu.topk import indices_of, merge_words, top_k_words
from v4quant_kernels.twins.indexer import WORKSPACE, check_indexer_inputs, pieces, visible_keys

IndexOperand = Literal["bf16", "fp8", "native"]

_PREFILL_TOKENS = 8
"""From so many tokens on one set of keys, expanding them once pays."""


def index_operand(arch: int) -> IndexOperand:
    """What an architecture (90 for sm_90) multiplies."""
    return "bf16" if arch < 89 else "fp8" if arch < 100 else "native"


@dataclass(frozen=True)
class How:
    """What is multiplied, whether tokens share keys, and by which tiles."""

    operand: IndexOperand
    shared: bool
    tile: IndexTile
    compute: tl.dtype

    @property
    def tokens(self) -> int:
        """Tokens of a program."""
        return self.tile.tokens if self.shared else self.tile.step


@dataclass(frozen=True)
class Keys:
    """Packed keys int32 `[keys, 17]`, and their operands and factors if they are expanded."""

    packed: Tensor
    operands: Tensor
    factors: Tensor


def as_words(rows: Tensor) -> Tensor:
    """int32 words of bytes `[..., 4 n]`; a copy where these lie apart or begin inside a word."""
    rows = rows.view(torch.uint8).contiguous()
    return (rows.clone() if rows.storage_offset() % 4 else rows).view(torch.int32)


def prepare_keys(k_packed: Tensor, how: How) -> Keys:
    """Keys as the kernels read them; expanding them is worth it when many tokens share them."""
    packed = as_words(k_packed)
    if how.operand == "native":
        return Keys(packed, packed.view(torch.uint8), packed)
    if not how.shared or packed.shape[0] == 0:
        return Keys(packed, packed, packed)
    return Keys(packed, *expand_keys(packed, how.operand == "fp8", how.compute))


@dataclass(frozen=True)
class Queries:
    """Tokens' heads as kernels read them, filled up to whole tiles, and as they were given.

    operands: `[tokens * heads, ...]`, scales: int32 `[tokens * heads]`, factors: float32
    `[tokens * heads]`, `heads` being a power of two. raw: words int32 `[T, H, 16]`, scales int32
    `[T, H, 1]`, weights float32 `[T, H]`.
    """

    operands: Tensor
    scales: Tensor
    factors: Tensor
    heads: int
    raw: tuple[Tensor, Tensor, Tensor]


def prepare_queries(q_codes: Tensor, q_scale: Tensor, head_weights: Tensor, how: How) -> Queries:
    """Queries expanded, unless tensor cores take them as they are; tokens rounded up."""
    tokens, heads, _ = q_codes.shape
    words = as_words(q_codes)
    scales = as_words(q_scale)
    weights = head_weights.float().contiguous()
    raw = words, scales, weights
    padded = max(16, triton.next_power_of_2(heads))
    whole = triton.cdiv(tokens, how.tokens) * how.tokens
    if how.operand != "native":
        size = whole, padded
        operands, factors = expand_queries(*raw, size, how.operand == "fp8", how.compute)
        return Queries(operands, scales, factors, padded, raw)
    if (whole, padded) != (tokens, heads):
        spare = padded - heads, 0, whole - tokens
        words = pad(words, (0, 0, 0, *spare))
        scales = pad(scales, (0, 0, 0, *spare), value=0x7F7F7F7F)
        weights = pad(weights, (0, *spare))
    lines = words.view(torch.uint8).view(whole * padded, 64)
    return Queries(lines, scales.view(-1), weights.view(-1), padded, raw)


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
    arch: int = 90,
    operand: IndexOperand | None = None,
    tile: IndexTile | None = None,
    compute: tl.dtype | None = None,
) -> Tensor:
    """`ref.indexer.indexer_logits` on a GPU, or on CPU tensors under TRITON_INTERPRET=1.

    `arch` (90 for sm_90) chooses operand and tiles. `operand`, `tile` and `compute` are for tests
    and tuning.
    """
    if positions is None:
        positions = torch.arange(q_codes.shape[0], device=q_codes.device)
    check_indexer_inputs(q_codes, q_scale, k_packed, head_weights, positions, first_key)
    how = _how(arch, operand, tile, compute, q_codes, first_key)
    total = k_packed.shape[0]
    columns = total - skipped if num_keys is None else num_keys
    logits = torch.empty(q_codes.shape[0], columns, dtype=torch.float32, device=q_codes.device)
    if logits.numel() == 0:
        return logits
    queries = prepare_queries(q_codes, q_scale, head_weights, how)
    keys = prepare_keys(k_packed, how)
    end = visible_keys(positions, total if first_key is None else skipped + columns)
    return _scores(queries, keys, end, first_key, skipped, logits, round_products, how)


def _how(
    arch: int,
    operand: IndexOperand | None,
    tile: IndexTile | None,
    compute: tl.dtype | None,
    q_codes: Tensor,
    first_key: Tensor | None,
) -> How:
    if q_codes.shape[2] != 64:
        width = 2 * q_codes.shape[2]
        raise V4QuantError(f"indexer kernels take vectors of 128 channels, not {width}")
    shared = first_key is None and q_codes.shape[0] >= _PREFILL_TOKENS
    multiplied = operand or index_operand(arch)
    chosen = tile or choose_index_tile(arch, multiplied, shared)
    return How(multiplied, shared, chosen, compute or compute_type())


def _scores(
    queries: Queries,
    keys: Keys,
    end: Tensor,
    first_key: Tensor | None,
    skipped: int,
    logits: Tensor,
    round_products: bool,
    how: How,
) -> Tensor:
    """Fill `logits` with the scores of its columns, those of keys from `skipped` on."""
    (tokens, columns), tile = logits.shape, how.tile
    words, scales, weights = queries.raw
    native = how.operand == "native"
    shown = queries.operands, words, queries.scales.view(torch.uint8) if native else scales
    sizes = tokens, keys.packed.shape[0], columns, skipped
    end = pad(end, (0, -tokens % how.tokens))
    options = {
        "REAL": weights.shape[1], "HEADS": queries.heads, "BS": tile.keys, "STEP": tile.step,
        "STAGES": tile.stages, "OPERAND": how.operand, "ROUND_PRODUCTS": round_products,
        "COMPUTE": how.compute, "num_warps": tile.warps,
    }  # fmt: skip
    if how.shared:
        grid = triton.cdiv(columns, tile.keys) * triton.cdiv(tokens, tile.tokens)
        shared_kernel[(grid,)](
            *shown, queries.factors, weights, keys.operands, keys.packed, keys.factors, end,
            logits, *sizes, BQ=tile.tokens, **options,
        )  # fmt: skip
        return logits
    assert tile.step == 1 or first_key is None, "tokens of a ragged batch share no keys"
    grid = triton.cdiv(columns, tile.keys * tile.tiles) * triton.cdiv(tokens, tile.step)
    own_kernel[(grid,)](
        *shown, queries.factors, weights, keys.packed, keys.packed.view(torch.uint8), end,
        first_key.int().contiguous() if first_key is not None else end, logits,
        *sizes, TILES=tile.tiles, RAGGED=first_key is not None, **options,
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
    arch: int = 90,
    operand: IndexOperand | None = None,
    tile: IndexTile | None = None,
) -> Tensor:
    """`ref.indexer.index_top_k` on a GPU, or on CPU tensors under TRITON_INTERPRET=1.

    `arch`, `operand` and `tile` are those of `indexer_logits`.
    """
    tokens = q_codes.shape[0]
    if positions is None:
        positions = torch.arange(tokens, device=q_codes.device)
    check_indexer_inputs(q_codes, q_scale, k_packed, head_weights, positions, first_key)
    how = _how(arch, operand, tile, None, q_codes, first_key)
    total = k_packed.shape[0]
    columns = total if num_keys is None else num_keys
    keys = prepare_keys(k_packed, how)
    rows = []
    token_pieces, key_pieces = pieces(tokens, columns, workspace)
    for t in token_pieces:
        queries = prepare_queries(q_codes[t], q_scale[t], head_weights[t], how)
        found = []
        for s in key_pieces:
            shape = t.stop - t.start, s.stop - s.start
            logits = torch.empty(shape, dtype=torch.float32, device=q_codes.device)
            if logits.numel():
                end = visible_keys(positions[t], total if first_key is None else s.stop)
                own = None if first_key is None else first_key[t]
                _scores(queries, keys, end, own, s.start, logits, round_products, how)
            found.append((top_k_words(logits, k), s.start))
        rows.append(indices_of(merge_words(found, k)))
    if not rows:
        return torch.empty(0, k, dtype=torch.int64, device=q_codes.device)
    return pad(torch.cat(rows), (0, k - rows[0].shape[1]), value=-1)
