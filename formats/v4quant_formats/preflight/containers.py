"""Preflight of the other containers: GGUF by its headers, ONNX by its graphs.

Both describe themselves, so there is no declaration to resolve; their readers have refused what is
malformed. What is left: is the model whole, has every tensor the shape its metadata implies, and
does the runtime have kernels for the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import FormatError
from v4quant_formats.onnx_check import check_onnx_folder
from v4quant_formats.preflight.survey import Finding, Survey
from v4quant_formats.weights import find_weight


def container_of(checkpoint: Checkpoint) -> str:
    """`gguf` or `safetensors`."""
    gguf = any(name.endswith(".gguf") for name in checkpoint.files)
    return "gguf" if gguf else "safetensors"


def gguf_shapes(survey: Survey) -> Iterator[Finding]:
    """Every module decodable, and of the shape the metadata implies."""
    remedy = "convert again; the file was damaged or written wrongly"
    for name, module in survey.modules.items():
        try:
            shape = find_weight(survey.checkpoint, name).shape
        except FormatError as error:
            yield Finding("error", "dtype", name, str(error), remedy)
            continue
        if module.shape is not None and shape != module.shape:
            problem = f"shape is {list(shape)}, the metadata implies {list(module.shape)}"
            yield Finding("error", "shape", name, problem, remedy)


def onnx_findings(folder: Path) -> Iterator[Finding]:
    """What keeps ONNX Runtime on a CPU from running a folder's graphs. Raises OnnxError."""
    for problem in check_onnx_folder(folder).problems:
        where = f"{problem.file}: {problem.where}"
        yield Finding("error", "onnx", where, problem.problem, "export the layer again")
