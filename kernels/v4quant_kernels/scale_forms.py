"""Scale forms: a row's scales in the form its kernel multiplies by, and back.

* `field`: the exponent field of the bfloat16 that turns a bit pattern into the scaled weight,
  `byte + bias - reference[row]`. The reference is 0 unless a row has huge scales.
* `ue5m3`: the E4M3 scale of NVFP4 renormalized (no subnormals), so that it becomes a bfloat16 by
  one shift and one addition. That addition turns the code of 0 into bfloat16's -0.
* `relative`: E8M0 bytes; the kernel takes `byte - reference[row]` as the exponent that an FP8
  number can absorb.
* `e8m0`, `bf16`: multipliers of a group's sum, as stored.

Kernels that decode to bfloat16 read scales in pieces of 32 bits, so a row is filled up to whole
pieces. Parts of 32 columns that hold two groups (NVFP4) have two pieces for four parts: the first
of the groups that come first, the second of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.scheme import Scheme

SCALE_CODES = ("field", "ue5m3", "relative", "e8m0", "bf16", "none")
FP8_EXPONENTS = (-5, 6)
"""What an E2M1 number in E4M3 can absorb without subnormals."""

BIAS = {"e2m1": 126, "e4m3": 120}
"""Exponents that a bare bit pattern lacks as a bfloat16."""

_LEAST_FIELD = {"e2m1": 121, "e4m3": 123}  # below it a product is not a bfloat16 subnormal any more
_UE5M3_ONE = 10  # exponent field of 1.0: E4M3's smallest number, 2^-9, has field 1
_UE5M3_ZERO = 0xA8  # (0xA8 << 4) + 0x7580 is 0x8000


def in_pieces(scale: Tensor, group: int) -> Tensor:
    """uint8 or bfloat16 `[R, groups]` filled up to whole pieces, two pieces' groups apart."""
    held = 8 if group == 16 else 4 // scale.element_size()
    scale = pad(scale, (0, -scale.shape[1] % held))
    if group != 16:
        return scale
    return scale.view(scale.shape[0], -1, 4, 2).transpose(2, 3).flatten(1)


def from_pieces(pieces: Tensor, group: int, groups: int) -> Tensor:
    """The inverse of `in_pieces`."""
    if group == 16:
        pieces = pieces.view(pieces.shape[0], -1, 2, 4).transpose(2, 3).flatten(1)
    return pieces[:, :groups]


def zero_groups(codes: Tensor, scheme: Scheme, groups: int) -> Tensor:
    """bool `[R, groups]`: whether all elements of a group are zero of either sign."""
    if groups == 0 or scheme.element == "int":
        return torch.zeros(codes.shape[0], groups, dtype=torch.bool, device=codes.device)
    magnitude = codes & ((1 << (scheme.bits - 1)) - 1)
    whole = pad(magnitude, (0, groups * scheme.group_size - codes.shape[1]))
    return (whole.view(codes.shape[0], groups, -1) == 0).all(-1)


def value_range(stored: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """(least, largest) E8M0 byte of each row among groups that are not zero; 127 if all are."""
    most = stored.masked_fill(zero, -1).amax(1)
    least = stored.masked_fill(zero, 256).amin(1)
    empty = most < 0
    return least.masked_fill(empty, 127), most.masked_fill(empty, 127)


def scale_form(
    stored: Tensor, zero: Tensor, scheme: Scheme, scale_code: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, reference int32 `[R]`, factor float32 `[R]`) of one expert."""
    reference = torch.zeros(stored.shape[0], dtype=torch.int32, device=stored.device)
    factor = torch.ones(stored.shape[0], dtype=torch.float32, device=stored.device)
    if scale_code == "field":
        bias = BIAS[scheme.element]
        reference = (stored.amax(1) + bias - 254).clamp(min=0)
        field = stored + bias - reference.unsqueeze(1)
        if bool(((field < _LEAST_FIELD[scheme.element]) & ~zero).any()):
            raise UnsupportedScheme(
                "the scales of one row are more than 2^130 apart, which no kernel multiplies "
                "exactly; use backend='torch'"
            )
        return field.to(torch.uint8), reference, _power_of_two(reference)
    if scale_code == "relative":
        reference = (value_range(stored, zero)[1] - FP8_EXPONENTS[1]).clamp(min=1)
        return stored.to(torch.uint8), reference, _power_of_two(reference - 127)
    if scale_code == "ue5m3":
        return to_ue5m3(stored), reference, factor * 2.0**8  # the kernel's multiplier is 2^-8 low
    if scale_code == "bf16":
        return stored, reference, factor * 2.0**6  # the kernel's integers are 2^-6 low
    return stored.to(torch.uint8), reference, factor


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32 2^exponent for -126..127."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def to_ue5m3(byte: Tensor) -> Tensor:
    """uint8 five exponent and three mantissa bits of non-negative E4M3 bytes."""
    field, mantissa = byte >> 3, byte & 7
    # A subnormal m * 2^-9 is (m / 2^p) * 2^(p-9), p the place of its leading one.
    place = (mantissa >= 2).int() + (mantissa >= 4).int()
    small = ((place + 1) << 3) | ((mantissa << (3 - place)) & 7)
    normal = ((field - 7 + _UE5M3_ONE) << 3) | mantissa
    small = small.masked_fill(mantissa == 0, _UE5M3_ZERO)
    return torch.where(field > 0, normal, small).to(torch.uint8)


def from_ue5m3(code: Tensor) -> Tensor:
    """int32 E4M3 bytes; the inverse of `to_ue5m3`."""
    field, mantissa = code.int() >> 3, code.int() & 7
    normal = ((field + 7 - _UE5M3_ONE) << 3) | mantissa
    small = (8 | mantissa) >> (4 - field).clamp(min=0)
    return torch.where(field > 3, normal, small).masked_fill(code == _UE5M3_ZERO, 0)
