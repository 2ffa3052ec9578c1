"""Casts from MXFP4 that keep every value: to MXFP8, NVFP4, FP8 tiles and INT8 groups.

An MXFP4 value is one of 8 magnitudes times 2^k (k from its group of 32). Whether another format
holds it depends only on how far the group's exponent lies from the exponent its new, coarser scale
is built on, so exactness is decided from the scales and the recoding is a table lookup per byte:

| target    | new scale                      | exact while a group lies at most ... below the top |
|-----------|--------------------------------|----------------------------------------------------|
| mxfp8     | the same 2^k                   | always                                             |
| nvfp4     | E4M3 2^(k-m), global 2^m       | 17 octaves (E4M3 holds 2^-9 to 2^8)                |
| fp8       | 2^(top-6) per 128x128 tile     | 14 octaves (6*64 = 384 <= 448; down to subnormals) |
| int8-gG   | 2^(top-4) per G columns        | 3 octaves (16*6 = 96 <= 127); so always for G = 32 |

"top" is the largest exponent among groups that hold a nonzero code: groups of zeros are exact under
any scale and must not push others out. A group further below the top may still be exact when its
codes happen to be coarse; the tables count the elements whose value really changes. Nearest values
(ties to even) are taken for those, and the count is part of the result: nothing clamps silently.
-0 stays -0 in the float formats; integers have no -0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from v4quant_kernels import native
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1, e4m3, e8m0
from v4quant_kernels.scheme import Scheme

GROUP = 32
_ROW_BYTES = 1 << 18  # bytes of codes recoded at a time, to stay within the cache
# Shifts at which the finest nonzero result has long become zero; deeper groups read the last row.
_DEEPEST = 24
_MAGNITUDES = 0x7777777777777777  # the magnitude bits of 16 packed codes
_E4M3_TOP_SHIFT = 6
_INT8_TOP_SHIFT = 4
_NVFP4_TOP = 8  # 2^8 is the largest power of two in E4M3
_NVFP4_BOTTOM = -9
NVFP4_SPAN = _NVFP4_TOP - _NVFP4_BOTTOM
"""Octaves between the largest and the smallest group scale that NVFP4 holds exactly."""
_SMALLEST_F32_EXPONENT = -126  # engines may flush float32 subnormals


@dataclass(frozen=True)
class CastResult:
    """A recoded matrix and the number of elements whose value changed (0: the cast is exact)."""

    tensor: QTensor
    altered: int


def can_cast(scheme: Scheme) -> bool:
    """Whether MXFP4 casts to `scheme` by recoding."""
    return scheme.name in ("mxfp4", "mxfp8", "nvfp4", "fp8") or (
        scheme.element == "int" and scheme.bits == 8
    )


def cast_mxfp4(q: QTensor, scheme: Scheme, nvfp4_top: int | None = None) -> CastResult:
    """Recode an MXFP4 matrix [N, K] in another scheme.

    nvfp4_top: for `nvfp4`, the top exponent the global scale is built on; fused pairs (w1, w3)
        pass the larger of their `top_exponent`s so that both get the same global scale.
    Raises UnsupportedScheme when `can_cast` says no, or K is no multiple of the target's group.
    """
    assert q.scheme.name == "mxfp4" and q.scale is not None
    if not can_cast(scheme):
        raise UnsupportedScheme(f"mxfp4 has no exact recoding to '{scheme.name}'")
    if scheme.name == "mxfp4":
        return CastResult(q, 0)
    if scheme.name == "mxfp8":
        shift = torch.zeros_like(e8m0.exponents(q.scale))
        codes, altered = _recode(q.codes, shift, "e4m3")
        scale = q.scale
        return CastResult(QTensor(scheme, q.shape, codes, scale), altered)
    if scheme.name == "nvfp4":
        return _to_nvfp4(q, scheme, nvfp4_top)
    if scheme.name == "fp8":
        return _to_fp8(q, scheme)
    return _to_int8(q, scheme)


def nonzero_exponents(q: QTensor) -> Tensor:
    """int32 [N, K/32] group exponents; groups without a nonzero code get the lowest value."""
    assert q.scale is not None
    words = q.codes.view(torch.int64) & _MAGNITUDES
    nonzero = (words != 0).view(*q.scale.shape, GROUP // 16).any(-1)
    return e8m0.exponents(q.scale).masked_fill_(~nonzero, e8m0.MIN_EXPONENT)


def top_exponent(q: QTensor) -> int:
    """The largest exponent of a group that holds a nonzero code.

    Looks at the codes of the groups with the largest scale only, unless they are all zeros.
    """
    assert q.scale is not None
    exponents = e8m0.exponents(q.scale).view(-1)
    largest = (exponents == exponents.max()).nonzero().squeeze(1)
    codes = q.codes.view(torch.int64).view(-1, GROUP // 16)
    if bool((codes[largest] & _MAGNITUDES).any()):
        return int(exponents[largest[0]])
    return int(nonzero_exponents(q).max())


def _to_nvfp4(q: QTensor, scheme: Scheme, top: int | None) -> CastResult:
    assert q.scale is not None
    if top is None:
        top = top_exponent(q)
    exponent = max(top - _NVFP4_TOP, _SMALLEST_F32_EXPONENT)
    wanted = e8m0.exponents(q.scale) - exponent
    # Zero groups may lie above the window; their scale does not matter.
    stored = wanted.clamp(_NVFP4_BOTTOM, _NVFP4_TOP)
    shift = torch.minimum(wanted - stored, torch.zeros_like(wanted))
    codes, altered = (q.codes, 0) if not bool(shift.any()) else _recode(q.codes, shift, "e2m1")
    scale = e8m0.power_of_two(stored).to(torch.float8_e4m3fn)
    scale = scale.view(torch.uint8).repeat_interleave(2, dim=1).view(torch.float8_e4m3fn)
    global_scale = torch.tensor(2.0**exponent, dtype=torch.float32, device=q.codes.device)
    return CastResult(QTensor(scheme, q.shape, codes, scale, global_scale), altered)


def _to_fp8(q: QTensor, scheme: Scheme) -> CastResult:
    rows = q.shape[0]
    height, width = scheme.block[0], scheme.block[1] // GROUP
    exponents = nonzero_exponents(q)
    groups = exponents.shape[1]
    padded = torch.nn.functional.pad(
        exponents, (0, -groups % width, 0, -rows % height), value=e8m0.MIN_EXPONENT
    )
    tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    base = (tiles.amax((1, 3)) - _E4M3_TOP_SHIFT).clamp_min_(_SMALLEST_F32_EXPONENT)
    spread = base.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :groups]
    shift = (exponents - spread).clamp_max_(_E4M3_TOP_SHIFT)
    codes, altered = _recode(q.codes, shift, "e4m3")
    return CastResult(QTensor(scheme, q.shape, codes, e8m0.encode_exponent(base)), altered)


def _to_int8(q: QTensor, scheme: Scheme) -> CastResult:
    per_scale = scheme.group_size // GROUP
    exponents = nonzero_exponents(q)
    rows, groups = exponents.shape
    if groups % per_scale:
        raise UnsupportedScheme(
            f"{q.shape[1]} columns are no multiple of group_size {scheme.group_size}; "
            "choose a smaller group"
        )
    top = exponents.view(rows, groups // per_scale, per_scale).amax(-1)
    shift = exponents - top.repeat_interleave(per_scale, 1)
    codes, altered = _recode(q.codes, shift, "int8")
    # 2^(top-4) reaches down to 2^-131, a bfloat16 subnormal and still exact.
    scale = e8m0.power_of_two_f64(top - _INT8_TOP_SHIFT)
    return CastResult(QTensor(scheme, q.shape, codes, scale.to(torch.bfloat16)), altered)


def _recode(codes: Tensor, shift: Tensor, target: str) -> tuple[Tensor, int]:
    """Recode every byte (two E2M1 codes) as value * 2^shift in the target element format.

    codes: uint8 [N, K/2]; shift: int32 [N, K/32]. Returns codes and the number of changed values.
    """
    table, changed = _tables(target)
    top = {"e4m3": _E4M3_TOP_SHIFT, "e2m1": 0, "int8": 0}[target]
    row = (top - shift).clamp_(0, _DEEPEST)
    out = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    if codes.is_cpu and native.available():
        from v4quant_kernels.native.recode import recode

        source, rows = codes.contiguous().numpy(), row.contiguous().numpy()
        altered = recode(source, rows, table.numpy(), changed.view(-1).numpy(), out.numpy())
    else:
        altered = _recode_torch(codes, row, table.to(codes.device), changed.to(codes.device), out)
    result = out.view(torch.uint8)
    return (result.view(torch.float8_e4m3fn) if target == "e4m3" else result), altered


def _recode_torch(codes: Tensor, row: Tensor, table: Tensor, changed: Tensor, out: Tensor) -> int:
    """The meaning of `native.recode.recode`."""
    altered, step = 0, max(1, _ROW_BYTES // max(codes.shape[1], 1))
    for start in range(0, codes.shape[0], step):
        part = codes[start : start + step]
        index = part.int().view(part.shape[0], -1, GROUP // 2)
        index = (index + row[start : start + step].unsqueeze(-1) * 256).view(-1)
        out[start : start + step] = table[index].view(part.shape)
        altered += int(changed.view(-1)[index].sum())
    return altered


@cache
def _tables(target: str) -> tuple[Tensor, Tensor]:
    """Byte tables [depth, 256]: recoded pair, and how many of the two values change.

    Row d recodes with shift `top - d`. Pairs of bytes are int16 with the even column first
    (little-endian in memory), pairs of nibbles uint8.
    """
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1.decode(codes).double()
    top = {"e4m3": _E4M3_TOP_SHIFT, "e2m1": 0, "int8": 0}[target]
    shifts = top - torch.arange(_DEEPEST + 1)
    wanted = values * e8m0.power_of_two_f64(shifts).unsqueeze(1)
    if target == "e4m3":
        single = e4m3.encode(wanted.float())
        got = e4m3.decode(single).double()
        single = single.view(torch.uint8)
    elif target == "e2m1":
        single = e2m1.encode(wanted.float())
        got = e2m1.decode(single).double()
    else:
        rounded = torch.round(wanted * 2.0**_INT8_TOP_SHIFT)
        got = rounded * 2.0**-_INT8_TOP_SHIFT
        single = (rounded + 128).to(torch.uint8)
    changed = (got != wanted).to(torch.uint8)
    byte = torch.arange(256)
    low, high = byte & 15, byte >> 4
    if target == "e2m1":
        table = single[:, low] | (single[:, high] << 4)
    else:
        pair = torch.stack((single[:, low], single[:, high]), -1).contiguous()
        table = pair.view(torch.int16).squeeze(-1)
    return table.contiguous().view(-1), changed[:, low] + changed[:, high]
