"""NVFP4: E2M1 elements in groups of 16 with an E4M3 scale, and one float32 scale for the matrix.

A weight is `element * scale * global_scale`; 4 + 8/16 = 4.5 bits each. The E4M3 scale has a
mantissa, so it follows the group's maximum to within 1/16 where MX may be off by almost 2, but it
has little range (2^-9 to 448): the global scale brings the matrix into it. We choose
`global_scale = amax(matrix) / (6 * 448)`, so that the largest group's scale is 448, and per group
`scale = RNE-E4M3(amax(group) / (6 * global_scale))`, elements `RNE-E2M1(x / (scale * global))`.

Our `global_scale` is a multiplier, as in ModelOpt's files; compressed-tensors stores its
reciprocal.

Ends. A group that is not all zero never gets the scale 0: it gets at least 2^-9, and keeps those
of its elements that are above a quarter of it. A group of zeros gets the scale 1. A matrix of zeros
gets the global scale 1, and no default global scale is below 2^-100, so that no product of the two
scales is a float32 subnormal.

`element * scale` has at most six significant bits: exact in bfloat16, and in float32; the product
with the global scale then rounds once in float32. Quantizing again with the same global scale gives
the same values wherever the group scale is normal (at least 2^-6): the largest element is then
always 6. (A default global scale computed afresh may differ in its last bit.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1, e4m3
from v4quant_kernels.ref.blocks import absmax, grouped, require_positive
from v4quant_kernels.scheme import Scheme

_SMALLEST_GLOBAL = 2.0**-100


def default_global_scale(amax: Tensor) -> Tensor:
    """float32 scalar multiplier of a matrix, or of several that must share one, from their `amax`.

    `amax` is a scalar tensor, the largest magnitude among them.
    """
    scale = (amax.float() / (e2m1.MAX * e4m3.MAX)).clamp(min=_SMALLEST_GLOBAL)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(
    x: Tensor,
    scheme: Scheme,
    *,
    global_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> QTensor:
    """Code a finite matrix `[N, K]` (any floating dtype) as NVFP4.

    `global_scale` (float32 scalar) and `scale` (float8_e4m3fn `[N, K/16]`), if given, are used
    instead of the rules above; what does not fit them saturates. Raises UnsupportedScheme for a
    shape the groups do not divide, NonFiniteWeight for a scale that is NaN, infinite or not
    positive.
    """
    groups = grouped(x, scheme)
    amax = absmax(groups)
    if global_scale is None:
        global_scale = default_global_scale(amax.amax())
    global_scale = global_scale.float().reshape(())
    require_positive(global_scale, "a global scale")
    if scale is None:
        wanted = (amax / (e2m1.MAX * global_scale)).clamp_(min=e4m3.SMALLEST)
        scale = e4m3.encode(wanted.masked_fill_(amax == 0, 1.0))
    assert scale.shape == amax.shape, (scale.shape, amax.shape)
    step = e4m3.decode(scale)
    require_positive(step, "an E4M3 scale")
    rows, columns = x.shape
    elements = (groups / step.mul_(global_scale).unsqueeze(-1)).view(rows, columns)
    return QTensor(scheme, (rows, columns), e2m1.pack(e2m1.encode(elements)), scale, global_scale)


def dequantize(q: QTensor) -> Tensor:
    """float32 `[N, K]`: `(element * scale) * global_scale`, where only the last product rounds."""
    assert q.scale is not None and q.global_scale is not None
    groups = e2m1.decode_packed(q.codes).view(*q.scale.shape, q.scheme.group_size)
    return groups.mul_(e4m3.decode(q.scale).unsqueeze(-1)).mul_(q.global_scale).view(q.shape)
