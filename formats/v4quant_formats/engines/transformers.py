"""transformers 5.23: decodes everything to BF16 and runs anywhere; drafts are ignored."""

from __future__ import annotations

import re
from dataclasses import replace

from v4quant_formats.engines.engine import CONSTANTS, GPUS, ROUTING_KEYS, Engine

_ATTENTION = {
    "wq_a": "q_a_proj",
    "wq_b": "q_b_proj",
    "wkv": "kv_proj",
    "wo_a": "o_a_proj",
    "wo_b": "o_b_proj",
}
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_TOP = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}


def _module_name(module: str, layers: int) -> str:
    del layers
    if module in _TOP:
        return _TOP[module]
    name = re.sub(r"^layers\.", "model.layers.", module)
    name = name.replace(".attn.indexer.", ".self_attn.compressor.indexer.")
    name = name.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")
    path, _, last = name.rpartition(".")
    names = _PROJECTIONS if "experts" in path else _ATTENTION
    return f"{path}.{names.get(last, last)}"


# What its own config.json has in place of the release's keys.
_INSTEAD = {"compress_ratios": ("layer_types",), "num_hash_layers": ("mlp_layer_types",)}
_CONFIG = tuple(
    replace(rule, instead=(*rule.instead, *_INSTEAD.get(rule.key, ())))
    for rule in (*ROUTING_KEYS, *CONSTANTS)
)
ANYWHERE = ("CPU", *GPUS)
_EXPERTS = ("plain", "mxfp4", "fp8", "ct-mxfp4", *(f"int{b}" for b in (2, 3, 4, 8)))
_DENSE = ("plain", "fp8", "ct-fp8-block", "ct-fp8-channel", *(f"int{b}" for b in (2, 3, 4, 8)))

TRANSFORMERS = Engine(
    name="transformers",
    title="transformers",
    module_name=_module_name,
    methods=("", "fp8", "compressed-tensors"),
    experts=dict.fromkeys(_EXPERTS, ANYWHERE),
    dense=dict.fromkeys(_DENSE, ANYWHERE),
    refusals={
        "ct-mxfp8": "its conversion of MXFP8 experts fails; use vLLM, or mxfp4",
        "nvfp4": "it has no loader for ModelOpt's NVFP4 experts (shapes do not fit); "
        "serve this file with vLLM, SGLang or TensorRT-LLM",
        "ct-nvfp4": "its expert path loses the global scale: the file loads and is silently wrong",
        "ct-fp8-block": "its conversion of block FP8 experts fails; use quant_method fp8",
    },
    wo_a=("plain", "fp8", "ct-fp8-block", "ct-fp8-channel"),
    config=_CONFIG,
    drafts="ignored",
    unknown_names="warning",
    first_group=True,
    shards=False,
    decodes=True,
    reads_architectures=False,
    releases=("v4",),
    advice="weights are decoded to BF16 when loaded: count two bytes per weight",
)
