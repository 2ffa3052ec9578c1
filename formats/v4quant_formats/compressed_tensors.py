"""Layout `compressed-tensors`: INT experts as `pack-quantized`, everything dense as exact BF16.

The engine-neutral variant: one file that vLLM, SGLang and transformers all read. Targets and
ignores are regular expressions over *module* names, and each engine renames modules differently, so
the expert target covers both worlds (w1/w2/w3 and gate/up/down_proj) and the ignore list names what
SGLang would otherwise refuse as unmatched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from v4quant_formats.layout import DenseRule, Layout, Parts
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import Scheme

EXPERT_TARGET = r"re:.*\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"
IGNORE = [
    "re:.*attn.*",
    "re:.*shared_experts.*",
    r"re:.*\.gate$",
    "re:.*(e_proj|h_proj|main_proj)$",
    "re:.*(markov_head|confidence_head).*",
    "re:.*engram.*",
    r"re:.*(vision|aligner)\..*",
    "lm_head",
    "head",
    "embed",
]


def _expert_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    rows, columns = shape
    return {
        "weight_packed": ("I32", (rows, -(-columns * scheme.bits // 32))),
        "weight_scale": ("BF16", (rows, columns // scheme.group_size)),
        "weight_shape": ("I64", (2,)),
    }


def _expert_tensors(q: QTensor, input_amax: float) -> dict[str, Tensor]:
    del input_amax  # weight-only
    assert q.scale is not None
    return {
        "weight_packed": q.codes.view(torch.int32),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }


def _dense(scheme: Scheme) -> DenseRule:
    del scheme
    return "bf16"


def _config(raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    assert not kept, "this format declares one scheme for all experts"
    config = {k: v for k, v in raw.items() if k != "expert_dtype"}
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {
        "targets": [EXPERT_TARGET],
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(IGNORE),
        "config_groups": {"group_0": group},
    }
    return config


COMPRESSED_TENSORS = Layout(
    name="compressed-tensors",
    schemes=("int4-g32", "int4-g64", "int4-g128", "int8-g32", "int8-g128"),
    expert_parts=_expert_parts,
    expert_tensors=_expert_tensors,
    dense=_dense,
    config=_config,
    engines="vLLM and SGLang on sm90 and newer, transformers anywhere",
    serve="vllm serve {path}",
)
