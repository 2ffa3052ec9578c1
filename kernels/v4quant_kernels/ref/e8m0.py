"""E8M0: the power-of-two scale of the MX formats and of DeepSeek-V4 (`float8_e8m0fnu`, "ue8m0").

Eight exponent bits and nothing else: byte `b` is `2^(b-127)`, from 2^-127 (byte 0, a float32
subnormal) to 2^127 (byte 254). Byte 255 is NaN. There is no zero and no sign.

Multiplying by such a scale moves an exponent and rounds nothing, which is why every scale here is
found from exponent bits: no logarithm, no division, no error. `ceil(log2(x / m))` is the one
question the formats ask (with `m` the largest element value), and for normal float32 numbers it is
a subtraction of bit patterns: the patterns of `x` and `m` differ by `2^23 * (difference of
exponents)` plus the difference of mantissas, which is smaller than 2^23, so rounding the quotient
by 2^23 upwards answers it.

A byte is the exponent field of a float32, so decoding is a shift, except at its two ends. Casting
the byte as an integer is always wrong; so is exp2, which some devices approximate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels.errors import UnsupportedScheme

BIAS = 127
MIN_EXPONENT = -127
MAX_EXPONENT = 127

_MANTISSA = 0x7FFFFF
_HALF_OF_SMALLEST_NORMAL = 0x00400000  # 2^-127 in float32
_NAN_BITS = 0x7FC00000
_SMALLEST_NORMAL = 2.0**-126


def _bytes(scale: Tensor) -> Tensor:
    assert scale.dtype in (torch.uint8, torch.float8_e8m0fnu), scale.dtype
    return scale.view(torch.uint8)


def exponents(scale: Tensor) -> Tensor:
    """int32 exponents (byte - 127) of float8_e8m0fnu or uint8 scales. NaN reads as 128."""
    return _bytes(scale).int().sub_(BIAS)


def power_of_two(exponent: Tensor) -> Tensor:
    """float32 `2^exponent` for an integer tensor in -127..127, exact; 128 gives NaN."""
    bits = (exponent.int() + BIAS).bitwise_left_shift_(23)
    bits.masked_fill_(exponent == MIN_EXPONENT, _HALF_OF_SMALLEST_NORMAL)
    return bits.masked_fill_(exponent > MAX_EXPONENT, _NAN_BITS).view(torch.float32)


def power_of_two_f64(exponent: Tensor) -> Tensor:
    """float64 `2^exponent` for an integer tensor in -1022..1023, exact (torch.ldexp uses pow)."""
    return exponent.long().add_(1023).bitwise_left_shift_(52).view(torch.float64)


def decode(scale: Tensor) -> Tensor:
    """float32 values of float8_e8m0fnu or uint8 scales (any shape), exact; byte 255 is NaN."""
    return power_of_two(exponents(scale))


def encode_exponent(exponent: Tensor) -> Tensor:
    """float8_e8m0fnu scales `2^exponent` of an integer tensor (any shape).

    Raises UnsupportedScheme when an exponent is outside -127..127.
    """
    if exponent.numel():
        low, high = (int(bound) for bound in torch.aminmax(exponent))
        if low < MIN_EXPONENT or high > MAX_EXPONENT:
            raise UnsupportedScheme(
                f"E8M0 holds 2^-127 to 2^127, but the scales run from 2^{low} to 2^{high}; "
                "rescale the weight or choose a scheme with float32 scales"
            )
    return (exponent + BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def ceil_exponent(x: Tensor, divisor: float = 1.0) -> Tensor:
    """int32 `ceil(log2(x / divisor))`, exact, for finite `x` > 0 (subnormals too).

    `divisor` is a normal float32 number, such as 6 or 448. Where `x` is 0 the answer is some
    number below -149 - log2(divisor): the caller replaces or clamps it.
    """
    x = x.float()
    subnormal = x < _SMALLEST_NORMAL
    normal = torch.where(subnormal, x * 2.0**24, x).view(torch.int32)
    divisor_bits = int(torch.tensor(divisor, dtype=torch.float32).view(torch.int32))
    exponent = (normal - (divisor_bits - _MANTISSA)).bitwise_right_shift_(23)
    return exponent.sub_(subnormal.int().mul_(24))
