"""A second decoder, for proof: numpy tables from the format definitions, no code shared with the
converter.

What the converter calls exact is only worth saying when something else agrees. This decoder is
written from the definitions (OCP MX v1.0 for E2M1/E8M0, IEEE-like E4M3 of arXiv 2209.05433, the
bit stream of compressed-tensors' pack-quantized), works in float64, and looks at raw bytes only.
A stored value is the float32 number nearest to the product of its parts, as engines compute it:
elements and scales have few bits, so the product in float64 is exact and rounded once.
GGUF's block types are decoded by the gguf package, but for MXFP4, where that package has no -0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from v4quant.checks.independent_packs import decode_pack
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.integer_packs import IntegerPack
from v4quant_formats.spec import TensorSpec
from v4quant_formats.weights import StoredWeight
from v4quant_kernels.ggml_types import block_type

Array = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

_SCALE_PARTS = ("weight_scale", "scale", "weight_scale_inv")
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _e4m3_table() -> Array:
    table = np.empty(256)
    for code in range(256):
        sign = -1.0 if code & 128 else 1.0
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            table[code] = np.nan
        elif exponent == 0:
            table[code] = sign * mantissa * 2.0**-9
        else:
            table[code] = sign * (8 + mantissa) * 2.0 ** (exponent - 10)
    return table


_E4M3 = _e4m3_table()


def decode_rows(checkpoint: Checkpoint, stored: StoredWeight, start: int, stop: int) -> Array:
    """Rows `start:stop` of a stored matrix in float64. `start` is a multiple of 128."""
    parts = stored.parts
    if stored.base is not None:
        assert checkpoint.deltas is not None
        delta: Array = checkpoint.deltas.delta(stored.module, slice(start, stop)).numpy()
        return _float32(decode_rows(checkpoint, stored.base, start, stop) + delta)
    if stored.pack is not None:
        return _decode_pack(checkpoint, stored, stored.pack)[start:stop]
    weight = parts.get("weight_packed") or parts.get("weight") or next(iter(parts.values()))
    raw = _rows(checkpoint, weight, start, stop)
    if block_type(weight.dtype):
        return _blocks(raw, weight.dtype)
    scale_spec = next((parts[p] for p in _SCALE_PARTS if p in parts), None)
    if scale_spec is None:
        return _floats(raw, weight.dtype)
    count = stop - start
    per_row = scale_spec.shape[0] == weight.shape[0]
    height = 1 if per_row else _block_height(weight.shape[0], scale_spec.shape[0])
    span = (start, stop) if per_row else (start // height, -(-stop // height))
    scales = _floats(_rows(checkpoint, scale_spec, *span), scale_spec.dtype)
    if stored.scheme is not None and stored.scheme.is_packed_integer:
        columns = stored.shape[1]
        if "weight_shape" in parts:
            columns = int(checkpoint.read(parts["weight_shape"].name)[1])
        values = _packed_integers(raw, columns)
    else:
        values = _elements(raw, weight)
    width = _block_width(values.shape[1], scales.shape[1], per_row)
    wide = np.repeat(np.repeat(scales, height, axis=0)[:count], width, axis=1)
    values = _float32(values * wide[:, : values.shape[1]])
    if "weight_scale_2" in parts:
        values *= float(checkpoint.read(parts["weight_scale_2"].name))
    if "weight_global_scale" in parts:
        # A divisor, of which engines keep the reciprocal in float32.
        divisor = np.float32(float(checkpoint.read(parts["weight_global_scale"].name)))
        values *= float(np.float32(1) / divisor)
    return _float32(values)


def _float32(values: Array) -> Array:
    return values.astype(np.float32).astype(np.float64)


def _decode_pack(checkpoint: Checkpoint, stored: StoredWeight, pack: IntegerPack) -> Array:
    def raw(spec: TensorSpec) -> Bytes:
        return _rows(checkpoint, spec, 0, spec.shape[0])

    def floats(part: str) -> Array:
        return _floats(raw(stored.parts[part]), stored.parts[part].dtype)

    held = {part: raw(spec) for part, spec in stored.parts.items()}
    return _float32(decode_pack(pack, held, floats))


def _block_height(rows: int, blocks: int) -> int:
    return 128 if -(-rows // 128) == blocks else 32


def _block_width(columns: int, blocks: int, per_row: bool) -> int:
    if per_row:
        return columns // blocks
    return 128 if -(-columns // 128) == blocks else 32


def _elements(raw: Bytes, weight: TensorSpec) -> Array:
    if weight.dtype == "F8_E4M3":
        return _E4M3[raw]
    pairs = np.stack((raw & 15, raw >> 4), axis=-1).reshape(raw.shape[0], -1)
    return _E2M1[pairs]


def _blocks(raw: Bytes, dtype: str) -> Array:
    """GGUF's blocks. MXFP4: scale byte, then element j below element j + 16, sixteen times."""
    if dtype == "Q2_0":  # a half-precision step, then four weights a byte, -1 to 2, lowest first
        steps = raw.reshape(raw.shape[0], -1, 18)
        codes = (steps[..., 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
        half = np.ascontiguousarray(steps[..., :2]).view(np.float16).astype(np.float64)
        found: Array = (codes.reshape(*half.shape[:2], 64) - 1.0) * half
        return found.reshape(raw.shape[0], -1)
    if dtype != "MXFP4":
        values: Array = dequantize(raw, GGMLQuantizationType[dtype]).astype(np.float64)
        return values
    stored = raw.reshape(raw.shape[0], -1, 17)
    elements = np.concatenate((stored[..., 1:] & 15, stored[..., 1:] >> 4), axis=-1)
    scales = np.ldexp(1.0, stored[..., :1].astype(np.int64) - 127)
    decoded: Array = (_E2M1[elements] * scales).reshape(raw.shape[0], -1)
    return decoded


def _packed_integers(raw: Bytes, columns: int) -> Array:
    """A little-endian bit stream along the row, padded to whole 32-bit words."""
    bits = raw.shape[1] * 8 // columns
    stream = np.unpackbits(raw, axis=1, bitorder="little")[:, : columns * bits]
    stream = stream.reshape(raw.shape[0], columns, bits)
    values = (stream * (1 << np.arange(bits))).sum(-1, dtype=np.int64)
    decoded: Array = (values - (1 << (bits - 1))).astype(np.float64)
    return decoded


def _rows(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> Bytes:
    data = checkpoint.read_rows(spec.name, start, stop).contiguous()
    raw: Bytes = data.view(torch.uint8).numpy().reshape(stop - start, -1)
    return raw


def _floats(raw: Bytes, dtype: str) -> Array:
    if dtype in ("F8_E8M0", "U8"):
        return np.ldexp(1.0, raw.astype(np.int64) - 127)
    if dtype == "F8_E4M3":
        return _E4M3[raw]
    if dtype == "BF16":
        wide = np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64)
    kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I32": "<i4", "I64": "<i8"}[dtype]
    return np.ascontiguousarray(raw).view(kind).astype(np.float64)
