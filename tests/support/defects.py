"""Defects seeded into good checkpoints: what published conversions of DeepSeek-V4 got wrong.

Each takes an `EditableCheckpoint` and breaks one thing. They follow failures reported by users:
names and ignore lists that engines misread, packed bytes in the wrong dtype, fused halves that
disagree, absent or unequal scalars, draft stages in the form the engine does not take, protected
tensors in BF16, keys lost from config.json.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.shard_bytes import EditableCheckpoint, StoredTensor

Break = Callable[[EditableCheckpoint], None]
EXPERT = "layers.1.ffn.experts.2"
ATTENTION = "layers.1.attn"


@dataclass(frozen=True)
class Defect:
    """A defect: what it starts from (a case of `conversion.recipe_of`), for which engine."""

    name: str
    case: str
    engine: str
    damage: Break


def config(**changes: Any) -> Break:
    """Set keys of config.json; None removes one."""

    def damage(c: EditableCheckpoint) -> None:
        for key, value in changes.items():
            c.config.pop(key, None)
            if value is not None:
                c.config[key] = value

    return damage


def quantization(change: Callable[[dict[str, Any]], object]) -> Break:
    """Change quantization_config in place."""
    return lambda c: (change(c.config["quantization_config"]), None)[1]


def rename(old: str, new: str) -> Break:
    """Give tensors whose name holds `old` another name."""

    def damage(c: EditableCheckpoint) -> None:
        for name in [n for n in c.names if old in n]:
            c.rename(name, name.replace(old, new))

    return damage


def drop(*suffixes: str) -> Break:
    """Remove tensors that end so."""

    def damage(c: EditableCheckpoint) -> None:
        for name in [n for n in c.names if n.endswith(suffixes)]:
            c.remove(name)

    return damage


def retype(name: str, dtype: str) -> Break:
    """Say another dtype of the same size."""

    def damage(c: EditableCheckpoint) -> None:
        c[name].dtype = dtype

    return damage


def narrow(suffix: str) -> Break:
    """Store F32 tensors as BF16, as save_pretrained does."""

    def damage(c: EditableCheckpoint) -> None:
        for name in [n for n in c.names if n.endswith(suffix)]:
            data = c[name].data
            halves = b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))
            c[name] = StoredTensor("BF16", c[name].shape, halves)

    return damage


def scalar(name: str, value: float) -> Break:
    """Overwrite a float32 scalar."""

    def damage(c: EditableCheckpoint) -> None:
        c[name].data = struct.pack("<f", value)

    return damage


def reshape(name: str, shape: tuple[int, ...]) -> Break:
    """Say another shape, with zeros as data."""

    def damage(c: EditableCheckpoint) -> None:
        old = c[name]
        size = len(old.data)
        for n in old.shape:
            size //= max(n, 1)
        count = max(size, 1)
        for n in shape:
            count *= n
        c[name] = StoredTensor(old.dtype, shape, bytes(count))

    return damage


def target(group: str, targets: list[str]) -> Break:
    """Replace a group's targets."""
    return quantization(lambda q: q["config_groups"][group].update(targets=targets))


def weights(**changes: Any) -> Break:
    """Change the experts' weight arguments."""
    return quantization(lambda q: q["config_groups"]["group_0"]["weights"].update(changes))


def int4_wo_a(c: EditableCheckpoint) -> None:
    """wo_a declared and stored as INT4."""
    for name in [n for n in c.names if n.endswith("attn.wo_a.weight")]:
        rows, columns = c[name].shape
        base = name.removesuffix(".weight")
        c.remove(name)
        c[f"{base}.weight_packed"] = StoredTensor(
            "I32", (rows, columns // 8), bytes(rows * columns // 2)
        )
        c[f"{base}.weight_scale"] = StoredTensor(
            "BF16", (rows, columns // 32), bytes(rows * columns // 16)
        )
        c[f"{base}.weight_shape"] = StoredTensor("I64", (2,), struct.pack("<qq", rows, columns))
    q = c.config["quantization_config"]
    q["config_groups"]["group_0"]["targets"].append(r"re:.*attn\.(wo_a|o_a_proj)$")
    q["ignore"] = [i for i in q["ignore"] if "attn" not in i]


INT4, VLLM4, NVFP4 = "int4-g32", "int4-g32@vllm", "nvfp4"
LOST_KEYS = ("topk_method", "scoring_func", "norm_topk_prob", "swiglu_limit")
DEFECTS = [
    Defect("names as save_pretrained writes them", "mxfp4", "vllm", rename("layers.", "model.layers.")),
    Defect("one projection misspelt", "mxfp4", "vllm", rename("attn.wo_b.weight", "attn.o_b.weight")),
    Defect("weight_scale instead of scale", "mxfp4", "vllm", rename("attn.wq_a.scale", "attn.wq_a.weight_scale")),
    Defect("scale instead of weight_scale", VLLM4, "vllm", rename("attn.wq_b.weight_scale", "attn.wq_b.scale")),
    Defect("weight_scale_inv under compressed-tensors", VLLM4, "vllm", rename("wo_b.weight_scale", "wo_b.weight_scale_inv")),
    Defect("excluded attention left FP8", VLLM4, "vllm", quantization(lambda q: q["ignore"].append("re:.*attn.*"))),
    Defect("half of a fused pair ignored", VLLM4, "vllm", quantization(lambda q: q["ignore"].append(r"re:.*attn\.wkv$"))),
    Defect("half of a fused pair in the target", VLLM4, "vllm", target("group_1", [r"re:.*attn\.wq_a$"])),
    Defect("half of an expert pair ignored", INT4, "vllm", quantization(lambda q: q["ignore"].append(r"re:.*experts\.\d+\.w3$"))),
    Defect("experts ignored altogether", INT4, "vllm", quantization(lambda q: q["ignore"].append("re:.*experts.*"))),
    Defect("targets of another model", INT4, "vllm", target("group_0", [r"re:.*mlp\.experts\.\d+\.up_proj$"])),
    Defect("targets that no regular expression is", INT4, "vllm", target("group_0", ["re:.*experts\\.(\\d+"])),
    Defect("target Linear without ignores", INT4, "vllm", quantization(lambda q: (q["config_groups"]["group_0"].update(targets=["Linear"]), q.update(ignore=[])))),
    Defect("SGLang's ignores absent", INT4, "sglang", quantization(lambda q: q.update(ignore=[]))),
    Defect("dense targets only vLLM knows", VLLM4, "transformers", target("group_1", [r"re:.*attn\.(wq_a|wq_b|wkv|wo_a|wo_b)$"])),
    Defect("vLLM's file for SGLang", VLLM4, "sglang", lambda c: None),
    Defect("SGLang's file for vLLM", "int4-g32@sglang", "vllm", lambda c: None),
    Defect("INT4 output projection", INT4, "vllm", int4_wo_a),
    Defect("group size misstated", INT4, "vllm", weights(group_size=128)),
    Defect("bits misstated", INT4, "vllm", weights(num_bits=8)),
    Defect("zero points promised", INT4, "vllm", weights(symmetric=False)),
    Defect("activation order by group", INT4, "vllm", weights(actorder="group")),
    Defect("group format misstated", INT4, "vllm", quantization(lambda q: q["config_groups"]["group_0"].update(format="float-quantized"))),
    Defect("FP4 taken for INT8", "mxfp4", "vllm", config(quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}})),
    Defect("quantization_config lost", "mxfp4", "vllm", config(quantization_config=None)),
    Defect("expert_dtype says FP8", "mxfp4", "vllm", config(expert_dtype="fp8")),
    Defect("expert_dtype says FP4 of FP8", "fp8", "vllm", config(expert_dtype="fp4")),
    Defect("block size says 32x32", "mxfp4", "vllm", quantization(lambda q: q.update(weight_block_size=[32, 32]))),
    Defect("no block size", "mxfp4", "vllm", quantization(lambda q: q.pop("weight_block_size"))),
    Defect("moe_quant_algo lost", NVFP4, "vllm", quantization(lambda q: q.pop("moe_quant_algo"))),
    Defect("input_scale absent", NVFP4, "vllm", drop("input_scale")),
    Defect("input_scale zero", NVFP4, "vllm", scalar(f"{EXPERT}.w1.input_scale", 0.0)),
    Defect("global scales of w1 and w3 differ", NVFP4, "vllm", scalar(f"{EXPERT}.w3.weight_scale_2", 0.5)),
    Defect("global scale absent", NVFP4, "vllm", drop("w2.weight_scale_2")),
    Defect("global scale NaN", NVFP4, "sglang", scalar(f"{EXPERT}.w2.weight_scale_2", float("nan"))),
    Defect("drafts NVFP4 for SGLang", NVFP4, "sglang", lambda c: None),
    Defect("drafts MXFP4 for vLLM", "nvfp4@sglang", "vllm", lambda c: None),
    Defect("NVFP4 for transformers", NVFP4, "transformers", lambda c: None),
    Defect("drafts promised and absent", "mxfp4", "vllm", lambda c: [c.remove(n) for n in c.names if n.startswith("mtp.")] and None),
    Defect("an expert's scale in no shard", "mxfp4", "vllm", drop("experts.3.w2.scale")),
    Defect("a whole expert missing", "mxfp4", "sglang", lambda c: [c.remove(n) for n in c.names if "layers.2.ffn.experts.1." in n] and None),
    Defect("router bias missing", "mxfp4", "vllm", drop("layers.3.ffn.gate.bias")),
    Defect("hyper-connections in BF16", "mxfp4", "vllm", narrow("hc_attn_fn")),
    Defect("sinks in BF16", INT4, "vllm", narrow("attn_sink")),
    Defect("position bias in BF16", INT4, "transformers", narrow("compressor.ape")),
    Defect("packed words as floats", INT4, "vllm", retype(f"{EXPERT}.w1.weight_packed", "F32")),
    Defect("scales of another block", "mxfp4", "vllm", reshape(f"{ATTENTION}.wq_b.scale", (8, 4))),
    Defect("nibbles as BF16 numbers", "mxfp4", "vllm", lambda c: c.__setitem__(f"{EXPERT}.w2.weight", StoredTensor("BF16", (128, 128), bytes(32768)))),
    Defect("compressor quantized", "mxfp4", "vllm", lambda c: c.__setitem__("layers.1.attn.compressor.wkv.scale", StoredTensor("F32", (1, 1), bytes(4)))),
    Defect("one layer too many", "mxfp4", "sglang", config(num_hidden_layers=3)),
    Defect("another model's tensors", "mxfp4", "sglang", lambda c: c.__setitem__("layers.0.attn.q_proj.weight", StoredTensor("BF16", (1,), bytes(2)))),
    Defect("expert_dtype left in an INT4 file", INT4, "vllm", config(expert_dtype="fp4")),
    Defect("INT3 for SGLang", "int3-g128", "sglang", lambda c: None),
    Defect("compressed-tensors for TensorRT-LLM", INT4, "tensorrt-llm", lambda c: None),
    Defect("model_type of V3", "mxfp4", "vllm", config(model_type="deepseek_v3")),
    *(Defect(f"{key} lost", "mxfp4", "vllm", config(**{key: None})) for key in LOST_KEYS if key != "swiglu_limit"),
]  # fmt: skip
