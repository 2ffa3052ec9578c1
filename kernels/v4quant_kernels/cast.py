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

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from v4quant_kernels import native
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1, e4m3, e8m0
from v4quant_kernels.ref import recode as by_table
from v4quant_kernels.ref.mx import GROUP
from v4quant_kernels.scheme import MXFP4, Element, ScaleFormat, Scheme

# Shifts at which the finest nonzero result has long become zero; deeper groups read the last row.
_DEEPEST = 24
_MAGNITUDES = 0x7777777777777777  # the magnitude bits of 16 packed codes
_E4M3_TOP_SHIFT = 6
_INT8_TOP_SHIFT = 4
_NVFP4_TOP = 8  # 2^8 is the largest power of two in E4M3
_NVFP4_BOTTOM = -9
_SMALLEST_F32_EXPONENT = -126  # engines may flush float32 subnormals


@dataclass(frozen=True)
class CastResult:
    """A recoded matrix and the number of elements whose value changed (0: the cast is exact)."""

    tensor: QTensor
    altered: int


def can_cast(scheme: Scheme) -> bool:
    """Whether MXFP4 casts to `scheme` by recoding."""
    # A row that is read with other scales (FP8 of tiles under float32) has no recoder.
    return scheme.mxfp4_octaves is not None and (scheme.element, scheme.scale) in _RECODERS


def cast_mxfp4(q: QTensor, scheme: Scheme, nvfp4_top: int | None = None) -> CastResult:
    """Recode an MXFP4 matrix [N, K] in another scheme.

    nvfp4_top: for `nvfp4`, the top exponent the global scale is built on; fused pairs (w1, w3)
        pass the larger of their `top_exponent`s so that both get the same global scale.
    Raises UnsupportedScheme when `can_cast` says no, or K is not a multiple of the target's group.
    """
    assert q.scheme == MXFP4 and q.scale is not None
    if not can_cast(scheme):
        raise UnsupportedScheme(f"mxfp4 has no exact recoding to '{scheme.name}'")
    return _RECODERS[scheme.element, scheme.scale](q, scheme, nvfp4_top)


def nonzero_exponents(q: QTensor) -> Tensor:
    """int32 [N, K/32] group exponents; groups without a nonzero code get the lowest value."""
    assert q.scale is not None
    words = q.codes.view(torch.int64) & _MAGNITUDES
    nonzero = (words != 0).view(*q.scale.shape, GROUP // 16).any(-1)
    return e8m0.exponents(q.scale).masked_fill_(~nonzero, e8m0.MIN_EXPONENT)


def top_exponent(q: QTensor) -> int:
    """The largest exponent of a group that holds a nonzero code.

    Looks at the codes of one group with the largest scale only, unless they are all zeros.
    """
    assert q.scale is not None
    scale = q.scale.view(torch.uint8).reshape(-1).cpu()
    largest = int(scale.numpy().argmax())  # torch's takes 30 times as long
    codes = q.codes.view(torch.int64).view(-1, GROUP // 16)
    if bool((codes[largest] & _MAGNITUDES).any()):
        return int(e8m0.exponents(scale[largest]))
    return int(nonzero_exponents(q).max())


def _to_itself(q: QTensor, scheme: Scheme, top: int | None) -> CastResult:
    del scheme, top
    return CastResult(q, 0)


def _to_nvfp4(q: QTensor, scheme: Scheme, top: int | None) -> CastResult:
    assert q.scale is not None
    if top is None:
        top = top_exponent(q)
    exponent = max(top - _NVFP4_TOP, _SMALLEST_F32_EXPONENT)
    rows, scales = _nvfp4_tables(exponent)
    byte = q.scale.view(torch.uint8)
    lowest = int(byte.min()) if byte.numel() else 255
    codes, altered = q.codes, 0
    if rows[lowest]:
        codes, altered = _recode(q.codes, _pick(rows, byte), "e2m1")
    scale = _pick(scales, byte).view(torch.float8_e4m3fn)
    global_scale = torch.tensor(2.0**exponent, dtype=torch.float32, device=q.codes.device)
    return CastResult(QTensor(scheme, q.shape, codes, scale, global_scale), altered)


@lru_cache(64)
def _nvfp4_tables(exponent: int) -> tuple[Tensor, Tensor]:
    """What becomes of each of the 256 bytes of a scale, where the second-level scale is 2^exponent:
    uint8 [256] binary places its codes move, int16 [256] its FP8 scale, twice.
    """
    wanted = torch.arange(256) - e8m0.BIAS - exponent
    # Zero groups may lie above the window; their scale does not matter.
    stored = wanted.clamp(_NVFP4_BOTTOM, _NVFP4_TOP)
    rows = (stored - wanted).clamp_(0, _DEEPEST).to(torch.uint8)
    scales = e8m0.power_of_two(stored).to(torch.float8_e4m3fn).view(torch.uint8)
    return rows, scales.short() * 257


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` for a small table, whatever the devices and the index's integer type."""
    picked = table.to(index.device).index_select(0, index.reshape(-1).int())
    return picked.view(index.shape)


def _to_e4m3(q: QTensor, scheme: Scheme, top: int | None) -> CastResult:
    del top
    assert q.scale is not None
    if scheme.block == (1, GROUP):  # MXFP8: the very scales that MXFP4 has
        row = torch.full_like(q.scale.view(torch.uint8), _E4M3_TOP_SHIFT)
        codes, altered = _recode(q.codes, row, "e4m3")
        return CastResult(QTensor(scheme, q.shape, codes, q.scale), altered)
    tile = (scheme.block[0], scheme.block[1] // GROUP)
    base, row = _block_depths(q, tile, _E4M3_TOP_SHIFT, _SMALLEST_F32_EXPONENT)
    codes, altered = _recode(q.codes, row, "e4m3")
    return CastResult(QTensor(scheme, q.shape, codes, e8m0.encode_exponent(base)), altered)


def _to_int8(q: QTensor, scheme: Scheme, top: int | None) -> CastResult:
    del top
    if q.shape[1] % scheme.group_size:
        raise UnsupportedScheme(
            f"{q.shape[1]} columns are not a multiple of group_size {scheme.group_size}; "
            "choose a smaller group"
        )
    lowest = e8m0.MIN_EXPONENT - _INT8_TOP_SHIFT
    base, row = _block_depths(q, (1, scheme.group_size // GROUP), _INT8_TOP_SHIFT, lowest)
    codes, altered = _recode(q.codes, row, "int8")
    # 2^(top-4) reaches down to 2^-131, a bfloat16 subnormal and still exact.
    powers = e8m0.power_of_two_f64(torch.arange(lowest, e8m0.MAX_EXPONENT + 1)).bfloat16()
    return CastResult(QTensor(scheme, q.shape, codes, _pick(powers, base - lowest)), altered)


_RECODERS: dict[tuple[Element, ScaleFormat], Callable[[QTensor, Scheme, int | None], CastResult]]
_RECODERS = {
    ("e2m1", "e8m0"): _to_itself,
    ("e4m3", "e8m0"): _to_e4m3,
    ("e2m1", "e4m3"): _to_nvfp4,
    ("int", "bf16"): _to_int8,
}


def _block_depths(
    q: QTensor, tile: tuple[int, int], top_shift: int, lowest: int
) -> tuple[Tensor, Tensor]:
    """Scale exponents of tiles of (rows, groups), and the table row of every group.

    int32 [tiles down, tiles across]: the top exponent less `top_shift`, at least `lowest`; uint8
    [N, K/32]: how far each group lies below the highest exponent that scale takes.
    """
    assert q.scale is not None
    rows, groups = q.scale.shape
    height, width = tile
    down, across = -(-rows // height), -(-groups // width)
    if q.codes.is_cpu and native.available():
        from v4quant_kernels.native.recode import block_depths

        base, row = torch.empty(down, across, dtype=torch.int32), q.scale.new_empty(q.scale.shape)
        row = row.view(torch.uint8)
        scale = q.scale.view(torch.uint8).contiguous()
        codes = q.codes.contiguous().numpy()
        block_depths(codes, scale.numpy(), tile, top_shift, lowest, base.numpy(), row.numpy())
        return base, row
    exponents = nonzero_exponents(q)
    padded = torch.nn.functional.pad(
        exponents, (0, -groups % width, 0, -rows % height), value=e8m0.MIN_EXPONENT
    )
    base = padded.view(down, height, across, width).amax((1, 3)).sub_(top_shift).clamp_min_(lowest)
    spread = base.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :groups]
    row = (spread + top_shift - e8m0.exponents(q.scale)).clamp_(0, _DEEPEST)
    return base, row.to(torch.uint8)


def _recode(codes: Tensor, row: Tensor, target: str) -> tuple[Tensor, int]:
    """Recode every byte (two E2M1 codes) by a row of the target's table.

    codes: uint8 [N, K/2]; row: uint8 [N, K/32]. Returns codes and the number of changed values.
    """
    table, changed = _tables(target)
    out = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    if codes.is_cpu and native.available():
        from v4quant_kernels.native.recode import recode

        source, rows = codes.contiguous().numpy(), row.contiguous().numpy()
        facts = (table.numpy(), changed.view(-1).numpy())
        altered = recode(source, rows, target, *facts, out.numpy())
    else:
        on = codes.device
        altered = by_table.recode(codes, row, table.to(on), changed.to(on), out)
    result = out.view(torch.uint8)
    return (result.view(torch.float8_e4m3fn) if target == "e4m3" else result), altered


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
