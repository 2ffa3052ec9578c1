"""Writing a trained model as the release is written: official names, coded, one layer a file.

Routed experts become FP4 (two E2M1 in an I8, an E8M0 scale per 32 inputs), the other linears FP8
(E4M3, an E8M0 scale per 128x128 tile), hyper-connections, sinks, position biases and router biases
stay F32, the hash tables I64, the rest BF16. Which is which follows from the official name alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4quant_formats.deepseek_v4 import expert_module, parse_name
from v4quant_formats.shards import write_file_atomically, write_tensors
from v4quant_kernels.codec import quantize
from v4quant_kernels.scheme import SCHEMES

GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
}

_TOP = {
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}
_COMPRESSOR = {
    "position_bias": "ape",
    "kv_proj.weight": "wkv.weight",
    "gate_proj.weight": "wgate.weight",
    "kv_norm.weight": "norm.weight",
}
_LAYER = {
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    **{f"self_attn.compressor.{k}": f"attn.compressor.{v}" for k, v in _COMPRESSOR.items()},
    **{
        f"self_attn.compressor.indexer.{k}": f"attn.indexer.compressor.{v}"
        for k, v in _COMPRESSOR.items()
    },
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{
        f"{part}_hc.{leaf}": f"hc_{part}_{leaf}"
        for part in ("attn", "ffn")
        for leaf in ("fn", "base", "scale")
    },
}
_MTP = {
    **{f"{n}.weight": f"{n}.weight" for n in ("e_proj", "h_proj", "enorm", "hnorm", "norm")},
    **{f"hc_head.hc_{leaf}": f"hc_head_{leaf}" for leaf in ("fn", "base", "scale")},
}
_F32_ENDINGS = ("attn_sink", ".ape", ".gate.bias")


def write_release(
    out: Path,
    raw: Mapping[str, Any],
    trunk: Mapping[str, Tensor],
    mtp: Mapping[str, Tensor],
    tokenizer: Path,
    tokenizer_json: str,
) -> int:
    """Write a checkpoint folder and return its tensor bytes; the index is written last.

    trunk, mtp: state dicts of `DeepseekV4ForCausalLM` and `MtpStage`. tokenizer: folder of the
    tokenizer_config.json to copy. Raises NonFiniteWeight when training diverged.
    """
    return write_folder(
        out, raw, [dict(s) for s in _shards(raw, trunk, mtp)], tokenizer, tokenizer_json
    )


def write_folder(
    out: Path,
    raw: Mapping[str, Any],
    shards: Sequence[Mapping[str, Tensor]],
    tokenizer: Path,
    tokenizer_json: str,
) -> int:
    """Write shards and what lies beside them; the tensors' bytes. The index is written last."""
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(out / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    _write_json(out / "config.json", raw)
    _write_json(out / "generation_config.json", GENERATION_CONFIG)
    write_file_atomically(out / "tokenizer.json", tokenizer_json.encode())
    shutil.copyfile(tokenizer / "tokenizer_config.json", out / "tokenizer_config.json")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(out / "model.safetensors.index.json", index)
    return total


def official_layer(stage: str, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """One decoder layer under its official names, float tensors still uncoded.

    Fused experts `[E, 2I, d]` and `[E, d, I]` are taken apart: w1 gate, w3 up, w2 down.
    """
    for name, tensor in state.items():
        if name == "mlp.experts.gate_up_proj":
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                yield f"{expert_module(stage, expert, 'w1')}.weight", gate
                yield f"{expert_module(stage, expert, 'w3')}.weight", up
        elif name == "mlp.experts.down_proj":
            for expert, down in enumerate(tensor):
                yield f"{expert_module(stage, expert, 'w2')}.weight", down
        else:
            yield f"{stage}.{_LAYER[name]}", tensor


def coded(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one official float tensor: coded weight and scale, or one plain one."""
    parsed = parse_name(name)
    assert parsed is not None, name
    if parsed.is_linear:
        is_expert = parsed.role == "routed experts"
        q = quantize(tensor.float(), SCHEMES["mxfp4" if is_expert else "fp8"])
        assert q.scale is not None
        yield name, q.codes.view(torch.int8) if is_expert else q.codes
        yield f"{parsed.module}.scale", q.scale
    elif tensor.dtype == torch.int64:
        yield name, tensor
    elif "hc_" in name or name.endswith(_F32_ENDINGS):
        yield name, tensor.float()
    else:
        yield name, tensor.bfloat16()


def _shards(
    raw: Mapping[str, Any], trunk: Mapping[str, Tensor], mtp: Mapping[str, Tensor]
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The release's order: embedding, one layer a shard, final parts, one draft stage a shard."""
    final = [(official, trunk[name]) for name, official in _TOP.items()]
    yield _code(pair for pair in final if pair[0] == "embed.weight")
    for layer in range(raw["num_hidden_layers"]):
        yield _code(official_layer(f"layers.{layer}", _below(trunk, f"model.layers.{layer}.")))
    yield _code(pair for pair in final if pair[0] != "embed.weight")
    stage = list(official_layer("mtp.0", _below(mtp, "layer.")))
    stage += [(f"mtp.0.{official}", mtp[name]) for name, official in _MTP.items()]
    yield _code(iter(stage))


def _code(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield from coded(name, tensor)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
