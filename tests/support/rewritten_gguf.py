"""A GGUF file written again by the gguf package, as other tools write them: other types, keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter

_FLOATS = {Type.F32: np.float32, Type.F16: np.float16}


def rewrite(
    source: Path,
    out: Path,
    types: Callable[[str], Type | None] = lambda name: None,
    keys: Mapping[str, int] | None = None,
    without: Collection[str] = (),
    alignment: int | None = None,
    *,
    drop: Callable[[str], bool] = lambda name: False,
    extra: str = "",
    backwards: bool = False,
    zeros: bool = False,
    spoil: Callable[[str, np.ndarray], None] = lambda name, values: None,  # type: ignore[type-arg]
) -> Path:
    """types(tensor name): the type it gets (None: its own). keys: integers set. without: keys left
    out. drop(name): which tensors are left out; extra: a tensor more. backwards: the last tensor
    first. zeros: tensors of other types hold zero bytes. spoil(name, values): changes values of
    tensors of other types."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    left = dict(keys or {})
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.alignment"):
            continue
        if key in without:
            continue
        value, kind = left.pop(key, field.contents()), field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, element)
    for key, number in left.items():
        writer.add_uint32(key, number)
    for tensor in reversed(reader.tensors) if backwards else reader.tensors:
        if drop(tensor.name):
            continue
        wanted, data = types(tensor.name), np.array(tensor.data)
        if wanted is None or wanted == tensor.tensor_type:
            plain = tensor.tensor_type in (Type.F32, Type.F16, Type.I32)
            writer.add_tensor(tensor.name, data, raw_dtype=None if plain else tensor.tensor_type)
            continue
        if zeros or wanted in (Type.TQ1_0, Type.TQ2_0):
            shape = [int(n) for n in reversed(tensor.shape)]
            block, size = gguf.GGML_QUANT_SIZES[wanted]
            raw = np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8)
            writer.add_tensor(tensor.name, raw, raw_dtype=wanted)
            continue
        values = gguf.quants.dequantize(data, tensor.tensor_type).astype(np.float32)
        spoil(tensor.name, values)
        if wanted in _FLOATS:
            writer.add_tensor(tensor.name, values.astype(_FLOATS[wanted]))
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    if extra:
        writer.add_tensor(extra, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
