"""Exact, stable top-k of float32 rows in Triton; the twin of `ref.indexer.top_k`.

Equal scores are common (the relu makes many exact zeros), so ties must be cut at an exact place:
value descending, then index ascending. Each value becomes a 32-bit *key* whose unsigned order is
the order of values (`ordered_key`); then one program a row

1. **selects**: a histogram of the keys' top 11 bits tells in which bin the k-th largest key lies.
   If that bin and all above it hold more than CAP keys, the next 11 bits of the bin's keys are
   counted, and then the last 10. Afterwards the bin is small enough, or it is a single key value.
2. **collects**: one pass writes what lies above the bin and the bin itself, in index order, as
   64-bit words: the complement of the key above, the index below. Of a single value with more
   copies than wanted it takes the first, which is the required order of ties.

The words, all different, are then sorted ascending by torch, and the first k are the answer. A row
is read two or three times. No tie is ever dropped for want of room, whatever their number. -inf
(not visible) is never taken, rows with fewer than k numbers are padded with -1, and NaN comes
first, as in torch's sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
HIDDEN_KEY = 0x007FFFFF
"""`ordered_key(-inf)`: keys up to here are not visible."""


@triton.jit
def ordered_key(x):
    """int64 key in 0..2^32-1 of float32 `x`; -0 equals 0, NaN is above everything."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)  # -0 is 0
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, bits)
    key = tl.where(bits < 0, ~bits, bits ^ -0x80000000)
    return key.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def load_keys(line, start, columns, BLOCK: tl.constexpr):
    """int64 keys of a row's columns from `start`; those beyond its end are hidden."""
    column = start + tl.arange(0, BLOCK)
    x = tl.load(line + column, mask=column < columns, other=float("-inf"))
    return ordered_key(x)


@triton.jit
def count_digits(
    line, columns, prefix, HIDDEN: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """int32 `[2^BITS]`: how many visible keys under `prefix` have each digit."""
    digits = tl.arange(0, 1 << BITS)
    counts = tl.zeros((1 << BITS,), dtype=tl.int32)
    start = 0
    while start < columns:
        key = load_keys(line, start, columns, BLOCK)
        alive = (key > HIDDEN) & ((key >> (SHIFT + BITS)) == prefix)
        digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        # The others are counted as digit 0, and taken off again.
        counts += tl.histogram(tl.where(alive, digit, 0), 1 << BITS)
        others = BLOCK - tl.sum(alive.to(tl.int32), axis=0)
        counts -= tl.where(digits == 0, others, 0)
        start += BLOCK
    return counts


@triton.jit
def choose_digit(counts, wanted, BITS: tl.constexpr):
    """(digit of the `wanted`-th largest key, keys above it, keys with it); digit 0 if too few."""
    digits = tl.arange(0, 1 << BITS)
    from_top = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    chosen = tl.max(tl.where(from_top >= wanted, digits, 0), axis=0)
    above = tl.sum(tl.where(digits > chosen, counts, 0), axis=0)
    equal = tl.sum(tl.where(digits == chosen, counts, 0), axis=0)
    return chosen, above, equal


@triton.jit
def collect_kernel(
    logits_ptr,
    words_ptr,
    row_stride,
    columns,
    k,
    CAP: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """words[row, :]: at most CAP (complemented key, index) of a row, among them its k largest.

    WorkFolders that are not needed keep what they hold. Grid: rows.
    """
    line = logits_ptr + tl.program_id(0).to(tl.int64) * row_stride
    zero = tl.program_id(0).to(tl.int64) * 0
    counts = count_digits(line, columns, zero, HIDDEN, 21, 11, BLOCK)
    chosen, above, equal = choose_digit(counts, k, 11)
    least = chosen.to(tl.int64) << 21  # keys from here on are collected
    total = above + equal
    quota = k * 0 + columns  # of keys equal to `least`, how many to take
    if total > CAP:
        prefix = least >> 21
        counts = count_digits(line, columns, prefix, HIDDEN, 10, 11, BLOCK)
        chosen, more, equal = choose_digit(counts, k - above, 11)
        above += more
        least = least | (chosen.to(tl.int64) << 10)
        total = above + equal
        if total > CAP:
            prefix = least >> 10
            last = count_digits(line, columns, prefix, HIDDEN, 0, 10, BLOCK)
            chosen, more, equal = choose_digit(last, k - above, 10)
            least = least | chosen.to(tl.int64)
            quota = k - above - more
    out = words_ptr + tl.program_id(0).to(tl.int64) * CAP
    written = k * 0
    equal_seen = k * 0
    start = 0
    while start < columns:
        key = load_keys(line, start, columns, BLOCK)
        visible = key > HIDDEN
        equal_here = (visible & (key == least)).to(tl.int32)
        rank = equal_seen + tl.cumsum(equal_here, axis=0)
        take = visible & ((key > least) | ((equal_here == 1) & (rank <= quota)))
        taken = take.to(tl.int32)
        place = written + tl.cumsum(taken, axis=0) - 1
        column = start + tl.arange(0, BLOCK)
        tl.store(out + place, ((0xFFFFFFFF - key) << 31) | column, mask=take)
        written += tl.sum(taken, axis=0)
        equal_seen += tl.sum(equal_here, axis=0)
        start += BLOCK


_EMPTY = 2**63 - 1


def top_k_words(logits: Tensor, k: int) -> Tensor:
    """int64 `[T, k]`, ascending: complemented key times 2^31 plus index; the largest int64 pads."""
    rows, columns = logits.shape
    cap = 2 * triton.next_power_of_2(max(k, 1))
    words = torch.full((rows, cap), _EMPTY, dtype=torch.int64, device=logits.device)
    if rows and columns and k:
        block = min(_BLOCK, max(16, triton.next_power_of_2(columns)))
        collect_kernel[(rows,)](
            logits, words, logits.stride(0), columns, k, CAP=cap, HIDDEN=HIDDEN_KEY, BLOCK=block
        )
    return words.sort(dim=-1).values[:, :k]


def merge_words(parts: list[tuple[Tensor, int]], k: int) -> Tensor:
    """The k best of word lists of column ranges that begin at the given indices."""
    shifted = [torch.where(words == _EMPTY, words, words + first) for words, first in parts]
    return torch.cat(shifted, dim=-1).sort(dim=-1).values[:, :k]


def indices_of(words: Tensor) -> Tensor:
    """int64 indices of top-k words, -1 for padding."""
    return torch.where(words == _EMPTY, -1, words & 0x7FFFFFFF)


def top_k(logits: Tensor, k: int) -> Tensor:
    """`ref.indexer.top_k` in Triton: float32 `[T, S]` to int64 `[T, k]`."""
    assert logits.dtype == torch.float32 and logits.ndim == 2 and logits.shape[1] < 2**31
    if logits.numel() and logits.stride(1) != 1:
        logits = logits.contiguous()
    return indices_of(top_k_words(logits, k))
