"""Symmetric integers of 2, 3, 4 or 8 bits in groups with a bfloat16 scale.

A weight is `q * scale` with `q` in `[-2^(b-1), 2^(b-1) - 1]`; the bits cost `b + 16/g` a weight.
By default `scale = RNE-bf16(amax / (2^(b-1) - 1))`, which is symmetric and leaves the most negative
integer unused; a search that wants it (or wants to clip) passes its own scale. The integers are
`RNE(x / scale)` with the *rounded* scale, ties to even, clamped: the number the engine will
multiply with is the one we divide by.

Eight bits of integer times eight bits of scale: exact in float32, but in bfloat16 one rounding
more, for 4 bits in a third of the products. E2M1 is exact into INT5 and up with a power-of-two
scale (twice an E2M1 value is an integer up to 12), thus MXFP4 into INT8 groups of 32.

Engines divide by scales, cast them to float16 or flush subnormals, so a stored scale is always a
positive normal number: a group of zeros gets the scale 1, and others are held between 2^-126 and
the largest bfloat16. Quantizing again gives the same values.

The codes are one dense bit stream a row, see `pack`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref.blocks import absmax, grouped, require_positive
from v4quant_kernels.ref.pack import pack_bits, unpack_bits
from v4quant_kernels.scheme import Scheme

_LIMITS = torch.finfo(torch.bfloat16)


def storable_scale(scale: Tensor) -> Tensor:
    """bfloat16 of positive scales, to nearest, held in the range of normal finite numbers.

    Searches use it to try the scale that will really be stored. NaN stays NaN.
    """
    return scale.float().clamp(_LIMITS.tiny, _LIMITS.max).bfloat16()


def absmax_scale(amax: Tensor, bits: int) -> Tensor:
    """bfloat16 default scale of groups with largest magnitude `amax`; 1 for groups of zeros."""
    scale = storable_scale(amax.float() / ((1 << (bits - 1)) - 1))
    return scale.masked_fill_(amax == 0, 1.0)


def quantize(x: Tensor, scheme: Scheme, *, scale: Tensor | None = None) -> QTensor:
    """Code a finite matrix `[N, K]` (any floating dtype) as integer groups.

    `scale`, if given, is used instead of the rule above: `[N, K/g]`, any floating dtype, positive;
    it is rounded by `storable_scale`. Raises UnsupportedScheme for a shape the groups do not
    divide, NonFiniteWeight for a scale that is NaN, infinite or not positive.
    """
    groups = grouped(x, scheme)
    if scale is None:
        scale = absmax_scale(absmax(groups), scheme.bits)
    else:
        assert scale.shape == groups.shape[:2], (scale.shape, groups.shape)
        require_positive(scale, "an integer group's scale")
        scale = storable_scale(scale)
    limit = 1 << (scheme.bits - 1)
    integers = (groups / scale.float().unsqueeze(-1)).round_().clamp_(-limit, limit - 1)
    rows, columns = x.shape
    codes = pack_bits(integers.view(rows, columns).to(torch.int8), scheme.bits)
    return QTensor(scheme, (rows, columns), codes, scale)


def dequantize(q: QTensor) -> Tensor:
    """float32 `[N, K]`, exact."""
    assert q.scale is not None
    integers = unpack_bits(q.codes, q.scheme.bits, q.shape[1])
    groups = integers.float().view(*q.scale.shape, q.scheme.group_size)
    return groups.mul_(q.scale.float().unsqueeze(-1)).view(q.shape)


def rescale(q: QTensor, factor: Tensor) -> QTensor:
    """Scales of rows times `factor`, float64 `[N]`, to the nearest stored ones; codes stay."""
    assert q.scale is not None
    wanted = q.scale.double() * factor.to(q.scale.device).unsqueeze(1)
    scale = storable_scale(wanted.abs()).copysign(q.scale)
    return replace(q, scale=torch.where(wanted.abs() <= _LIMITS.max, scale, q.scale))
