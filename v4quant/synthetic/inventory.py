"""Which tensors a release holds, shard by shard: names, dtypes and shapes, no data.

Shard 1 is the embedding, one shard follows for each layer, then the final norm and head (with the
vision tower where there is one), then one for each draft stage. V4.1 begins with the vision tower
and keeps each n-gram table in a shard of its own at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from v4quant_formats.spec import TensorSpec

Specs = Iterator[TensorSpec]

_IMAGES = ("image_start", "image_end", "image_newline")
_VISION_SIZES = ("layers", "width", "inner", "patch", "ratio")
_VISION_KEYS = {
    "layers": "vision_n_layers",
    "width": "vision_dim",
    "inner": "vision_inter_dim",
    "patch": "vision_patch_size",
    "ratio": "vision_downsample_ratio",
}
_V41_VISION_KEYS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "inner": "intermediate_size",
    "patch": "patch_size",
    "ratio": "downsample_ratio",
}


@dataclass(frozen=True)
class Coding:
    """How a release stores matrices: FP8 tile side, dtype of FP8 scales, experts' format."""

    tile: int = 128
    scale: str = "F8_E8M0"
    experts: str = "fp4"


def coding_of(release: str) -> Coding:
    """The storage of a release: Base has FP8 experts and float32 scales, V4.1 32x32 tiles."""
    if release == "v41":
        return Coding(tile=32)
    return Coding(scale="F32", experts="fp8") if release.endswith("-base") else Coding()


def bf16(name: str, *shape: int) -> TensorSpec:
    """A BF16 tensor."""
    return TensorSpec(name, "BF16", shape)


def f32(name: str, *shape: int) -> TensorSpec:
    """An F32 tensor."""
    return TensorSpec(name, "F32", shape)


def fp8(module: str, rows: int, columns: int, coding: Coding) -> Specs:
    """An FP8 matrix and its scales, one per tile."""
    tiles = (-(-rows // coding.tile), -(-columns // coding.tile))
    yield TensorSpec(f"{module}.weight", "F8_E4M3", (rows, columns))
    yield TensorSpec(f"{module}.scale", coding.scale, tiles)


def expert_matrix(module: str, rows: int, columns: int, coding: Coding) -> Specs:
    """One matrix of a routed expert: FP4 with a scale per 32 inputs, or FP8 as in Base."""
    if coding.experts == "fp8":
        yield from fp8(module, rows, columns, coding)
        return
    yield TensorSpec(f"{module}.weight", "I8", (rows, columns // 2))
    yield TensorSpec(f"{module}.scale", "F8_E8M0", (rows, columns // 32))


def hyper_connection(name: str, outputs: int, scales: int, c: dict[str, Any]) -> Specs:
    """fn, base and scale of one hyper-connection (24 mixes and 3 scales) or of the head (4, 1)."""
    yield f32(f"{name}_fn", outputs, c["hc_mult"] * c["hidden_size"])
    yield f32(f"{name}_base", outputs)
    yield f32(f"{name}_scale", scales)


def stage(p: str, c: dict[str, Any], coding: Coding, experts: int) -> Specs:
    """What a layer of any kind and every draft stage holds, routing tables apart."""
    d, inner = c["hidden_size"], c["moe_intermediate_size"]
    q, heads = c["q_lora_rank"], c["num_attention_heads"] * c["head_dim"]
    out = c["o_groups"] * c["o_lora_rank"]
    yield from fp8(f"{p}.attn.wq_a", q, d, coding)
    yield from fp8(f"{p}.attn.wq_b", heads, q, coding)
    yield from fp8(f"{p}.attn.wkv", c["head_dim"], d, coding)
    yield from fp8(f"{p}.attn.wo_a", out, heads // c["o_groups"], coding)
    yield from fp8(f"{p}.attn.wo_b", d, out, coding)
    yield f32(f"{p}.attn.attn_sink", c["num_attention_heads"])
    yield bf16(f"{p}.attn.q_norm.weight", q)
    yield bf16(f"{p}.attn.kv_norm.weight", c["head_dim"])
    yield bf16(f"{p}.attn_norm.weight", d)
    yield bf16(f"{p}.ffn_norm.weight", d)
    mixes = c["hc_mult"] * (2 + c["hc_mult"])
    for sub in ("attn", "ffn"):
        yield from hyper_connection(f"{p}.hc_{sub}", mixes, 3, c)
    yield bf16(f"{p}.ffn.gate.weight", experts, d)
    for e in range(experts):
        for w, rows, columns in (("w1", inner, d), ("w2", d, inner), ("w3", inner, d)):
            yield from expert_matrix(f"{p}.ffn.experts.{e}.{w}", rows, columns, coding)
    for w, rows, columns in (("w1", inner, d), ("w2", d, inner), ("w3", inner, d)):
        yield from fp8(f"{p}.ffn.shared_experts.{w}", rows, columns, coding)


def routing(p: str, c: dict[str, Any], experts: int, hashed: bool, vision: bool) -> Specs:
    """Hash table or bias; Vision-Exp also biases hash layers and image tokens."""
    if hashed:
        table = (c["vocab_size"], c["num_experts_per_tok"])
        yield TensorSpec(f"{p}.ffn.gate.tid2eid", "I64", table)
    if vision or not hashed:
        yield f32(f"{p}.ffn.gate.bias", experts)
    if vision:
        yield f32(f"{p}.ffn.gate.bias_vl", experts)


def compressor(p: str, ratio: int, width: int, d: int) -> Specs:
    """A V4 compressor; at ratio 4 blocks overlap and every channel is doubled."""
    channels = 2 * width if ratio == 4 else width
    yield f32(f"{p}.ape", ratio, channels)
    yield bf16(f"{p}.wkv.weight", channels, d)
    yield bf16(f"{p}.wgate.weight", channels, d)
    yield bf16(f"{p}.norm.weight", width)


def v4_layer(c: dict[str, Any], layer: int, coding: Coding, vision: bool) -> Specs:
    """All tensors of trunk layer `layer`."""
    p, ratio, experts = f"layers.{layer}", c["compress_ratios"][layer], c["n_routed_experts"]
    yield from stage(p, c, coding, experts)
    yield from routing(p, c, experts, layer < c["num_hash_layers"], vision)
    if ratio:
        yield from compressor(f"{p}.attn.compressor", ratio, c["head_dim"], c["hidden_size"])
    if ratio == 4:
        rows = c["index_n_heads"] * c["index_head_dim"]
        indexer = f"{p}.attn.indexer"
        yield from fp8(f"{indexer}.wq_b", rows, c["q_lora_rank"], coding)
        yield bf16(f"{indexer}.weights_proj.weight", c["index_n_heads"], c["hidden_size"])
        width = c["index_head_dim"]
        yield from compressor(f"{indexer}.compressor", ratio, width, c["hidden_size"])


def v41_layer(c: dict[str, Any], layer: int, coding: Coding) -> Specs:
    """A V4.1 layer: compressor, indexer and Engram only where the config says."""
    p, d, head = f"layers.{layer}", c["hidden_size"], c["head_dim"]
    yield from stage(p, c, coding, c["n_routed_experts"])
    yield from routing(p, c, c["n_routed_experts"], hashed=False, vision=True)
    if layer in c["kv_source_layer_ids"]:
        yield bf16(f"{p}.attn.compressor.wkv.weight", head, d)
        if c["compress_ratios"][layer] > 1:
            yield bf16(f"{p}.attn.compressor.wgate.weight", head, d)
        yield bf16(f"{p}.attn.compressor.norm.weight", head)
        yield bf16(f"{p}.attn.indexer.wk.weight", c["index_head_dim"], head)
        yield bf16(f"{p}.attn.indexer.k_norm.weight", c["index_head_dim"])
    if layer in c["index_source_layer_ids"]:
        rows = c["index_n_heads"] * c["index_head_dim"]
        yield from fp8(f"{p}.attn.indexer.wq_b", rows, c["q_lora_rank"], coding)
        yield bf16(f"{p}.attn.indexer.weights_proj.weight", c["index_n_heads"], d)
    if layer in c["engram_layer_ids"]:
        yield from engram(f"{p}.engram", c, coding)


def engram_table(c: dict[str, Any], index: int) -> Specs:
    """The n-gram table of one Engram layer: a scale per row and 32 columns."""
    p = f"layers.{c['engram_layer_ids'][index]}.engram"
    rows, width = c["engram_num_embeddings"][index], c["engram_head_dim"]
    yield TensorSpec(f"{p}.embed.weight", "F8_E4M3", (rows, width))
    yield TensorSpec(f"{p}.embed.scale", "F8_E8M0", (rows, width // 32))


def engram(p: str, c: dict[str, Any], coding: Coding) -> Specs:
    """What an Engram layer makes of its rows."""
    d = c["hidden_size"]
    columns = (c["engram_max_ngram_size"] - 1) * c["engram_n_heads"] * c["engram_head_dim"]
    yield from fp8(f"{p}.wkv", (c["hc_mult"] + 1) * d, columns, coding)
    yield bf16(f"{p}.q_weight", c["hc_mult"], d)
    yield bf16(f"{p}.k_weight", c["hc_mult"], d)


def mtp_stage(c: dict[str, Any], coding: Coding) -> Specs:
    """The classic MTP layer; Base releases also carry copies of embedding and head."""
    p, d, experts = "mtp.0", c["hidden_size"], c["n_routed_experts"]
    yield from stage(p, c, coding, experts)
    yield from routing(p, c, experts, hashed=False, vision=False)
    for name in ("e_proj", "h_proj"):
        yield from fp8(f"{p}.{name}", d, d, coding)
    for name in ("enorm", "hnorm", "norm"):
        yield bf16(f"{p}.{name}.weight", d)
    yield from hyper_connection(f"{p}.hc_head", c["hc_mult"], 1, c)
    if coding.experts == "fp8":
        yield bf16(f"{p}.emb.tok_emb.weight", c["vocab_size"], d)
        yield bf16(f"{p}.head.weight", c["vocab_size"], d)


def dspark_stage(c: dict[str, Any], number: int, coding: Coding, vision: bool, v41: bool) -> Specs:
    """DSpark: three layers, of which the first reads the trunk and the last predicts."""
    p, d, rank = f"mtp.{number}", c["hidden_size"], c["dspark_markov_rank"]
    experts = c.get("dspark_n_routed_experts", c["n_routed_experts"])
    yield from stage(p, c, coding, experts)
    yield from routing(p, c, experts, hashed=False, vision=vision)
    if number == 0:
        yield from fp8(f"{p}.main_proj", d, len(c["dspark_target_layer_ids"]) * d, coding)
        yield bf16(f"{p}.main_norm.weight", d)
    if number == 2:
        yield bf16(f"{p}.norm.weight", d)
        if not v41:
            yield from hyper_connection(f"{p}.hc_head", c["hc_mult"], 1, c)
        for name in ("embed", "head") if v41 else ("markov_w1", "markov_w2"):
            yield bf16(f"{p}.markov_head.{name}.weight", c["vocab_size"], rank)
        yield bf16(f"{p}.confidence_head.proj.weight", 1, d + rank)


def vision_tower(config: dict[str, Any], names: dict[str, str], d: int) -> Specs:
    """Vision transformer and aligner.

    names: under which keys `config` holds layers, width, inner, patch and ratio.
    """
    layers, v, inner, patch, ratio = (int(config[names[k]]) for k in _VISION_SIZES)
    yield bf16("vision.patch_embed.proj.weight", v, 3 * patch * patch)
    yield bf16("vision.patch_embed.proj.bias", v)
    yield bf16("vision.norm.weight", v)
    for i in range(layers):
        p = f"vision.blocks.{i}"
        yield bf16(f"{p}.attn.wqkv.weight", 3 * v, v)
        yield bf16(f"{p}.attn.wqkv.bias", 3 * v)
        yield bf16(f"{p}.attn.wo.weight", v, v)
        yield bf16(f"{p}.attn.wo.bias", v)
        yield bf16(f"{p}.mlp.w1.weight", 2 * inner, v)
        yield bf16(f"{p}.mlp.w2.weight", v, inner)
        yield bf16(f"{p}.norm1.weight", v)
        yield bf16(f"{p}.norm2.weight", v)
    for name, columns in (("w1", v * ratio * ratio), ("w2", d)):
        yield bf16(f"aligner.{name}.weight", d, columns)
        yield bf16(f"aligner.{name}.bias", d)


def shards_of(release: str, config: dict[str, Any]) -> list[list[TensorSpec]]:
    """All tensors of a release, by shard, in the released order of shards."""
    return _v41_shards(config) if release == "v41" else _v4_shards(release, config)


def _v4_shards(release: str, c: dict[str, Any]) -> list[list[TensorSpec]]:
    coding, vision = coding_of(release), release == "vision"
    vocab, d = c["vocab_size"], c["hidden_size"]
    final = [bf16("norm.weight", d), bf16("head.weight", vocab, d)]
    final += hyper_connection("hc_head", c["hc_mult"], 1, c)
    if vision:
        final += vision_tower(c, _VISION_KEYS, d)
        final += [bf16(name, d) for name in (*_IMAGES, "image_pad")]
    shards = [[bf16("embed.weight", vocab, d)]]
    shards += [list(v4_layer(c, i, coding, vision)) for i in range(c["num_hidden_layers"])]
    shards.append(final)
    if "dspark_block_size" in c:
        shards += [list(dspark_stage(c, i, coding, vision, v41=False)) for i in range(3)]
    elif c["num_nextn_predict_layers"]:
        shards.append(list(mtp_stage(c, coding)))
    return shards


def _v41_shards(config: dict[str, Any]) -> list[list[TensorSpec]]:
    c, v, coding = config["text_config"], config["vision_config"], coding_of("v41")
    vocab, d = c["vocab_size"], c["hidden_size"]
    images = [bf16(name, d) for name in _IMAGES]
    shards = [list(vision_tower(v, _V41_VISION_KEYS, d)), [bf16("embed.weight", vocab, d), *images]]
    shards += [list(v41_layer(c, i, coding)) for i in range(c["num_hidden_layers"])]
    shards.append([bf16("norm.weight", d), bf16("head.weight", vocab, d)])
    shards += [list(dspark_stage(c, i, coding, vision=True, v41=True)) for i in range(3)]
    shards += [list(engram_table(c, i)) for i in range(len(c["engram_layer_ids"]))]
    return shards
