"""Whole files by llama.cpp's own quantizer, from its Python package."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import v4quant
from v4quant_formats.gguf.imatrix import read_imatrix

Floats = np.ndarray[Any, np.dtype[np.float32]]


def quantized_file(source: Path, name: str, imatrix: Path | None, work: Path) -> Path | None:
    """A file of llama.cpp's type, like "Q2_K", of our exact one; None without its package.

    imatrix: an importance matrix; a tensor of which it says nothing gets ones. A file that is there
    already is not made again.
    """
    try:
        import llama_cpp
    except (ImportError, RuntimeError, OSError):
        return None
    out, part = work / f"{name}.gguf", work / f"{name}.part"
    if out.exists():
        return out
    v4quant.quantize(source, work / "exact", scheme="mxfp4", format="gguf", draft="drop", workers=1)
    (model,) = (work / "exact").glob("*.gguf")
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    parameters.nthread, parameters.allow_requantize = 1, True
    if imatrix is not None:
        weights = _weights(model, imatrix)  # llama.cpp reads these arrays: they must live on
        parameters.imatrix = _as_structs(llama_cpp.llama_model_imatrix_data, weights)
    paths = (os.fsencode(model), os.fsencode(part))
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {name}")
    return part.rename(out)


def _weights(model: Path, imatrix: Path) -> dict[str, Floats]:
    """Mean squares of inputs, flat, for every matrix of a model's file."""
    from gguf import GGUFReader

    known = dict(read_imatrix(imatrix))
    weights = {}
    for tensor in GGUFReader(model).tensors:
        if len(tensor.shape) < 2:
            continue
        if (found := known.get(tensor.name)) is None:
            columns, matrices = int(tensor.shape[0]), int(np.prod(tensor.shape[2:]))
            weights[tensor.name] = np.ones(columns * matrices, dtype=np.float32)
        else:
            means = found.sums / found.counts.clamp_min(1).unsqueeze(1)
            weights[tensor.name] = means.float().reshape(-1).numpy()
    return weights


def _as_structs(struct: Any, weights: Mapping[str, Floats]) -> Any:
    """An array of {name, data, size} that ends with one without a name."""
    array = (struct * (len(weights) + 1))()
    pointer = ctypes.POINTER(ctypes.c_float)
    for entry, (name, values) in zip(array, weights.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(pointer)
    return array
