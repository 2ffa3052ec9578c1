"""SGLang 0.5: wrong or missing names only warn and then speak nonsense, so they are errors here."""

from __future__ import annotations

import re

from v4quant_formats.engines.engine import V4_ATTENTION, Engine
from v4quant_formats.engines.sglang_memory import Serving, pool_bytes
from v4quant_formats.model_config import ModelConfig

_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_TOP = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}


def _module_name(module: str, layers: int) -> str:
    del layers
    if module in _TOP:
        return _TOP[module]
    name = re.sub(r"^mtp\.\d+\.", "model.decoder.", module)
    name = re.sub(r"^layers\.", "model.layers.", name)
    name = name.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")
    path, _, last = name.rpartition(".")
    return f"{path}.{_PROJECTIONS.get(last, last)}" if "experts." in path + "." else name


_CHUNK = 8192  # its default on cards of 60 to 160 GB


def _kv_cache(config: ModelConfig, gpus: int, context: int) -> int:
    return pool_bytes(config, Serving(gpus, context, _CHUNK))


FP4_PROBE_OFF = "SGLANG_DSV4_FP4_EXPERTS=0"
"""For packed integers: the files have none of the tensors by which SGLang tells FP4 experts."""
_EXPERTS = ("plain", "mxfp4", "fp8", "ct-nvfp4", "ct-fp8-block", "ct-fp8-channel", "int4", "int8")

SGLANG = Engine(
    name="sglang",
    title="SGLang",
    module_name=_module_name,
    methods=("", "fp8", "compressed-tensors"),
    others=("modelopt", "gptq", "awq", "w4afp8", "moe_wna16", "quark", "auto-round"),
    experts={
        **dict.fromkeys(_EXPERTS, V4_ATTENTION),
        "nvfp4": ("sm90", "sm100", "sm103", "sm120", "sm121"),
    },
    dense=dict.fromkeys(("plain", "fp8"), V4_ATTENTION),
    refusals={
        "int2": "its packed-integer kernels take 4 and 8 bits; use vLLM",
        "int3": "its packed-integer kernels take 4 and 8 bits; use vLLM",
        "ct-mxfp4": "it takes MX experts only as the release stores them (--format deepseek)",
        "ct-mxfp8": "it takes MX experts only as the release stores them (--format deepseek)",
        "ct-fp8-block": "attention under compressed-tensors names is dropped with a warning; "
        "write the file with --engine sglang (linear_fp8_config) or neutral (BF16)",
        "ct-fp8-channel": "attention under compressed-tensors names is dropped with a warning; "
        "keep dense matrices BF16, or native FP8 through linear_fp8_config",
    },
    wo_a=("plain", "fp8"),
    drafts="mxfp4",
    unknown_names="warning",
    unmatched="error",
    reads_linear_fp8=True,
    reads_ignore_for_nvfp4=("v4", "v41"),
    needs_nvfp4_keys=True,
    kv_cache=_kv_cache,
    chat_options={
        "v4": ("--reasoning-parser deepseek-v4", "--tool-call-parser deepseekv4"),
        "v41": ("--reasoning-parser deepseek-v41", "--tool-call-parser deepseekv41"),
    },
    advice="no attention kernels for sm80 to sm89: use llama.cpp there",
)
