"""vLLM 0.33: strict about names; fused pairs share a method; MTP stages are further layers."""

from __future__ import annotations

import re

from v4quant_formats.engines.engine import V4_ATTENTION, Engine
from v4quant_formats.engines.vllm_memory import Serving, kv_cache_bytes
from v4quant_formats.model_config import ModelConfig

_TOP = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}


def _module_name(module: str, layers: int) -> str:
    if module in _TOP:
        return _TOP[module]
    if match := re.match(r"mtp\.(\d+)\.(.*)", module):
        if match[2] in ("main_proj", "main_norm"):
            return f"model.{match[2]}"
        module = f"layers.{layers + int(match[1])}.{match[2]}"
    return "model." + module.replace(".shared_experts.w2", ".shared_experts.down_proj")


_BATCHED_TOKENS = 8192  # its default on cards of 70 GB and more


def _kv_cache(config: ModelConfig, gpus: int, context: int) -> int:
    return kv_cache_bytes(config, Serving(gpus, context, _BATCHED_TOKENS))


_EXPERTS = (
    *("plain", "mxfp4", "fp8", "nvfp4", "ct-mxfp4", "ct-mxfp8", "ct-nvfp4"),
    *("ct-fp8-block", "ct-fp8-channel", "int2", "int3", "int4", "int8"),
)
_DENSE = ("plain", "fp8", "ct-fp8-block", "ct-fp8-channel", "int4", "int8")

VLLM = Engine(
    name="vllm",
    title="vLLM",
    module_name=_module_name,
    methods=("", "fp8", "compressed-tensors"),
    others=("modelopt", "gptq", "awq", "quark"),
    experts=dict.fromkeys(_EXPERTS, V4_ATTENTION),
    dense=dict.fromkeys(_DENSE, V4_ATTENTION),
    refusals={
        "fp8-tensor": "vLLM's V4 class wants scales of 128x128 tiles (weight_scale_inv)",
        "ct-fp8-tensor": "vLLM's V4 class wants scales of tiles or channels",
    },
    kv_cache=_kv_cache,
    advice="no attention kernels for sm80 to sm89: use llama.cpp there",
)
