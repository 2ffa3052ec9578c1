"""Layout `deepseek`: the release's own. Experts as MXFP4 (I8 + E8M0), FP8 tiles, or BF16.

For `mxfp4` everything outside the experts is byte for byte the source. For `fp8` engines expect the
form of the Base releases: every scale, dense ones included, is float32 and `scale_fmt` is absent;
the values are powers of two, so widening E8M0 to float32 is exact. Tiles are the release's, 128x128
in V4 and 32x32 in V4.1, whose `wo_a` is BF16 then: vLLM's product of it takes 32x32 tiles only
beside FP4 experts. For `bf16` everything is plain BF16 under the same names and config.json
declares no quantization: four times the size, exact, and what tools that know neither FP8 nor FP4
start from. V4.1's Engram tables stay FP8 rows in every case: engines read them so whatever
config.json says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from v4quant_formats.deepseek_v4 import TensorName
from v4quant_formats.layouts.layout import DenseRule, Layout, Parts
from v4quant_formats.model_config import Dimensions, is_v41
from v4quant_kernels.late import torch
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
V41_CONFIG: dict[str, Any] = {
    **{key: value for key, value in QUANTIZATION_CONFIG.items() if key != "fmt"},
    "weight_block_size": [32, 32],
}


def _expert_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    rows, columns = shape
    if scheme.element == "e2m1":
        return {"weight": ("I8", (rows, columns // 2)), "scale": ("F8_E8M0", (rows, columns // 32))}
    if scheme.is_plain:
        return {"weight": ("BF16", shape)}
    tiles = (-(-rows // scheme.block[0]), -(-columns // scheme.block[1]))
    return {"weight": ("F8_E4M3", shape), "scale": ("F32", tiles)}


def _expert_tensors(q: QTensor, input_amax: float) -> dict[str, Tensor]:
    del input_amax  # activations are quantized dynamically
    if q.scheme.is_plain:
        return {"weight": q.codes}
    assert q.scale is not None
    if q.scheme.element == "e2m1":
        return {"weight": q.codes.view(torch.int8), "scale": q.scale}
    from v4quant_kernels.ref import e8m0  # torch, which plans do without

    scale = q.scale if q.scale.dtype == torch.float32 else e8m0.decode(q.scale)
    return {"weight": q.codes, "scale": scale}


def _dense(scheme: Scheme, name: TensorName, config: Dimensions) -> DenseRule:
    if scheme.is_plain:
        return "bf16"
    if scheme.element == "e4m3" and config.v41 is not None and name.module.endswith("attn.wo_a"):
        return "bf16"
    return "copy" if scheme.element == "e2m1" else "f32_scale"


def native_config(raw: Mapping[str, Any], expert_dtype: str) -> dict[str, Any]:
    """config.json of a release with native FP8 dense matrices and experts of `expert_dtype`.

    V4.1 states the experts' dtype inside the declaration; V4 states it beside it.
    """
    if is_v41(raw):
        kept = {k: v for k, v in raw.items() if k != "expert_dtype"}
        return {**kept, "quantization_config": {**V41_CONFIG, "expert_dtype": expert_dtype}}
    quantization = dict(QUANTIZATION_CONFIG)
    return {**raw, "quantization_config": quantization, "expert_dtype": expert_dtype}


def _config(raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    assert not kept, "this format declares one scheme for all experts"
    if scheme.is_plain:
        return {k: v for k, v in raw.items() if k not in ("quantization_config", "expert_dtype")}
    released = scheme.element == "e2m1"
    config = native_config(raw, "fp4" if released else "fp8")
    if not released:
        config["quantization_config"].pop("scale_fmt", None)
        if is_v41(raw):
            config["quantization_config"]["ignored_layers"] = _wo_a_names(raw["text_config"])
    return config


def _wo_a_names(text: Mapping[str, Any]) -> list[str]:
    """Every `attn.wo_a` by its name in the file and by vLLM's, which numbers drafts on."""
    layers, drafts = int(text["num_hidden_layers"]), int(text.get("num_nextn_predict_layers") or 0)
    places = [(f"layers.{n}", f"language_model.model.layers.{n}") for n in range(layers)]
    places += [(f"mtp.{n}", f"model.layers.{layers + n}") for n in range(drafts)]
    return [f"{name}.attn.wo_a" for names in places for name in names]


DEEPSEEK = Layout(
    name="deepseek",
    expert_parts=_expert_parts,
    expert_tensors=_expert_tensors,
    dense=_dense,
    config=_config,
    engines="vLLM and SGLang on sm90 and newer, transformers anywhere",
    serve="vllm serve {path}",
)
