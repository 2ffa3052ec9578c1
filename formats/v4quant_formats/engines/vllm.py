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


_V41_FUSED = {"wq_a": "fused_wqa_wkv", "wkv": "fused_wqa_wkv"}
_V41_SHARED = {"w1": "gate_up_proj", "w2": "down_proj", "w3": "gate_up_proj"}


def _v41_name(module: str, layers: int) -> str:
    """V4.1's class stands inside one for images, and says nothing of the modules it fuses."""
    path, _, last = _module_name(module, layers).rpartition(".")
    if path.endswith(".attn"):
        last = _V41_FUSED.get(last, last)
    elif path.endswith(".shared_experts"):
        last = _V41_SHARED.get(last, last)
    name = f"{path}.{last}" if path else last
    return name if module.startswith("mtp.") else f"language_model.{name}"


_BATCHED_TOKENS = 8192  # its default on cards of 70 GB and more


def _kv_cache(config: ModelConfig, gpus: int, context: int) -> int:
    return kv_cache_bytes(config, Serving(gpus, context, _BATCHED_TOKENS))


_EXPERTS = (
    *("plain", "mxfp4", "fp8", "nvfp4", "ct-mxfp4", "ct-mxfp8", "ct-nvfp4"),
    *("ct-fp8-block", "ct-fp8-channel", "int2", "int3", "int4", "int8"),
)
_DENSE = ("plain", "fp8", "ct-fp8-block", "ct-fp8-channel", "ct-mxfp8", "int4", "int8")

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
        "gguf": "vLLM 0.33 has no loader of GGUF, and of the packed blocks that ModelOpt files may "
        "hold (IQ2, Q2_K) it takes none for models with a swiglu_limit, which V4 is; take "
        "--format compressed-tensors --engine vllm, whose int2-g64 has q2_0's bits",
    },
    kv_cache=_kv_cache,
    v41_name=_v41_name,
    strict_wo_a=True,
    reads_ignore_for_nvfp4=("v41",),
    chat_options={
        "v4": (
            "--tokenizer-mode deepseek_v4",
            "--reasoning-parser deepseek_v4",
            "--tool-call-parser deepseek_v4",
            "--enable-auto-tool-choice",
        ),
        "v41": ("--tokenizer-mode deepseek_v41",),
    },
    advice="no attention kernels for sm80 to sm89: use llama.cpp there",
)
