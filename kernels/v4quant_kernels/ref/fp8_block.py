"""Block FP8: E4M3 elements in square tiles (128x128) with a power-of-two scale.

How DeepSeek-V4 ships its dense matrices: 8.0005 bits per weight. The scale of a tile is
`2^ceil(log2(amax / 448))`, the smallest that saturates nothing, stored as E8M0, or, in the Base
releases and for some engines, as the same number in float32. Powers of two matter: some engines
quantize any other scale again. Elements round to nearest, ties to even.

Tiles at the right and lower edge may be ragged; they have a scale like any other, over the elements
they have. Dequantizing is exact in float32 and bfloat16 (four significant bits) within their
exponent range, provided the scale is a power of two. Quantizing again gives the same values, though
a tile whose largest element is at most 224 halves its scale.

The tile is read from `scheme.block`, so a release with 32x32 tiles is the same code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e4m3, e8m0
from v4quant_kernels.ref.blocks import absmax, power_of_two_exponent, require_positive
from v4quant_kernels.scheme import Scheme

# E4M3 runs from 2^-9 to 448, bfloat16 from 2^-126 to 2^127: these exponents keep well inside.
_WIDEST = (-110, 110)


def _tiled(x: Tensor, block: tuple[int, int]) -> Tensor:
    """`[R, rows, C, columns]` of `[N, K]`: a view, or a copy padded with zeros if ragged."""
    rows, columns = block
    missing = (0, -x.shape[1] % columns, 0, -x.shape[0] % rows)
    if any(missing):
        x = pad(x, missing)
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _untiled(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `_tiled`."""
    r, rows, c, columns = tiles.shape
    return tiles.view(r * rows, c * columns)[: shape[0], : shape[1]].contiguous()


def decode_scale(scale: Tensor) -> Tensor:
    """float32 multipliers of E8M0 (also as uint8) or float32 scales."""
    return scale if scale.dtype == torch.float32 else e8m0.decode(scale)


def quantize(
    x: Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype = torch.float8_e8m0fnu,
    scale: Tensor | None = None,
) -> QTensor:
    """Code a finite matrix `[N, K]` (any floating dtype) in E4M3 tiles.

    `scale_dtype` is float8_e8m0fnu or float32. `scale`, if given, is used instead of the rule
    above (either dtype, `[ceil(N/rows), ceil(K/columns)]`). Raises UnsupportedScheme when `x` is
    not a matrix, NonFiniteWeight for a scale that is NaN, infinite or not positive.
    """
    assert scale_dtype in (torch.float8_e8m0fnu, torch.float32), scale_dtype
    if x.ndim != 2:
        raise UnsupportedScheme(
            f"scheme '{scheme.name}' codes matrices, not the shape {list(x.shape)}"
        )
    tiles = _tiled(x.float(), scheme.block)
    if scale is None:
        exponent = power_of_two_exponent(absmax(tiles, (1, 3)), e4m3.MAX)
        multiplier = e8m0.power_of_two(exponent)
        e8m0_wanted = scale_dtype == torch.float8_e8m0fnu
        scale = e8m0.encode_exponent(exponent) if e8m0_wanted else multiplier
    else:
        assert scale.shape == (tiles.shape[0], tiles.shape[2]), (scale.shape, tiles.shape)
        multiplier = decode_scale(scale)
        require_positive(multiplier, "a tile's scale")
    codes = e4m3.encode(tiles / multiplier[:, None, :, None])
    shape = (x.shape[0], x.shape[1])
    return QTensor(scheme, shape, _untiled(codes, shape), scale)


def dequantize(q: QTensor) -> Tensor:
    """float32 `[N, K]`: element times its tile's scale (float8_e8m0fnu, uint8 or float32).

    Exact when the scale is a power of two. A scale byte of 255 gives NaN.
    """
    assert q.scale is not None
    tiles = _tiled(e4m3.decode(q.codes), q.scheme.block)
    multiplier = decode_scale(q.scale)
    return _untiled(tiles.mul_(multiplier[:, None, :, None]), q.shape)


def widens_exactly(scale: Tensor) -> bool:
    """Whether `widen` may be used: every E8M0 scale keeps E4M3 within bfloat16's normal numbers."""
    if scale.dtype == torch.float32 or not scale.numel():
        return False
    low, high = (int(bound) for bound in torch.aminmax(e8m0.exponents(scale)))
    return _WIDEST[0] <= low and high <= _WIDEST[1]
