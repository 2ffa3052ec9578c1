"""A second set of seeded defects: what a converter that edits config.json by hand gets wrong.

Written against the first set's blind spots: constants lost from config.json, an FP8 table that
excludes what is stored in FP8, promises of a compressed-tensors table, scalars the wrong way up,
tensors turned, retyped or packed along the other axis. `WARNED` load, with a loss.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from tests.support.defects import (
    INT4,
    NVFP4,
    Break,
    Defect,
    config,
    drop,
    narrow,
    quantization,
    rename,
    target,
    weights,
)
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor

MXFP4 = "mxfp4"
CONSTANTS = (
    *("rope_theta", "compress_rope_theta", "rope_scaling", "sliding_window", "index_topk"),
    *("qk_rope_head_dim", "rms_norm_eps", "hc_eps", "hc_sinkhorn_iters"),
)


def each(suffix: str, change: Callable[[StoredTensor], StoredTensor], within: str = "") -> Break:
    """Replace the tensors that end so."""

    def damage(c: EditableCheckpoint) -> None:
        for name in [n for n in c.names if n.endswith(suffix) and within in n]:
            c[name] = change(c[name])

    return damage


def turned(t: StoredTensor) -> StoredTensor:
    """The same bytes with the axes swapped."""
    return StoredTensor(t.dtype, t.shape[::-1], t.data)


def zeros(dtype: str, size: int) -> Callable[[StoredTensor], StoredTensor]:
    """Zeros of another dtype of `size` bytes, of the same shape."""

    def change(t: StoredTensor) -> StoredTensor:
        count = 1
        for n in t.shape:
            count *= n
        return StoredTensor(dtype, t.shape, bytes(size * count))

    return change


def called(dtype: str) -> Callable[[StoredTensor], StoredTensor]:
    """The same bytes called by another dtype of the same size."""
    return lambda t: StoredTensor(dtype, t.shape, t.data)


def number(value: float) -> Callable[[StoredTensor], StoredTensor]:
    """Another float32 scalar."""
    return lambda t: StoredTensor("F32", t.shape, struct.pack("<f", value))


def words_as_bytes(t: StoredTensor) -> StoredTensor:
    return StoredTensor("U8", (t.shape[0], 4 * t.shape[1]), t.data)


def packed_along_rows(t: StoredTensor) -> StoredTensor:
    return StoredTensor("I32", (t.shape[0] // 8, 8 * t.shape[1]), t.data)


def half_k(t: StoredTensor) -> StoredTensor:
    rows, columns = struct.unpack("<qq", t.data)
    return StoredTensor("I64", (2,), struct.pack("<qq", rows, columns // 2))


def one_fp8_expert(c: EditableCheckpoint) -> None:
    """One projection of one expert in another scheme than its neighbours."""
    base = "layers.1.ffn.experts.2.w2"
    c[f"{base}.weight"] = StoredTensor("F8_E4M3", (128, 128), bytes(128 * 128))
    c[f"{base}.scale"] = StoredTensor("F8_E8M0", (1, 1), bytes(1))


def row_scales(c: EditableCheckpoint) -> None:
    """FP8 attention with a scale per row instead of a tile."""
    for name in [n for n in c.names if ".attn." in n and n.endswith(".scale")]:
        rows = c[name.removesuffix("scale") + "weight"].shape[0]
        c[name] = StoredTensor("F32", (rows, 1), bytes(4 * rows))


def plain_draft_projection(c: EditableCheckpoint) -> None:
    c.remove("mtp.0.e_proj.scale")
    c["mtp.0.e_proj.weight"] = StoredTensor("BF16", (128, 128), bytes(2 * 128 * 128))


def table(**changes: Any) -> Break:
    """Set entries of quantization_config."""
    return quantization(lambda q: q.update(changes))


def top_format(q: dict[str, Any]) -> None:
    q["config_groups"]["group_0"].pop("format", None)
    q["format"] = "float-quantized"


KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
ROTATION = {"config_groups": {"R1": {"type": "hadamard"}}}
WARNED = [
    *(Defect(f"{key} lost", MXFP4, "vllm", config(**{key: None})) for key in CONSTANTS),
    Defect("float16", MXFP4, "vllm", config(torch_dtype="float16")),
    Defect("three drafts promised, one there", MXFP4, "vllm", config(num_nextn_predict_layers=3)),
    Defect("drafts denied and there", MXFP4, "sglang", config(num_nextn_predict_layers=0)),
    Defect("scale_fmt lost", MXFP4, "vllm", quantization(lambda q: q.pop("scale_fmt"))),
    Defect("scales of a KV cache promised", INT4, "vllm", table(kv_cache_scheme=KV_CACHE)),
    Defect("router bias in BF16", MXFP4, "vllm", narrow("gate.bias")),
]  # fmt: skip
MORE_DEFECTS = [
    *WARNED,
    Defect("INT4 words as bytes", INT4, "vllm", each("weight_packed", words_as_bytes)),
    Defect("INT4 packed along the rows", INT4, "vllm", each("weight_packed", packed_along_rows)),
    Defect("scales turned", INT4, "sglang", each("weight_scale", turned)),
    Defect("weight_shape halved", INT4, "transformers", each("weight_shape", half_k)),
    Defect("E8M0 scales decoded to floats", MXFP4, "vllm", each(".scale", zeros("F32", 4), ".experts.")),
    Defect("dense scales decoded to floats", MXFP4, "vllm", each(".scale", zeros("F32", 4), ".attn.")),
    Defect("dense scales in BF16", "fp8", "sglang", each(".scale", zeros("BF16", 2), ".attn.")),
    Defect("dense scales by rows", "fp8", "vllm", row_scales),
    Defect("E5M2 weights", "fp8", "vllm", each("wq_b.weight", called("F8_E5M2"))),
    Defect("hash table dropped", MXFP4, "vllm", drop("tid2eid")),
    Defect("hash table as floats", MXFP4, "sglang", each("tid2eid", zeros("F32", 4))),
    Defect("hash table turned", MXFP4, "vllm", each("tid2eid", turned)),
    Defect("hash layers miscounted", MXFP4, "vllm", config(num_hash_layers=3)),
    Defect("compress_ratios of another model", MXFP4, "vllm", config(compress_ratios=[4, 4, 128, 4, 0])),
    Defect("static activations", MXFP4, "vllm", table(activation_scheme="static")),
    Defect("E5M2 declared", "fp8", "sglang", table(fmt="e5m2")),
    Defect("FP8 attention excluded", MXFP4, "vllm", table(modules_to_not_convert=["model.layers.1.attn.wq_b"])),
    Defect("FP8 experts excluded", MXFP4, "vllm", table(ignored_layers=["layers.1.ffn.experts"])),
    Defect("FP8 output excluded", MXFP4, "sglang", table(ignored_layers=["model.layers.1.self_attn.wo_b"])),
    Defect("a layer excluded", MXFP4, "transformers", table(modules_to_not_convert=["model.layers.1."])),
    Defect("architectures of V3", MXFP4, "vllm", config(architectures=["DeepseekV3ForCausalLM"])),
    Defect("architectures lost", MXFP4, "sglang", config(architectures=None)),
    Defect("embeddings tied", MXFP4, "vllm", config(tie_word_embeddings=True)),
    Defect("two shared experts", MXFP4, "vllm", config(n_shared_experts=2)),
    Defect("no clamp", MXFP4, "vllm", config(swiglu_limit=0)),
    Defect("router of V3", MXFP4, "sglang", config(scoring_func="sigmoid")),
    Defect("experts miscounted", MXFP4, "vllm", config(n_routed_experts=8)),
    Defect("experts chosen miscounted", MXFP4, "vllm", config(num_experts_per_tok=3)),
    Defect("vocabulary padded", MXFP4, "vllm", config(vocab_size=512)),
    Defect("index heads miscounted", MXFP4, "vllm", config(index_n_heads=8)),
    Defect("another head_dim", MXFP4, "transformers", config(head_dim=64)),
    Defect("format above the groups misstated", INT4, "vllm", quantization(top_format)),
    Defect("gate_proj caught by an ignore", INT4, "sglang", quantization(lambda q: q["ignore"].append("re:.*(e_proj|h_proj)$"))),
    Defect("w3 forgotten by the target", INT4, "vllm", target("group_0", [r"re:.*\.experts\.\d+\.(w1|w2|gate_proj|down_proj)$"])),
    Defect("strategy says channel", INT4, "vllm", weights(strategy="channel")),
    Defect("type says float", INT4, "vllm", weights(type="float")),
    Defect("status says frozen", INT4, "transformers", table(quantization_status="frozen")),
    Defect("rotations promised", INT4, "vllm", table(transform_config=ROTATION)),
    Defect("sparsity promised", INT4, "vllm", table(sparsity_config={"format": "sparse-24-bitmask"})),
    Defect("global scale is its reciprocal", NVFP4, "vllm", each("weight_scale_2", number(4096.0))),
    Defect("input scale negative", NVFP4, "vllm", each("w2.input_scale", number(-1.0))),
    Defect("NVFP4 in groups of 32", NVFP4, "vllm", table(group_size=32)),
    Defect("group_size lost", "nvfp4@sglang", "sglang", quantization(lambda q: q.pop("group_size"))),
    Defect("quant_algo lost", "nvfp4@sglang", "sglang", quantization(lambda q: q.pop("quant_algo"))),
    Defect("NVFP4 scales called E8M0", NVFP4, "vllm", each("weight_scale", called("F8_E8M0"))),
    Defect("NVFP4 promised over MXFP4", MXFP4, "vllm", table(moe_quant_algo="NVFP4")),
    Defect("one projection in another scheme", MXFP4, "vllm", one_fp8_expert),
    Defect("weight_scale_inv beside native names", MXFP4, "sglang", rename("wq_a.scale", "wq_a.weight_scale_inv")),
    Defect("draft wo_a without its scale", MXFP4, "vllm", drop("mtp.0.attn.wo_a.scale")),
    Defect("draft projection in BF16", MXFP4, "vllm", plain_draft_projection),
    Defect("draft norm missing", MXFP4, "vllm", drop("mtp.0.enorm.weight")),
    Defect("router in FP8", MXFP4, "vllm", each("layers.2.ffn.gate.weight", zeros("F8_E4M3", 1))),
    Defect("indexer weights in FP8", MXFP4, "vllm", each("indexer.weights_proj.weight", zeros("F8_E4M3", 1))),
    Defect("embedding in INT8", MXFP4, "vllm", each("embed.weight", zeros("I8", 1))),
    Defect("head missing", MXFP4, "vllm", drop("head.weight")),
    Defect("hc_head missing", MXFP4, "sglang", drop("hc_head_fn")),
    Defect("sinks missing", MXFP4, "sglang", drop("layers.2.attn.attn_sink")),
]  # fmt: skip
