"""A GGUF file planned: its header, and where official tensors' bytes go.

The gguf package writes metadata and the table of tensors, into memory; tensor data goes straight
into place. The package itself would take a stacked expert tensor only whole (3.4 GB per layer of
Flash, in memory) and files in one piece after another; here every expert writes its own slice,
from any thread, in any order, and a killed run leaves no half-written file behind.

A file is: magic, version, counts, key-value pairs, tensor table, then data from the next multiple
of 32 on, each tensor padded to 32 with zeros. Dimensions are listed last first.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState

from v4quant_formats.deepseek_v4 import split_part
from v4quant_formats.gguf.names import Place
from v4quant_formats.shards import FilePlan
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.ggml_types import block_type

ALIGNMENT = 32


@dataclass(frozen=True)
class Field:
    """A key-value pair; `element` is the type of an array's elements."""

    key: str
    type: GGUFValueType
    value: Any
    element: GGUFValueType | None = None


@dataclass(frozen=True)
class _Stored:
    """One tensor of the file and the official tensors in it, in slice order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Place, TensorSpec], ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for _, spec in self.parts)


PlaceOf = Callable[[str], Place | None]


def plan_gguf(fields: Sequence[Field], place_of: PlaceOf, specs: Iterable[TensorSpec]) -> FilePlan:
    """The file that holds `specs`, official tensors; place_of(module) says where each lies."""
    return _plan(fields, _stored(place_of, specs))


def plan_named(fields: Sequence[Field], specs: Iterable[TensorSpec]) -> FilePlan:
    """The file that holds `specs` under their own names, which are not official ones."""
    return _plan(fields, [_Stored(s.name, s.dtype, s.shape, ((Place(s.name), s),)) for s in specs])


def _plan(fields: Sequence[Field], stored: Sequence[_Stored]) -> FilePlan:
    header = _header(fields, stored)
    header += bytes(-len(header) % ALIGNMENT)
    placed, position = [], len(header)
    for tensor in stored:
        placed += _placed(tensor, position)
        position += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    return FilePlan(header, tuple(placed), position)


def _stored(place_of: PlaceOf, specs: Iterable[TensorSpec]) -> list[_Stored]:
    """The file's tensors, in the order in which their first parts come."""
    by_name: dict[str, list[tuple[Place, TensorSpec]]] = {}
    for spec in specs:
        place = place_of(split_part(spec.name)[0])
        assert place is not None, spec
        by_name.setdefault(place.tensor, []).append((place, spec))
    return [_one(name, parts) for name, parts in by_name.items()]


def _one(name: str, parts: list[tuple[Place, TensorSpec]]) -> _Stored:
    parts.sort(key=lambda p: (p[0].expert or 0, p[0].half or 0))
    first, spec = parts[0]
    assert all((p[1].dtype, p[1].shape) == (spec.dtype, spec.shape) for p in parts), name
    shape = _logical_shape(spec)
    if first.expert is not None:
        assert [p.expert for p, _ in parts] == list(range(len(parts))), name
        shape = (len(parts), *shape)
    elif first.half is not None:
        assert [p.half for p, _ in parts] == [0, 1], name
        shape = (shape[0], 2 * shape[1])
    else:
        assert len(parts) == 1, name
    return _Stored(name, spec.dtype, shape, tuple(parts))


def _logical_shape(spec: TensorSpec) -> tuple[int, ...]:
    kind = block_type(spec.dtype)
    if kind is None:
        return spec.shape
    return (*spec.shape[:-1], spec.shape[-1] // kind.block_bytes * kind.block)


def _placed(tensor: _Stored, position: int) -> list[TensorSpec]:
    halves = tensor.parts[0][0].half is not None
    placed = []
    for _, spec in tensor.parts:
        stride = 2 * spec.row_bytes if halves else 0
        placed.append(replace(spec, offset=position, stride=stride))
        position += spec.row_bytes if halves else spec.nbytes
    return placed


def _header(fields: Sequence[Field], tensors: Sequence[_Stored]) -> bytes:
    writer = GGUFWriter(None, "")
    writer.kv_data = [{}]
    for field in fields:
        writer.add_key_value(field.key, field.value, field.type, field.element)
    for tensor in tensors:
        ours = block_type(tensor.dtype)  # the package may not know a type yet: its number will do
        kind: Any = ours.type_id if ours else GGMLQuantizationType[tensor.dtype]
        elements = np.dtype(np.float32)  # only says that `shape` counts elements, not bytes
        writer.add_tensor_info(tensor.name, tensor.shape, elements, tensor.nbytes, kind)
        assert math.prod(tensor.shape) > 0, tensor.name
    buffer = io.BytesIO()
    writer.fout = [buffer]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue()
