"""One full-width synthetic layer of DeepSeek-V4-Flash or Pro, to measure conversion speed on.

Real dimensions, random codes, expert scales spread over 7 octaves as quantized weights have them.
The vocabulary is cut to 1,024 so that the layer's experts make up the bytes, as in the release.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.deepseek_v4 import expected_modules, module_shape, parse_name
from v4quant_formats.manifest import index_json
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_formats.shards import ShardWriter, write_file_atomically
from v4quant_formats.spec import TensorSpec

_COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 1024,
    "num_hidden_layers": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "num_experts_per_tok": 6,
    "num_hash_layers": 0,
    "swiglu_limit": 10.0,
    "sliding_window": 128,
    "compress_ratios": [0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "bos_token_id": 0,
    "expert_dtype": "fp4",
}
DIMENSIONS: dict[str, dict[str, Any]] = {
    "flash": {
        "hidden_size": 4096, "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "routed_scaling_factor": 1.5,
        "index_topk": 512,
    },
    "pro": {
        "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
        "moe_intermediate_size": 3072, "n_routed_experts": 384, "routed_scaling_factor": 2.5,
        "index_topk": 1024,
    },
}  # fmt: skip


def write_layer(folder: Path, width: str, experts: int | None = None) -> int:
    """Write a one-layer checkpoint of `width` (flash, pro); returns its bytes of tensor data.

    experts: fewer than the release's, for a quick run. Streams; raises OutputError.
    """
    raw = {**_COMMON, **DIMENSIONS[width]}
    if experts is not None:
        raw["n_routed_experts"] = experts
    raw["num_experts_per_tok"] = min(6, raw["n_routed_experts"])
    config = parse_model_config(raw)
    specs = list(_specs(config))
    folder.mkdir(parents=True, exist_ok=True)
    file = "model-00001-of-00001.safetensors"
    writer = ShardWriter(folder / file, specs)
    generator = torch.Generator().manual_seed(0)
    for spec in specs:
        writer.add(spec.name, _values(spec, generator))
    writer.close()
    total = sum(s.nbytes for s in specs)
    write_file_atomically(folder / "config.json", json.dumps(raw, indent=2).encode())
    write_file_atomically(folder / INDEX_NAME, index_json({s.name: file for s in specs}, total))
    return total


def _specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """The released layout's tensors of a one-layer model."""
    for module in expected_modules(config, ()):
        shape = module_shape(config, module)
        name = parse_name(module) or parse_name(f"{module}.weight")
        assert shape is not None and name is not None, module
        if name.expert is not None:
            rows, columns = shape
            yield TensorSpec(f"{module}.weight", "I8", (rows, columns // 2))
            yield TensorSpec(f"{module}.scale", "F8_E8M0", (rows, columns // 32))
        elif name.is_linear:
            tiles = (-(-shape[0] // 128), -(-shape[1] // 128))
            yield TensorSpec(f"{module}.weight", "F8_E4M3", shape)
            yield TensorSpec(f"{module}.scale", "F8_E8M0", tiles)
        elif module.rpartition(".")[2] in ("attn_sink", "bias") or "hc_" in module:
            yield TensorSpec(module, "F32", shape)
        else:
            yield TensorSpec(f"{module}.weight", "BF16", shape)


def _values(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    if spec.dtype == "I8":
        data = torch.randint(0, 256, spec.shape, generator=generator, dtype=torch.uint8)
        return data.view(torch.int8)
    if spec.dtype == "F8_E8M0":
        data = torch.randint(115, 122, spec.shape, generator=generator, dtype=torch.uint8)
        return data.view(torch.float8_e8m0fnu)
    if spec.dtype == "F8_E4M3":
        # Codes 0 to 126 with either sign: every value but NaN.
        magnitude = torch.randint(0, 127, spec.shape, generator=generator, dtype=torch.uint8)
        sign = torch.randint(0, 2, spec.shape, generator=generator, dtype=torch.uint8) << 7
        return (magnitude | sign).view(torch.float8_e4m3fn)
    dtype = torch.bfloat16 if spec.dtype == "BF16" else torch.float32
    return torch.randn(spec.shape, generator=generator).mul_(0.02).to(dtype)
