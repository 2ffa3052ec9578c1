"""Layout `deepseek`: the release's own. Experts as MXFP4 (I8 + E8M0), FP8 128x128 tiles, or BF16.

For `mxfp4` everything outside the experts is byte for byte the source. For `fp8` engines expect the
form of the Base releases: every scale, dense ones included, is float32 and `scale_fmt` is absent;
the values are powers of two, so widening E8M0 to float32 is exact. For `bf16` everything is plain
BF16 under the same names and config.json declares no quantization: four times the size, exact, and
what tools that know neither FP8 nor FP4 start from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.layouts.layout import DenseRule, Layout, Parts
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0
from v4quant_kernels.scheme import Scheme

QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def _expert_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    rows, columns = shape
    if scheme.element == "e2m1":
        return {"weight": ("I8", (rows, columns // 2)), "scale": ("F8_E8M0", (rows, columns // 32))}
    if scheme.is_plain:
        return {"weight": ("BF16", shape)}
    tiles = (-(-rows // 128), -(-columns // 128))
    return {"weight": ("F8_E4M3", shape), "scale": ("F32", tiles)}


def _expert_tensors(q: QTensor, input_amax: float) -> dict[str, Tensor]:
    del input_amax  # activations are quantized dynamically
    if q.scheme.is_plain:
        return {"weight": q.codes}
    assert q.scale is not None
    if q.scheme.element == "e2m1":
        return {"weight": q.codes.view(torch.int8), "scale": q.scale}
    scale = q.scale if q.scale.dtype == torch.float32 else e8m0.decode(q.scale)
    return {"weight": q.codes, "scale": scale}


def _dense(scheme: Scheme, draft: bool) -> DenseRule:
    del draft
    if scheme.is_plain:
        return "bf16"
    return "copy" if scheme.element == "e2m1" else "f32_scale"


def native_config(raw: Mapping[str, Any], expert_dtype: str) -> dict[str, Any]:
    """config.json of a release with native FP8 dense matrices and experts of `expert_dtype`.

    V4.1 (nested `text_config`) keeps its own declaration, 32x32 tiles and all, and states the
    experts' dtype inside it; V4 states it beside it.
    """
    own = raw.get("quantization_config")
    if isinstance(raw.get("text_config"), dict) and isinstance(own, dict):
        return {**raw, "quantization_config": {**own, "expert_dtype": expert_dtype}}
    quantization = dict(QUANTIZATION_CONFIG)
    return {**raw, "quantization_config": quantization, "expert_dtype": expert_dtype}


def _config(raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    assert not kept, "this format declares one scheme for all experts"
    if scheme.is_plain:
        if isinstance(raw.get("text_config"), dict):
            raise UnsupportedPair(
                "scheme 'bf16' would leave V4.1's FP8 Engram tables without a declaration; use "
                "mxfp4, nvfp4 or a compressed-tensors scheme, which carry them exactly"
            )
        return {k: v for k, v in raw.items() if k not in ("quantization_config", "expert_dtype")}
    released = scheme.element == "e2m1"
    config = native_config(raw, "fp4" if released else "fp8")
    if not released:
        config["quantization_config"].pop("scale_fmt", None)
    return config


DEEPSEEK = Layout(
    name="deepseek",
    expert_parts=_expert_parts,
    expert_tensors=_expert_tensors,
    dense=_dense,
    config=_config,
    engines="vLLM and SGLang on sm90 and newer, transformers anywhere",
    serve="vllm serve {path}",
)
