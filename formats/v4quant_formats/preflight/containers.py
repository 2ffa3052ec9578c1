"""Which container a checkpoint is, and the preflight of ONNX by its graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.onnx.check import check_onnx_folder
from v4quant_formats.preflight.survey import Finding


def container_of(checkpoint: Checkpoint) -> str:
    """`gguf` or `safetensors`."""
    gguf = any(name.endswith(".gguf") for name in checkpoint.files)
    return "gguf" if gguf else "safetensors"


def onnx_findings(folder: Path) -> Iterator[Finding]:
    """What keeps ONNX Runtime on a CPU from running a folder's graphs. Raises OnnxError."""
    for problem in check_onnx_folder(folder).problems:
        where = f"{problem.file}: {problem.where}"
        yield Finding("error", "onnx", where, problem.problem, "export the layer again")
