"""Which operators multiply which schemes in onnxruntime: plain data, quick to import."""

from __future__ import annotations

from typing import Literal

Kernel = Literal["qmoe", "matmulnbits", "lookup"]

KERNELS: dict[str, tuple[Kernel, ...]] = {
    "mxfp4": ("lookup",),
    **{f"int4-g{g}": ("qmoe", "matmulnbits") for g in (32, 64, 128)},
    **dict.fromkeys(("int8-g32", "int8-g128", "int2-g64", "int2-g128"), ("matmulnbits",)),
}
"""Schemes that run, each with the kernels that multiply them; the first is the default."""
