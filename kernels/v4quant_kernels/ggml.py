"""The tensor types of GGUF files: numbers into bytes and back.

llama.cpp stores a matrix as rows of blocks. `ggml_types.py` has the facts of every type,
`ref/ggml_blocks.py` the layouts of the bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4quant_kernels import native
from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme, WeightOutOfRange
from v4quant_kernels.ggml_types import get_type
from v4quant_kernels.ref import e2m1, ggml_plain, mx
from v4quant_kernels.ref.ggml_blocks import SHAPES, put_together, take_apart
from v4quant_kernels.ref.ggml_fields import Blocks, BlockShape
from v4quant_kernels.scheme import MXFP4

_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def encode(x: Tensor, type_name: str, importance: Tensor | None = None) -> Tensor:
    """uint8 `[rows, bytes]` from a float32 matrix `[rows, K]`.

    `importance`, float32 `[K]`, weighs the squared error of each column (None: all alike). Blocks
    are searched on the CPU, one thread a call; the result is there too. It depends on nothing but
    the row and the importance.

    Raises UnsupportedScheme when K is not a multiple of the block, NonFiniteWeight for NaN or
    infinity in either argument (and for negative importance), WeightOutOfRange for weights beyond
    half precision (65504) in a type whose scales are.
    """
    kind = get_type(type_name)
    x = x.float().contiguous()
    rows, columns = x.shape
    row_bytes = kind.row_bytes(columns)
    if x.numel() == 0:
        return torch.empty(rows, row_bytes, dtype=torch.uint8)
    largest = max(-float(x.amin()), float(x.amax()))  # NaN stays NaN in both
    if not largest < float("inf"):
        raise NonFiniteWeight(f"a weight to be stored as '{type_name}' is NaN or infinite")
    _check_importance(importance, columns)
    if type_name in _FLOATS:
        stored = x.to(_FLOATS[type_name])
        if not bool(stored.isfinite().all()):
            raise WeightOutOfRange(_too_large(largest, type_name))
        return stored.view(torch.uint8).view(rows, row_bytes)
    if type_name == "mxfp4":
        q = mx.quantize(x, MXFP4)
        assert q.scale is not None
        return repack_mxfp4(q.codes, q.scale)
    if largest > torch.finfo(torch.float16).max:
        raise WeightOutOfRange(_too_large(largest, type_name))
    blocks = search_blocks(x, type_name, importance)
    scales_finite = blocks.d.isfinite().all()
    if blocks.dmin is not None:
        scales_finite &= blocks.dmin.isfinite().all()
    if not bool(scales_finite):
        raise WeightOutOfRange(_too_large(largest, type_name))
    return _put_together(blocks, type_name).view(rows, row_bytes)


def _put_together(blocks: Blocks, type_name: str) -> Tensor:
    if not native.available() or blocks.q.device.type != "cpu":
        return put_together(blocks, type_name)
    from v4quant_kernels.native.ggml.join import join

    return put_together(blocks, type_name, join)


def search_blocks(x: Tensor, type_name: str, importance: Tensor | None) -> Blocks:
    """The blocks `encode` chooses for a finite float32 matrix of whole blocks, before packing.

    Half-precision scales of weights that are too large are infinite.
    """
    if not native.available():
        return ggml_plain.round_blocks(x.view(-1, SHAPES[type_name].block), type_name)
    from v4quant_kernels.native.ggml.search import search

    return search(x.cpu(), type_name, None if importance is None else importance.cpu())


def decode(data: Tensor, type_name: str) -> Tensor:
    """float32 `[rows, K]` from uint8 `[rows, bytes]`, bit for bit what llama.cpp computes.

    Raises UnsupportedScheme when a row is not a whole number of blocks. Damaged scales decode to
    what they say, NaN and infinity included.
    """
    kind = get_type(type_name)
    if data.ndim != 2 or data.dtype != torch.uint8 or data.shape[1] % kind.block_bytes:
        raise UnsupportedScheme(
            f"GGUF type '{type_name}' is stored in blocks of {kind.block_bytes} bytes, which do "
            f"not fill a {data.dtype} array of shape {list(data.shape)}"
        )
    columns = data.shape[1] // kind.block_bytes * kind.block
    if type_name in _FLOATS:
        return data.contiguous().view(_FLOATS[type_name]).float()
    stored = data.reshape(-1, kind.block_bytes)
    if type_name == "mxfp4":
        values = _mxfp4_values(stored)
    else:
        values = take_apart(stored, type_name).values()
    return values.view(data.shape[0], columns)


@dataclass(frozen=True)
class Grid:
    """The values each weight of a coded matrix may take: scale * q + offset, low <= q <= high.

    scale, offset: float32 `[rows, K]`; a scale may be zero (all q alike) or negative.
    """

    scale: Tensor
    offset: Tensor
    low: int
    high: int


def grid(data: Tensor, type_name: str) -> Grid:
    """The grid of coded rows, uint8 `[rows, bytes]`, for a solver that rounds onto it.

    Raises UnsupportedScheme for types whose values are not evenly spaced (floats, mxfp4).
    """
    shape = _grid_shape(type_name)
    blocks = take_apart(data.reshape(-1, get_type(type_name).block_bytes), type_name)
    step, offset = blocks.step(), blocks.offset()
    offset = torch.zeros_like(step) if offset is None else offset
    rows = data.shape[0]
    scale, offset = (t.repeat_interleave(shape.sub, 1).view(rows, -1) for t in (step, offset))
    return Grid(scale, offset, *shape.q)


def reencode(codes: Tensor, data: Tensor, type_name: str) -> Tensor:
    """Coded rows `data`, uint8 `[rows, bytes]`, with other integers `codes`, int8 `[rows, K]`.

    The scales stay; `codes` must lie in the range that `grid` names.
    """
    low, high = _grid_shape(type_name).q
    assert bool(((codes >= low) & (codes <= high)).all()), f"codes outside {low}..{high}"
    stored = data.reshape(-1, get_type(type_name).block_bytes)
    old = take_apart(stored, type_name)
    q = codes.to(torch.int8).reshape(old.q.shape)
    return _put_together(replace(old, q=q), type_name).view(data.shape)


def rescale(data: Tensor, type_name: str, factor: Tensor) -> Tensor:
    """Coded rows, uint8 `[rows, bytes]`, whose block scales are multiplied by factors `[rows]`.

    d and dmin are rounded to half precision again; blocks where that gives infinity stay.
    """
    blocks = take_apart(data.reshape(-1, get_type(type_name).block_bytes), type_name)
    spread = factor.to(data.device).repeat_interleave(len(blocks.d) // max(data.shape[0], 1))
    d, dmin = (blocks.d.double() * spread).half(), blocks.dmin
    fits = d.isfinite()
    if dmin is not None:
        moved = (dmin.double() * spread).half()
        fits &= moved.isfinite()
        dmin = torch.where(fits, moved, dmin)
    scaled = replace(blocks, d=torch.where(fits, d, blocks.d), dmin=dmin)
    return _put_together(scaled, type_name).view(data.shape)


def repack_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """uint8 `[rows, K/32*17]` from E2M1 pairs uint8 `[rows, K/2]` and E8M0 `[rows, K/32]`.

    No number changes: GGUF puts the scale byte first and element j + 16 above element j. Raises
    NonFiniteWeight for the scale byte 255, NaN in the source but a number in llama.cpp.
    """
    rows, groups = scale.shape
    scale_bytes = scale.view(torch.uint8)
    if bool((scale_bytes == 255).any()):
        raise NonFiniteWeight("an MXFP4 scale byte is 255 (NaN), which GGUF cannot express")
    elements = e2m1.unpack(codes).view(rows, groups, 2, 16)
    packed = elements[:, :, 0] | (elements[:, :, 1] << 4)
    return torch.cat([scale_bytes[..., None], packed], -1).view(rows, groups * 17)


def unpack_mxfp4(data: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `repack_mxfp4`.

    Returns codes uint8 `[rows, K/2]` and scale float8_e8m0fnu `[rows, K/32]`. Raises
    UnsupportedScheme when a row is not a whole number of blocks.
    """
    rows, row_bytes = data.shape
    if row_bytes % 17:
        raise UnsupportedScheme(f"rows of {row_bytes} bytes hold no whole MXFP4 blocks of 17")
    stored = data.reshape(rows, row_bytes // 17, 17)
    packed = stored[..., 1:]
    elements = torch.stack([packed & 15, packed >> 4], dim=2).view(rows, -1)
    scale = stored[..., 0].contiguous().view(torch.float8_e8m0fnu)
    return e2m1.pack(elements), scale


def _grid_shape(type_name: str) -> BlockShape:
    get_type(type_name)
    even = [name for name, shape in SHAPES.items() if not (shape.levels or shape.codebook)]
    if type_name not in even:
        raise UnsupportedScheme(
            f"GGUF type '{type_name}' has no evenly spaced values; choose one of: {', '.join(even)}"
        )
    return SHAPES[type_name]


def _mxfp4_values(stored: Tensor) -> Tensor:
    """float32 `[B, 32]`: doubled E2M1 integers (no -0) times half the scale; byte 255 is 2^127."""
    byte = stored[:, :1].to(torch.int32)
    half = torch.where(byte < 2, 0x00200000 << byte, (byte - 1) << 23).view(torch.float32)
    packed = stored[:, 1:]
    elements = torch.cat([packed & 15, packed >> 4], 1)
    return (e2m1.decode(elements) * 2 + 0.0) * half


def _check_importance(importance: Tensor | None, columns: int) -> None:
    if importance is None:
        return
    assert importance.shape == (columns,), (importance.shape, columns)
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise NonFiniteWeight("an importance weight is NaN, infinite or negative")


def _too_large(largest: float, type_name: str) -> str:
    return (
        f"a weight of magnitude {largest:.4g} is too large for GGUF type "
        f"'{type_name}', whose numbers are half precision; use 'bf16' or 'mxfp4'"
    )
