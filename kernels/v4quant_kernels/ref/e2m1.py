"""E2M1: the four-bit float of MXFP4, NVFP4 and DeepSeek-V4's expert weights.

One sign bit, two exponent bits, one mantissa bit; no infinity, no NaN. A code `c` is a magnitude
index `c & 7` into 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign `c >> 3`, so code 8 is a true -0. Between
neighbouring magnitudes the step is 0.5 below 2, 1 below 4 and 2 up to 6; everything larger
saturates to 6.

Rounding is to nearest, and a tie goes to the even code: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2,
2.5 -> 2, 3.5 -> 4, 5 -> 4. We let the float32 adder do it. Adding `2^(e+22)` to a magnitude in
`[2^e, 2^(e+1))` leaves exactly one mantissa bit of it below the binary point of the sum, rounded by
the machine's own ties-to-even; the low bits of the sum are then the code, and its float value minus
the addend is the rounded number. `e` is floored at 0, which makes the subnormal 0.5 fall out of the
same formula.

Every value has two significant bits, so E2M1 is exact in E4M3, bfloat16, float16 and float32, and
twice a value is a small integer (0, 1, 2, 3, 4, 6, 8, 12). Two codes share a byte: the low nibble
is the even column, as in the DeepSeek release and in compressed-tensors (GGUF orders differently).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX = 6.0
"""The largest magnitude."""

VALUES = torch.tensor(
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
)
"""float32 `[16]`: the value of each code."""

_EXPONENT_BITS = 0x7F800000
_SLICE = 1 << 18  # elements whose temporaries fit a CPU's cache: six times faster than all at once
_ADDEND_SHIFT = 22 << 23  # times 2^22, as an increment of the float32 exponent field


def decode(codes: Tensor) -> Tensor:
    """Values (float32) of unpacked codes (uint8, 0..15, any shape)."""
    return VALUES.to(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def encode(x: Tensor) -> Tensor:
    """Codes (uint8, same shape) nearest to `x`: ties to the even code, saturating at +-6.

    The sign is kept, also that of zero and of values that round to zero. Infinity saturates; NaN
    has no code and must be refused before (see `codec`).
    """
    if x.device.type != "cpu" or x.numel() <= _SLICE:
        return _encode(x)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    flat, flat_codes = x.reshape(-1), codes.view(-1)
    for start in range(0, x.numel(), _SLICE):
        place = slice(start, start + _SLICE)
        flat_codes[place] = _encode(flat[place])
    return codes


def _encode(x: Tensor) -> Tensor:
    x = x.float()
    magnitude = x.abs().clamp_(max=MAX)
    binade = magnitude.clamp(min=1.0).view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    addend = binade + _ADDEND_SHIFT
    # In [2^e, 2^(e+1)) the sum's low bits count half binades: 2 or 3, or 4 when rounded up.
    halves = magnitude.add_(addend.view(torch.float32)).view(torch.int32).sub_(addend)
    codes = halves.add_(binade.bitwise_right_shift_(22)).sub_(2 * 127)
    sign = x.view(torch.int32).bitwise_right_shift(28).bitwise_and_(8)
    return codes.bitwise_or_(sign).to(torch.uint8)


def round_values(x: Tensor) -> Tensor:
    """`decode(encode(x))` as float32 without the codes; NaN stays NaN."""
    clamped = x.float().clamp(-MAX, MAX)
    binade = clamped.abs().clamp_(min=1.0).view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    addend = binade.add_(_ADDEND_SHIFT).view(torch.float32)
    return clamped.abs().add_(addend).sub_(addend).copysign_(clamped)


def pack(codes: Tensor) -> Tensor:
    """uint8 `[..., n]` codes -> uint8 `[..., n/2]` bytes, low nibble = even column; n even."""
    assert codes.shape[-1] % 2 == 0, "two codes share a byte"
    return (codes[..., 1::2] << 4).bitwise_or_(codes[..., 0::2])


def unpack(packed: Tensor) -> Tensor:
    """uint8 `[..., n]` bytes -> uint8 `[..., 2n]` codes; the inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@cache
def _pair_table(device: torch.device) -> Tensor:
    """int64 `[256]`: the two float32 values of each byte, side by side, to be moved as one."""
    values = decode(unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(-1)))
    return values.view(torch.int64).view(256).to(device)


def decode_packed(packed: Tensor) -> Tensor:
    """float32 `[..., 2n]` values of uint8 `[..., n]` bytes, by one gather from a table of pairs."""
    pairs = _pair_table(packed.device).index_select(0, packed.reshape(-1).int())
    return pairs.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])
