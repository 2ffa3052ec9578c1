"""Will onnxruntime load this folder? Checked from graphs and file sizes; no weight is read.

A graph is bytes from a stranger that names other files and places in them, so every place is
checked before it is believed: names stay inside the folder, offsets and lengths are numbers inside
the file, lengths are those the shapes imply. Then the onnx package's own checker looks at the
graph. What onnxruntime's CPU kernels refuse although the standard allows it is a short table, found
by trying: `cpu_refusal`.

Whatever is wrong is a line of the report; only a folder that holds no graph at all is an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant_formats.checkpoint import link_root
from v4quant_formats.errors import FormatError
from v4quant_formats.onnx.graph import MICROSOFT, OPSET, require_onnx
from v4quant_formats.system import open_regular, real_path

MAX_GRAPH_BYTES = 256 * 2**20
MAX_ELEMENTS = 2**48
NEWEST_OPSET = 26
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", MICROSOFT)
_FLOAT4, _BFLOAT16, _E8M0 = 23, 16, 24
_NO_CPU_KERNEL = ("MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight")
# Bits per element by number of onnx.TensorProto.DataType.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64,
    15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip


class OnnxError(FormatError):
    """An .onnx file that is absent, too large, or no ONNX model."""


@dataclass(frozen=True)
class OnnxProblem:
    """One thing that is wrong: the graph's file, the thing inside it, and what to know."""

    file: str
    where: str
    problem: str


@dataclass(frozen=True)
class OnnxGraph:
    """One graph as it describes itself.

    opset: version of the standard operators. inputs, outputs: name -> "F32 [tokens, 256]" and the
    like. operators: name -> count, loops' bodies included. external_bytes: what it maps of other
    files.
    """

    file: str
    opset: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    operators: dict[str, int]
    external_bytes: int


@dataclass(frozen=True)
class OnnxReport:
    """All graphs of a folder, and everything wrong with them."""

    graphs: tuple[OnnxGraph, ...]
    problems: tuple[OnnxProblem, ...]


def read_model(path: Path) -> Any:
    """The onnx.ModelProto of a file, weights in other files left alone. Raises OnnxError."""
    onnx = require_onnx()
    from google.protobuf.message import DecodeError

    try:
        if not path.is_file():
            raise OnnxError(f"{path}: is not a file")
        with open_regular(path) as file:
            data = file.read(MAX_GRAPH_BYTES + 1)
    except OSError as error:
        raise OnnxError(f"{path}: cannot be read ({error.strerror})") from None
    if not data or len(data) > MAX_GRAPH_BYTES:
        raise OnnxError(
            f"{path}: is empty or above {MAX_GRAPH_BYTES // 2**20} MiB; weights belong into "
            "external data"
        )
    try:
        model = onnx.ModelProto.FromString(data)
    except (DecodeError, RuntimeError, ValueError):
        raise OnnxError(f"{path}: is not an ONNX model; the file is damaged") from None
    if not model.HasField("graph"):
        raise OnnxError(f"{path}: is not an ONNX model: it holds no graph")
    if not _is_text(model):
        raise OnnxError(f"{path}: holds names that are not UTF-8; the file is damaged")
    return model


def _is_text(message: Any) -> bool:
    """Whether every text in a message is text: the parser gives bytes for what is not UTF-8."""
    for field, value in message.ListFields():
        parts = (
            value if hasattr(value, "__len__") and not isinstance(value, str | bytes) else [value]
        )
        if field.type == field.TYPE_MESSAGE and not all(map(_is_text, parts)):
            return False
        if field.type == field.TYPE_STRING and not all(isinstance(part, str) for part in parts):
            return False
    return True


def check_onnx_folder(folder: Path) -> OnnxReport:
    """Check every .onnx file of a folder. Raises OnnxError when there is none."""
    paths = sorted(folder.glob("*.onnx")) if folder.is_dir() else []
    if not paths:
        raise OnnxError(f"{folder}: holds no .onnx file; give the folder export-onnx wrote")
    graphs: list[OnnxGraph] = []
    problems: list[OnnxProblem] = []
    for path in paths:
        if not real_path(path).is_relative_to(link_root(folder)):
            problems.append(OnnxProblem(path.name, "file", "is a link that leaves the folder"))
            continue
        try:
            model = read_model(path)
        except OnnxError as error:
            problems.append(OnnxProblem(path.name, "file", str(error)))
            continue
        graphs.append(_describe(path.name, model))
        found = list(_problems(path, model))
        problems += found or _checker(path)
    return OnnxReport(tuple(graphs), tuple(problems))


def _describe(name: str, model: Any) -> OnnxGraph:
    operators = Counter(node.op_type for graph in _graphs(model.graph) for node in graph.node)
    external = sum(
        max(0, _stored_bytes(t) or 0)
        for graph in _graphs(model.graph)
        for t in graph.initializer
        if t.external_data
    )
    return OnnxGraph(
        name,
        _opset(model),
        {v.name: _type(v) for v in model.graph.input},
        {v.name: _type(v) for v in model.graph.output},
        dict(sorted(operators.items())),
        external,
    )


def _type(value: Any) -> str:
    tensor = value.type.tensor_type
    names = require_onnx().TensorProto.DataType
    kind = names.Name(tensor.elem_type) if tensor.elem_type in names.values() else "unknown"
    extents = [d.dim_param or str(d.dim_value) for d in tensor.shape.dim]
    return f"{kind} [{', '.join(extents)}]"


def _opset(model: Any) -> int:
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and the bodies inside it (protobuf bounds the depth)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _problems(path: Path, model: Any) -> Iterator[OnnxProblem]:
    name = path.name
    opset = _opset(model)
    if not OPSET <= opset <= NEWEST_OPSET:
        yield OnnxProblem(
            name, "opset", f"{opset} is outside {OPSET} to {NEWEST_OPSET}, which were tried"
        )
    for domain in sorted({o.domain for o in model.opset_import} - set(_DOMAINS)):
        yield OnnxProblem(name, "opset", f"onnxruntime has no operators of domain '{domain[:80]}'")
    if not model.graph.output:
        yield OnnxProblem(name, "graph", "has no output")
    for graph in _graphs(model.graph):
        tensors = {t.name: t for t in graph.initializer}
        if len(tensors) != len(graph.initializer):
            yield OnnxProblem(name, "initializers", "two have one name")
        for tensor in graph.initializer:
            for problem in _tensor_problems(path.parent, tensor):
                yield OnnxProblem(name, tensor.name[:200], problem)
        for node in graph.node:
            if refusal := cpu_refusal(node, tensors):
                yield OnnxProblem(name, f"{node.op_type} {node.name[:80]}".strip(), refusal)


def _stored_bytes(tensor: Any) -> int | None:
    """Bytes a tensor's type and shape imply; None when they are not possible."""
    bits = _BITS.get(tensor.data_type)
    if bits is None or any(d < 0 for d in tensor.dims):
        return None
    elements = math.prod(tensor.dims)
    return None if elements > MAX_ELEMENTS else -(-elements * bits // 8)


def _tensor_problems(folder: Path, tensor: Any) -> Iterator[str]:
    size = _stored_bytes(tensor)
    if size is None:
        yield f"type {tensor.data_type} and shape {list(tensor.dims)[:8]} are not possible"
        return
    if tensor.data_location != require_onnx().TensorProto.EXTERNAL:
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    target = _inside(folder, location)
    if target is None:
        yield f"external data {location[:80]!r} is not a file name inside the folder"
        return
    offset, length = (_number(place.get(key, default))
                      for key, default in (("offset", "0"), ("length", str(size))))  # fmt: skip
    if offset is None or length is None:
        yield "offset or length of its external data is not a number"
    elif length != size:
        yield f"external data of {length} bytes, but type and shape imply {size}"
    elif not target.is_file():
        yield f"external data file '{location[:80]}' is missing"
    elif offset + length > target.stat().st_size:
        yield (
            f"external data ends at byte {offset + length} of '{location[:80]}', which has "
            f"{target.stat().st_size}; the file was cut short"
        )


def _inside(folder: Path, location: str) -> Path | None:
    """The file a location names, if it lies in the folder itself and leads nowhere else."""
    plain = location not in ("", ".", "..") and location.isprintable() and len(location) <= 255
    if not plain or any(c in location for c in "/\\:\0"):
        return None
    target = folder / location
    return target if real_path(target).is_relative_to(link_root(folder)) else None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def cpu_refusal(node: Any, tensors: Mapping[str, Any]) -> str | None:
    """Why onnxruntime's CPU kernels refuse a node that the standard allows, or None.

    tensors: the graph's initializers (onnx.TensorProto) by name.
    """
    values = {a.name: a.s.decode(errors="replace") if a.s else a.i for a in node.attribute}
    types = [tensors[name].data_type if name in tensors else 0 for name in node.input]
    if _FLOAT4 in types:
        return "no CPU kernel reads FLOAT4E2M1; store the bytes as UINT8 and decode by table"
    if node.op_type == "DequantizeLinear" and {_BFLOAT16, _E8M0} & set(types[1:2]):
        return "no CPU kernel takes scales in BFLOAT16 or FLOAT8E8M0; store them as FLOAT"
    if node.domain != MICROSOFT:
        return None
    if node.op_type in _NO_CPU_KERNEL:
        return "has no CPU kernel"
    if node.op_type == "MatMulNBits" and values.get("bits", 4) not in (2, 4, 8):
        return f"{values['bits']} bits; the CPU kernel takes 2, 4 and 8"
    if node.op_type != "QMoE":
        return None
    return _qmoe_refusal(values) or _qmoe_misfit(node, values, tensors)


def _qmoe_misfit(node: Any, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> str | None:
    """Codes and scales of one projection must count the same experts, rows and blocks."""
    block, bits = values.get("block_size", 0), values.get("expert_weight_bits", 4)
    for first in (2, 5):
        pair = [tensors[name] for name in node.input[first : first + 2] if name in tensors]
        if block and len(pair) == 2:
            codes, scales = (list(t.dims) for t in pair)
            fits = len(codes) == len(scales) == 3 and codes[:2] == scales[:2]
            if not fits or codes[2] * 8 != scales[2] * block * bits:
                return f"codes {codes[:4]} and scales {scales[:4]} do not fit blocks of {block}"
    return None


def _qmoe_refusal(values: Mapping[str, Any]) -> str | None:
    if values.get("quant_type", "int") != "int":
        return f"quant_type '{values['quant_type']}' has no CPU kernel; 'int' has"
    if values.get("expert_weight_bits", 4) not in (2, 4, 8):
        return f"{values['expert_weight_bits']} bits; the CPU kernel takes 2, 4 and 8"
    if values.get("activation_type") == "swiglu" and values.get("swiglu_fusion", 0) != 1:
        return "swiglu_fusion must be 1 (gate and up rows interleaved) on a CPU"
    return None


def _checker(path: Path) -> list[OnnxProblem]:
    onnx = require_onnx()
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        return [OnnxProblem(path.name, "graph", f"onnx.checker: {text}")]
    return []
