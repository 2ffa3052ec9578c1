"""Other tools' names and configs are read by one rule; what is not unique is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.conversion import TINY, convert
from tests.support.other_tools import decode, stored, values_of, write_with_index
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor
from v4quant.checks.verify import verify
from v4quant_formats.errors import DuplicateTensor, MissingShard, WrongDtype
from v4quant_formats.model_config import ConfigError, ModelConfig, parse_model_config
from v4quant_formats.naming import official_name
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight
from v4quant_formats.structure import find_defects
from v4quant_kernels.progress import SilentProgress

# What transformers' state_dict says of an official module below a layer (its own table, inverted).
_LAYER = [
    (r"\.attn\.indexer\.compressor\.wkv", ".self_attn.compressor.indexer.kv_proj"),
    (r"\.attn\.indexer\.compressor\.wgate", ".self_attn.compressor.indexer.gate_proj"),
    (r"\.attn\.indexer\.compressor\.norm", ".self_attn.compressor.indexer.kv_norm"),
    (r"\.attn\.indexer\.compressor\.ape", ".self_attn.compressor.indexer.position_bias"),
    (r"\.attn\.indexer\.wq_b", ".self_attn.compressor.indexer.q_b_proj"),
    (r"\.attn\.indexer\.weights_proj", ".self_attn.compressor.indexer.scorer.weights_proj"),
    (r"\.attn\.compressor\.wkv", ".self_attn.compressor.kv_proj"),
    (r"\.attn\.compressor\.wgate", ".self_attn.compressor.gate_proj"),
    (r"\.attn\.compressor\.norm", ".self_attn.compressor.kv_norm"),
    (r"\.attn\.compressor\.ape", ".self_attn.compressor.position_bias"),
    (r"\.attn\.w(q_a|q_b|o_a|o_b)\.", r".self_attn.\1_proj."),
    (r"\.attn\.wkv\.", ".self_attn.kv_proj."),
    (r"\.attn\.q_norm\.", ".self_attn.q_a_norm."),
    (r"\.attn\.kv_norm\.", ".self_attn.kv_norm."),
    (r"\.attn\.attn_sink", ".self_attn.sinks"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(\w+)", r".\1_hc.\2"),
    (r"\.ffn\.gate\.bias", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.(shared_experts|experts\.\d+)\.w1", r".mlp.\1.gate_proj"),
    (r"\.ffn\.(shared_experts|experts\.\d+)\.w3", r".mlp.\1.up_proj"),
    (r"\.ffn\.(shared_experts|experts\.\d+)\.w2", r".mlp.\1.down_proj"),
    (r"\.ffn\.gate", ".mlp.gate"),
]
_TOP = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}


def theirs(name: str) -> str:
    """transformers' name of an official tensor."""
    if name in _TOP:
        return _TOP[name]
    if name.startswith("hc_head_"):
        return f"model.hc_head.{name.removeprefix('hc_head_').join(('hc_', ''))}"
    for form, new in _LAYER:
        if re.search(form, name):
            return "model." + re.sub(form, new, name)
    return f"model.{name}"


def test_the_table_goes_both_ways() -> None:
    with open_checkpoint(TINY) as checkpoint:
        for name in checkpoint.tensors:
            assert official_name(name) == name
            assert official_name(theirs(name)) == name, theirs(name)
            assert official_name(f"model.{name}") == name
    for name in ("model.layers.0.mlp.experts.0.bias_proj.weight", "visual.x", "layers.0.attn.wq"):
        assert official_name(name) is None


def rename_all(checkpoint: EditableCheckpoint, chosen: Callable[[str], bool]) -> None:
    for name in checkpoint.names:
        if chosen(name):
            checkpoint.rename(name, theirs(name))


def weights(folder: Path) -> dict[str, bytes]:
    checkpoint = EditableCheckpoint.read(folder)
    return {n: checkpoint[n].data for n in checkpoint.names}


@pytest.mark.parametrize("share", [1, 2, 3], ids=["all", "half", "a third"])
def test_other_names_give_the_same_conversion(share: int, tmp_path: Path) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    rename_all(checkpoint, lambda n: sum(n.encode()) % share == 0)
    source = checkpoint.write(tmp_path / "source")
    with open_checkpoint(source) as opened:
        assert find_defects(opened).defects == () and opened.renamed
        assert set(opened.tensors) == set(EditableCheckpoint.read(TINY).names)
        for engine in ("vllm", "sglang"):
            found = preflight(opened, engine)
            assert not found.loads and any(f.rule == "name" for f in found.findings)
    convert(source, tmp_path / "out", "mxfp4")
    assert weights(tmp_path / "out") == weights(TINY)
    assert not verify(tmp_path / "out", source, SilentProgress()).findings


def test_fused_experts_are_slices(tmp_path: Path) -> None:
    plain = EditableCheckpoint.read(TINY)
    decode(plain)
    checkpoint = EditableCheckpoint.read(plain.write(tmp_path / "plain"))
    for stage in [f"layers.{i}" for i in range(4)]:

        def matrix(expert: int, projection: str, stage: str = stage) -> torch.Tensor:
            tensor = checkpoint[f"{stage}.ffn.experts.{expert}.{projection}.weight"]
            raw = torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16)
            return raw.view(tensor.shape)

        up = torch.stack([torch.cat([matrix(e, "w1"), matrix(e, "w3")]) for e in range(4)])
        down = torch.stack([matrix(e, "w2") for e in range(4)])
        for name in [n for n in checkpoint.names if n.startswith(f"{stage}.ffn.experts.")]:
            checkpoint.remove(name)
        checkpoint[f"model.{stage}.mlp.experts.gate_up_proj"] = stored(up)
        checkpoint[f"model.{stage}.mlp.experts.down_proj"] = stored(down)
    source = checkpoint.write(tmp_path / "fused")
    convert(source, tmp_path / "out", "mxfp4")
    assert weights(tmp_path / "out") == weights(TINY)
    checkpoint["model.layers.0.mlp.experts.down_proj"].shape = (4 * 128, 128)
    with pytest.raises(WrongDtype, match=r"not a stack of expert matrices"):
        open_checkpoint(checkpoint.write(tmp_path / "flat"))


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    norm = checkpoint["norm.weight"]
    checkpoint["model.norm.weight"] = StoredTensor(norm.dtype, norm.shape, norm.data)
    with pytest.raises(DuplicateTensor, match=r"'norm\.weight'.*both|both.*'norm\.weight'"):
        open_checkpoint(checkpoint.write(tmp_path))


def parsed(folder: Path, config: dict[str, Any]) -> ModelConfig:
    checkpoint = EditableCheckpoint.read(TINY)
    checkpoint.config = config
    with open_checkpoint(checkpoint.write(folder)) as opened:
        assert not [d for d in find_defects(opened).defects if d.blocking]
        return parse_model_config(dict(opened.config))


def tiny_config() -> dict[str, Any]:
    return dict(json.loads((TINY / "config.json").read_text()))


KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention",
         128: "heavily_compressed_attention"}  # fmt: skip


def as_transformers(config: dict[str, Any]) -> None:
    """What `save_pretrained` writes."""
    ratios = config.pop("compress_ratios")[: config["num_hidden_layers"]]
    hashed = config.pop("num_hash_layers")
    config["layer_types"] = [KINDS[r] for r in ratios]
    config["compress_rates"] = {KINDS[4]: 4, KINDS[128]: 128}
    config["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (len(ratios) - hashed)
    nested_rope(config)


def nested_rope(config: dict[str, Any]) -> None:
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "compress": {**scaling, "rope_type": "yarn", "attention_factor": 1.0,
                     "rope_theta": config["compress_rope_theta"]},
    }  # fmt: skip


def flat_rope(config: dict[str, Any]) -> None:
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = {**scaling, "rope_type": "yarn",
                                 "rope_theta": config.pop("rope_theta")}  # fmt: skip


def nested(config: dict[str, Any]) -> None:
    inner = {k: config.pop(k) for k in list(config) if k not in ("architectures", "model_type")}
    config["text_config"] = inner


def left_out(config: dict[str, Any]) -> None:
    del config["compress_ratios"], config["num_hash_layers"]


def other_key(config: dict[str, Any]) -> None:
    config["num_local_experts"] = config.pop("n_routed_experts")
    config["rope_scaling"]["rope_type"] = config["rope_scaling"].pop("type")


def floats(config: dict[str, Any]) -> None:
    config["hidden_size"] = float(config["hidden_size"])


@pytest.mark.parametrize(
    "change", [as_transformers, nested_rope, flat_rope, nested, left_out, other_key, floats]
)
def test_other_configs_mean_the_same(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    wanted, config = parsed(tmp_path / "plain", tiny_config()), tiny_config()
    assert wanted.yarn is not None
    change(config)
    found = parsed(tmp_path / "changed", config)
    layers = wanted.num_hidden_layers
    assert found.compress_ratios[:layers] == wanted.compress_ratios[:layers]
    for name in vars(wanted):
        if name not in ("raw", "compress_ratios", "layers", "facts"):
            assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(layer_types=[KINDS[0]] * 4), "'compress_ratios' and 'layer_types'"),
        (lambda c: c.update(mlp_layer_types=["moe"] * 4), "'num_hash_layers'"),
        (lambda c: c.update(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_scaling"),
        (lambda c: (c.pop("rope_scaling"), c.update(rope_parameters={"rope_type": "linear"})),
         "linear"),
        (lambda c: (flat_rope(c), c["rope_parameters"].update(attention_factor=1.2)),
         "attention_factor"),
        (lambda c: (nested_rope(c), c.update(rope_theta=5.0)), "'rope_theta'"),
        (lambda c: c.update(rope_scaling=None, rope_parameters={"full_attention": {}}),
         "'main' and 'compress'"),
        (lambda c: c.update(layer_types=[KINDS[0]]), "'layer_types' describes 1 layers"),
        (lambda c: c.update(mlp_layer_types=[]), "'mlp_layer_types' describes 0 layers"),
        (lambda c: c.update(partial_rotary_factor=0.9), "'partial_rotary_factor'"),
        (lambda c: c.update(num_local_experts=9), "'num_local_experts'"),
    ],
)  # fmt: skip
def test_two_things_said_are_refused(
    change: Callable[[dict[str, Any]], object], text: str, tmp_path: Path
) -> None:
    config = tiny_config()
    change(config)
    with pytest.raises(ConfigError, match=text):
        parsed(tmp_path, config)


@pytest.mark.parametrize(
    ("index", "loads"),
    [
        ("map", False), ("null", False), ("text", True), (None, False),
    ],
)  # fmt: skip
def test_indexes_as_tools_leave_them(index: str | None, loads: bool, tmp_path: Path) -> None:
    """Read by their weight_map, or without one; transformers wants metadata."""
    checkpoint = EditableCheckpoint.read(TINY)
    names = sorted(checkpoint.shards)
    parts = [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    checkpoint.shards = dict(zip(parts, (checkpoint.shards[n] for n in names), strict=True))
    table: dict[str, Any] = {"weight_map": {n: f for f, s in checkpoint.shards.items() for n in s}}
    if index == "null":
        table["metadata"] = None
    elif index == "text":
        table["metadata"] = {"total_size": "20764980.0"}
    folder = write_with_index(checkpoint, tmp_path, None if index is None else table)
    with open_checkpoint(folder) as opened:
        assert find_defects(opened).defects == ()
        assert preflight(opened, "transformers").loads == loads
    (folder / parts[0]).unlink()
    with pytest.raises(MissingShard, match=parts[0]):
        open_checkpoint(folder)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    folder = EditableCheckpoint.read(TINY).write(tmp_path)
    for name in ("config.json", "model.safetensors.index.json"):
        text = json.dumps(json.loads((folder / name).read_text()), indent=1)
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    with open_checkpoint(folder) as opened:
        assert find_defects(opened).defects == ()


def as_blocks(values: torch.Tensor, scales: bytes) -> tuple[bytes, bytes]:
    """gpt-oss's bytes of a matrix of MXFP4 values, found in its table of codes."""
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    codes = bytearray()
    groups = values.view(-1, 32).tolist()
    for group, exponent in zip(groups, scales, strict=True):
        numbers = [v / 2.0 ** (exponent - 127) for v in group]
        found = [table.index(abs(n)) + 8 * (math.copysign(1, n) < 0) for n in numbers]
        codes += bytes(low | high << 4 for low, high in zip(found[::2], found[1::2], strict=True))
    return bytes(codes), scales


def test_stacks_of_mxfp4_blocks_are_read(tmp_path: Path) -> None:
    checkpoint, stage = EditableCheckpoint.read(TINY), "layers.2.ffn.experts"
    stacks: dict[str, tuple[str, ...]] = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
    for fused, projections in stacks.items():
        modules = [f"{stage}.{e}.{p}" for e in range(4) for p in projections]
        parts = [as_blocks(values_of(checkpoint, m), checkpoint[f"{m}.scale"].data)
                 for m in modules]  # fmt: skip
        shape = (4, 128 * len(projections), 4)
        for name in [f"{m}.{part}" for m in modules for part in ("weight", "scale")]:
            checkpoint.remove(name)
        theirs = f"model.layers.2.mlp.experts.{fused}"
        blocks, scales = (b"".join(p[i] for p in parts) for i in (0, 1))
        checkpoint[f"{theirs}_blocks"] = StoredTensor("U8", (*shape, 16), blocks)
        checkpoint[f"{theirs}_scales"] = StoredTensor("U8", shape, scales)
    source = checkpoint.write(tmp_path / "source")
    with open_checkpoint(source) as opened:
        (note,) = find_defects(opened).notes
        assert "gate_up_proj_blocks is read as rows of gate, then rows of up" in note
    convert(source, tmp_path / "out", "mxfp4")
    assert weights(tmp_path / "out") == weights(TINY)
    checkpoint["model.layers.2.mlp.experts.down_proj_blocks"].shape = (4, 128, 2, 32)
    with pytest.raises(WrongDtype, match=r"in / 32, 16\] of bytes"):
        open_checkpoint(checkpoint.write(tmp_path / "other"))
