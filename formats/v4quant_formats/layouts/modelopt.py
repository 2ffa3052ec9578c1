"""Layout `modelopt`: the hybrid of native FP8 dense matrices and NVFP4 experts.

Each expert matrix carries E2M1 nibbles, an E4M3 scale per 16, a float32 second-level scale and a
float32 `input_scale`. Engines fuse w1 and w3 and keep only the first one's second-level and input
scales, so both must be equal; the caller quantizes the pair together. `input_scale` is the largest
expected input over 6*448; it only places the activation's E4M3 block scales inside their 17-octave
range, so a safe upper bound serves as well as a calibrated value.

vLLM applies the experts' scheme to draft stages too; SGLang expects their experts in MXFP4, so its
variant leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from v4quant_formats.deepseek_v4 import TensorName
from v4quant_formats.layouts.deepseek import native_config
from v4quant_formats.layouts.layout import DenseRule, Layout, Parts
from v4quant_formats.model_config import Dimensions
from v4quant_kernels.late import torch
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

NVFP4_MAX = 6.0 * 448.0


def _expert_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    rows, columns = shape
    return {
        "weight": ("U8", (rows, columns // 2)),
        "weight_scale": ("F8_E4M3", (rows, columns // scheme.group_size)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }


def _expert_tensors(q: QTensor, input_amax: float) -> dict[str, Tensor]:
    assert q.scale is not None and q.global_scale is not None
    return {
        "weight": q.codes,
        "weight_scale": q.scale,
        "weight_scale_2": q.global_scale.reshape(()),
        "input_scale": torch.tensor(input_amax / NVFP4_MAX, dtype=torch.float32),
    }


def _dense(scheme: Scheme, name: TensorName, config: Dimensions) -> DenseRule:
    del scheme, name, config
    return "copy"


def _config(raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    config = native_config(raw, "fp4")
    config["quantization_config"] |= {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "group_size": scheme.group_size,
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head"]
        + [f"*{stage}.ffn.experts*" for stage in kept],
    }
    return config


_NEUTRAL = Layout(
    name="modelopt",
    expert_parts=_expert_parts,
    expert_tensors=_expert_tensors,
    dense=_dense,
    config=_config,
    engines="vLLM, and SGLang with --engine sglang: W4A4 on sm100 and newer, weight-only below",
    serve="vllm serve {path}",
    can_keep=True,
    stores_input_scale=True,
)
_SGLANG = replace(
    _NEUTRAL,
    engines="SGLang: W4A4 on sm100 and newer, weight-only on sm90",
    serve="python -m sglang.launch_server --model-path {path}",
    keeps_drafts=True,
    engine="sglang",
)
MODELOPT = replace(_NEUTRAL, variants={"sglang": _SGLANG})
