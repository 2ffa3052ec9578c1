"""MXFP4 and MXFP8: E2M1 or E4M3 elements in groups of 32 with a power-of-two scale.

The OCP microscaling formats. MXFP4 is how DeepSeek-V4 ships its experts: 4 + 8/32 = 4.25 bits a
weight; MXFP8 costs 8.25. A weight is `element * 2^(byte - 127)`.

The scale is `2^ceil(log2(amax / 6))` (or `/ 448`): the smallest that saturates nothing. This is
the rule of the release, not the one in the OCP text (`2^(floor(log2(amax)) - 2)`), which clips
maxima between 6 and 8 times the scale. Elements round to nearest, ties to even.

Every MXFP4 value has two significant bits and every MXFP8 value four, so dequantizing is exact in
float32 and bfloat16 within their exponent range. The coding is idempotent in value, not in bytes:
a group whose largest element is 3 (or, for E4M3, at most 224) is written with half the scale and
doubled elements when quantized again, and means the same.
"""

from __future__ import annotations

from torch import Tensor

from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1, e4m3, e8m0
from v4quant_kernels.ref.blocks import absmax, grouped, power_of_two_exponent, require_positive
from v4quant_kernels.scheme import Scheme

GROUP = 32
"""Elements that share a scale."""


def quantize(x: Tensor, scheme: Scheme, *, scale: Tensor | None = None) -> QTensor:
    """Code a finite matrix `[N, K]` (any floating dtype) as MXFP4 or MXFP8.

    `scale`, if given, is used instead of the rule above: float8_e8m0fnu `[N, K/32]`; elements that
    do not fit it saturate. Raises UnsupportedScheme for a shape the groups do not divide,
    NonFiniteWeight for a NaN scale.
    """
    groups = grouped(x, scheme)
    if scale is None:
        maximum = e2m1.MAX if scheme.element == "e2m1" else e4m3.MAX
        scale = e8m0.encode_exponent(power_of_two_exponent(absmax(groups), maximum))
    else:
        assert scale.shape == groups.shape[:2], (scale.shape, groups.shape)
        require_positive(e8m0.decode(scale), "an E8M0 scale")
    # Multiplying by the reciprocal power of two is the division, exactly.
    elements = groups * e8m0.power_of_two(-e8m0.exponents(scale)).unsqueeze(-1)
    rows, columns = x.shape
    elements = elements.view(rows, columns)
    codes = e2m1.pack(e2m1.encode(elements)) if scheme.element == "e2m1" else e4m3.encode(elements)
    return QTensor(scheme, (rows, columns), codes, scale)


def dequantize(q: QTensor) -> Tensor:
    """float32 `[N, K]`, exact. A scale byte of 255 gives NaN."""
    assert q.scale is not None
    decoded = e2m1.decode_packed(q.codes) if q.scheme.element == "e2m1" else e4m3.decode(q.codes)
    groups = decoded.view(*q.scale.shape, q.scheme.group_size)
    return groups.mul_(e8m0.decode(q.scale).unsqueeze(-1)).view(q.shape)
