"""The rounding that DeepSeek-V4's own inference applies to activations.

The model was trained with its activations passed through FP8 or FP4 and back ("fake
quantization": the result is an ordinary tensor whose values happen to be representable), so a
faithful reference pass must do the same.

* Inputs of the linear layers, in blocks of 128, and the cached latent without its rope part, in
  blocks of 64, go through E4M3 with a power-of-two scale: `amax` of the block, not less than 1e-4;
  `s = 2^ceil(log2(amax * f32(1/448)))`; `RNE(clamp(x / s, +-448)) * s`.
* Queries and keys of the indexer are first rotated by a Hadamard matrix, which spreads an outlier
  over all channels, then go through E2M1 in blocks of 32: `amax` not less than `6 * 2^-126`;
  `s = 2^ceil(log2(amax * f32(1/6)))`; `RNE(clamp(x / s, +-6)) * s`, ties to the even code.
* V4.1 does not rotate, takes blocks of 32 for E4M3 everywhere, and rounds compressed entries to
  E2M1 in groups of 16 with an E4M3 scale: `amax` not less than `6 * 2^-9`; `s = E4M3(amax / 6)`, to
  nearest, so a group's largest value may saturate; `RNE(clamp(x / s, +-6)) * s`.

The release multiplies by the rounded reciprocal; the weight formats (`mx`, `fp8_block`) compare
exactly. For 6 and for 448 both rules choose the same scale for every normal float32 amax: rounding
the product never reaches across a power of two. We compute what the release computes and test
that it is so. Scaling by a power of two rounds nothing, so the only rounding is the one to eight or
four bits, and for bfloat16 input the result is exact in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from v4quant_kernels.ref import e2m1, e4m3, e8m0

_AMAX_FLOOR_E4M3 = 1e-4
_AMAX_FLOOR_SCALED = e2m1.MAX * 2.0**-9
_AMAX_FLOOR_E2M1 = e2m1.MAX * 2.0**-126


def _float32(value: float) -> float:
    """The Python float nearest to `value` that float32 holds."""
    return torch.tensor(value, dtype=torch.float32).item()


_INVERSE_E4M3 = _float32(1 / e4m3.MAX)
_INVERSE_E2M1 = _float32(1 / e2m1.MAX)


def _fake_quant(
    x: Tensor, floor: float, inverse: float, round_values: Callable[[Tensor], Tensor]
) -> Tensor:
    """Round blocks (the whole last dimension of `x`, any leading shape), in float32."""
    # Two reductions are several times faster on a CPU than one of abs(x), or than aminmax.
    x = x.float()
    amax = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    amax.clamp_(min=floor)
    # Infinite or NaN blocks: any finite scale will do, the poison stays visible in the elements.
    exponent = e8m0.ceil_exponent(amax * inverse).clamp_(max=126)
    scaled = x * e8m0.power_of_two(-exponent)
    return round_values(scaled).mul_(e8m0.power_of_two(exponent))


def _by_blocks(x: Tensor, block: int, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `quantize` to consecutive blocks of the last dimension; the last may be shorter."""
    columns = x.shape[-1]
    whole = columns - columns % block
    if whole == columns:
        blocks = x.reshape(*x.shape[:-1], columns // block, block)
        return quantize(blocks).to(x.dtype).view(x.shape)
    tail = quantize(x[..., whole:]).to(x.dtype)
    if whole == 0:
        return tail
    return torch.cat((_by_blocks(x[..., :whole], block, quantize), tail), dim=-1)


def fake_quant_e4m3(x: Tensor, block: int) -> Tensor:
    """`x` (any floating dtype and leading shape) rounded to E4M3 per `block` columns.

    Same shape and dtype as `x`. A last block shorter than `block` has its own scale. NaN stays
    NaN and infinities stay infinite; their neighbours in the block mean nothing then.
    """
    return _by_blocks(
        x,
        block,
        lambda b: _fake_quant(
            b, _AMAX_FLOOR_E4M3, _INVERSE_E4M3, lambda v: e4m3.decode(e4m3.encode(v))
        ),
    )


def fake_quant_e2m1(x: Tensor, block: int = 32) -> Tensor:
    """`x` (any floating dtype and leading shape) rounded to E2M1 per `block` columns.

    Same conventions as `fake_quant_e4m3`.
    """
    return _by_blocks(
        x,
        block,
        lambda b: _fake_quant(b, _AMAX_FLOOR_E2M1, _INVERSE_E2M1, e2m1.round_values),
    )


def fake_quant_e2m1_e4m3(x: Tensor, group: int = 16) -> Tensor:
    """`x` (any floating dtype and leading shape) rounded to E2M1 under an E4M3 scale per `group`.

    Same conventions as `fake_quant_e4m3`. Groups whose largest magnitude is above 6 * 448 saturate.
    """
    return _by_blocks(x, group, _fake_quant_scaled)


def _fake_quant_scaled(x: Tensor) -> Tensor:
    """Round groups (the whole last dimension of `x`) to E2M1 under an E4M3 scale, in float32."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True).clamp_(min=_AMAX_FLOOR_SCALED)
    scale = e4m3.decode(e4m3.encode(amax / e2m1.MAX))
    return e2m1.round_values(x / scale).mul_(scale)


def hadamard(x: Tensor) -> Tensor:
    """`x @ H / sqrt(n)` over the last dimension `n` (a power of two), H in Sylvester order.

    `H[i, j] = (-1)^popcount(i & j)`, symmetric, so applying it twice gives `x` back. Computed in
    float32 by the fast Walsh-Hadamard transform (log2(n) butterflies), returned in `x.dtype`.
    """
    n = x.shape[-1]
    assert n > 0 and n & (n - 1) == 0, f"a Sylvester Hadamard matrix of size {n} does not exist"
    y = x.float()
    half = 1
    while half < n:
        first, second = y.reshape(-1, 2, half).unbind(1)
        y = torch.stack((first + second, first - second), dim=1)
        half *= 2
    return (y * (1 / math.sqrt(n))).to(x.dtype).view(x.shape)
