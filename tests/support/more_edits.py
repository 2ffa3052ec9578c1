"""More edits of a checkpoint: of its scales, its files, its index and what lies beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.formats.test_naming import as_transformers, floats, left_out, nested_rope, other_key
from tests.support.edits import Walk
from tests.support.other_tools import decode, is_expert, stored
from tests.support.shard_bytes import INDEX, StoredTensor, honest_shard

_FLOAT_SCALES = {"F32": np.float32, "F16": np.float16}


def _scales(w: Walk, *dtypes: str) -> Callable[[str], bool]:
    endings = (".scale", ".weight_scale", ".weight_scale_inv", ".scales", ".weight_scale_2")
    endings += (".weight_global_scale",)
    return lambda n: n.endswith(endings) and (not dtypes or w.checkpoint[n].dtype in dtypes)


def _spelling(w: Walk) -> None:
    """The same configuration in other keys."""
    if "compress_ratios" not in w.checkpoint.config or w.configured:
        return
    change = w.rng.choice((as_transformers, nested_rope, left_out, other_key, floats))
    change(w.checkpoint.config)
    w.configured = True
    w.said(f"config {change.__name__}", keeps=True)


def _relay(w: Walk) -> None:
    """Only one edit of a walk may deal with files; the others would undo it."""
    if w.relaid:
        raise IndexError
    w.relaid = True


def _one_file(w: Walk) -> None:
    """All shards as one, with or without an index."""
    _relay(w)
    tensors = {n: t for shard in w.checkpoint.shards.values() for n, t in shard.items()}
    w.checkpoint.shards = {"model.safetensors": tensors}
    w.said("one file", keeps=True)
    if w.rng.random() < 0.5:
        w.later(lambda folder: (folder / INDEX).unlink(), "no index", keeps=True)


def _more_files(w: Walk) -> None:
    """Tensors dealt out anew to any number of shards."""
    _relay(w)
    names = w.checkpoint.names
    tensors = {n: w.checkpoint[n] for n in names}
    count = w.rng.randrange(2, 6)
    shards: dict[str, dict[str, StoredTensor]] = {
        f"model-{i + 1:05d}-of-{count:05d}.safetensors": {} for i in range(count)
    }
    for name in names:
        w.rng.choice(list(shards.values()))[name] = tensors[name]
    w.checkpoint.shards = {f: t for f, t in shards.items() if t}
    w.said(f"{count} files", keeps=True)


def _index_metadata(w: Walk) -> None:
    told = w.rng.choice((None, {}, {"total_size": 1}, {"total_size": "12 GB"}, []))

    def change(folder: Path) -> None:
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text())
            (folder / INDEX).write_text(json.dumps({"metadata": told, **index}))

    w.later(change, f"index metadata {told}", keeps=True)


def _scale_name(w: Walk) -> None:
    """Names that other tools have for a scale."""
    old = w.pick(lambda n: n.endswith(".scale"))
    new = old.removesuffix("scale") + w.rng.choice(("weight_scale_inv", "weight_scale"))
    w.checkpoint.rename(old, new)
    w.said(f"scale named {new}", keeps=True)


def _as_f4(w: Walk) -> None:
    name = w.pick(lambda n: is_expert(n) and w.checkpoint[n].dtype in ("I8", "U8")
                  and n.endswith(".weight"))  # fmt: skip
    tensor = w.checkpoint[name]
    tensor.dtype, tensor.shape = "F4", (tensor.shape[0], 2 * tensor.shape[1])
    w.said(f"{name} as F4", keeps=True)


def _scale_shape(w: Walk) -> None:
    """A scale without its dimensions of one, with more of them, or flat."""
    tensor = w.checkpoint[name := w.pick(_scales(w))]
    squeezed = tuple(n for n in tensor.shape if n != 1)
    flat = (int(np.prod(tensor.shape)),)
    shapes = {squeezed, flat, (*tensor.shape, 1), (1, *tensor.shape)} - {tensor.shape}
    tensor.shape = w.rng.choice(sorted(shapes))
    w.said(f"{name} shaped {tensor.shape}", keeps=None)


def _turned_scale(w: Walk) -> None:
    """Scales stored the other way round, as tools whose matrices are [in, out] have them."""

    def flat(name: str) -> bool:
        shape = w.checkpoint[name].shape
        return _scales(w)(name) and len(shape) == 2 and min(shape) > 1

    tensor = w.checkpoint[name := w.pick(flat)]
    width = len(tensor.data) // int(np.prod(tensor.shape))
    raw = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape, width)
    tensor.data = np.ascontiguousarray(raw.transpose(1, 0, 2)).tobytes()
    if tensor.shape[0] == tensor.shape[1]:
        raise IndexError  # nobody can see this
    tensor.shape = (tensor.shape[1], tensor.shape[0])
    w.said(f"{name} turned", keeps=None)


def _reciprocal(w: Walk) -> None:
    """Scales that are to be divided by."""
    tensor = w.checkpoint[name := w.pick(_scales(w, "F8_E8M0", "F32", "F16", "BF16"))]
    if tensor.dtype == "F8_E8M0":
        exponents = np.frombuffer(tensor.data, np.uint8).astype(int)
        tensor.data = (254 - exponents).clip(0, 254).astype(np.uint8).tobytes()
    elif tensor.dtype == "BF16":
        values = torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16)
        w.checkpoint[name] = stored(values.float().reciprocal().bfloat16().view(tensor.shape))
    else:
        kind = _FLOAT_SCALES[tensor.dtype]
        values = np.frombuffer(tensor.data, kind).astype(np.float64)
        tensor.data = (1 / values).astype(kind).tobytes()
    w.said(f"{name} reciprocal", keeps=False)


def _not_a_number(w: Walk) -> None:
    patterns = {"F32": b"\0\0\xc0\x7f", "BF16": b"\xc0\x7f", "F16": b"\0\x7e",
                "F8_E4M3": b"\x7f", "F8_E8M0": b"\xff"}  # fmt: skip
    tensor = w.checkpoint[name := w.pick(lambda n: w.checkpoint[n].dtype in patterns)]
    pattern = patterns[tensor.dtype]
    place = w.rng.randrange(len(tensor.data) // len(pattern)) * len(pattern)
    tensor.data = tensor.data[:place] + pattern + tensor.data[place + len(pattern) :]
    w.said(f"NaN in {name}", keeps=False)


def _half_a_stage(w: Walk) -> None:
    stages = sorted({n.split(".")[1] for n in w.checkpoint.names if n.startswith("mtp.")})
    stage = f"mtp.{w.rng.choice(stages)}."
    names = [n for n in w.checkpoint.names if n.startswith(stage)]
    for name in w.rng.sample(names, w.rng.randrange(1, len(names))):
        w.checkpoint.remove(name)
        w.touched |= {name, name.rpartition(".")[0]}
    w.said(f"half of {stage}", keeps=False)


def _swapped_tensors(w: Walk) -> None:
    """Two matrices of different shapes under each other's name."""
    one = w.pick()
    other = w.pick(lambda n: w.checkpoint[n].shape != w.checkpoint[one].shape)
    w.checkpoint[one], w.checkpoint[other] = w.checkpoint[other], w.checkpoint[one]
    w.said(f"{one} <-> {other}", keeps=False)


def _twice(w: Walk) -> None:
    """A tensor in two shards."""
    _relay(w)
    name = w.pick()
    if len(w.checkpoint.shards) < 2:
        return
    others = [s for s in w.checkpoint.shards.values() if name not in s]
    w.rng.choice(others)[name] = w.checkpoint[name]
    w.said(f"{name} in two shards", keeps=False)


def _wrong_index(w: Walk) -> None:
    _relay(w)
    name = w.rng.choice(w.checkpoint.names)
    files = sorted(w.checkpoint.shards)

    def lie(index: dict[str, Any], kind: str) -> Any:
        table = index["weight_map"]
        if kind == "lacks":
            del table[name]
        elif kind == "promises":
            table["layers.9.attn.wq_a.weight"] = table[name]
        elif kind == "renames":
            table[f"{name}s"] = table.pop(name)
        elif kind == "no such file":
            table[name] = "model-00009-of-00009.safetensors"
        elif kind == "outside":
            table[name] = f"../{table[name]}"
        elif kind == "another file":
            table[name] = w.rng.choice([f for f in files if f != table[name]])
        elif kind == "a number":
            table[name] = 1
        elif kind == "empty":
            index["weight_map"] = {}
        elif kind == "list":
            return list(table)
        elif kind == "no map":
            return table
        return index

    kinds = ["lacks", "promises", "renames", "no such file", "outside", "a number", "empty",
             "list", "no map", "not JSON"]  # fmt: skip
    kinds += ["another file"] if len(files) > 1 else []
    kind = w.rng.choice(kinds)

    def change(folder: Path) -> None:
        path = folder / INDEX
        if kind == "not JSON":
            path.write_text(path.read_text()[:-9])
        else:
            path.write_text(json.dumps(lie(json.loads(path.read_text()), kind)))

    w.later(change, f"index: {kind} {name}", keeps=False)


def _beside(w: Walk) -> None:
    """Weights beside the model's own."""
    name = w.rng.choice(("adapter_model.safetensors", "lora.safetensors", "extra.safetensors",
                         "model-00003-of-00002.safetensors", "model.safetensors"))  # fmt: skip
    if name in w.checkpoint.shards:
        return
    data = honest_shard({"x": StoredTensor("F32", (1,), bytes(4))})
    w.later(lambda folder: (folder / name).write_bytes(data), f"beside: {name}", keeps=False)


def _lost_bytes(w: Walk) -> None:
    _relay(w)
    name = w.rng.choice(sorted(w.checkpoint.shards))
    cut = w.rng.choice((1, 7, 4096))
    grow = w.rng.random() < 0.3

    def change(folder: Path) -> None:
        path = folder / name
        os.truncate(path, path.stat().st_size + (cut if grow else -cut))

    w.later(change, f"{name} {'longer' if grow else 'shorter'} by {cut}", keeps=False)


def _wrong_kind(w: Walk) -> None:
    """A value of config.json of a kind that means nothing there."""
    config = w.checkpoint.config
    text = config.get("text_config", config)
    key = w.rng.choice(
        ("num_hidden_layers", "n_routed_experts", "hidden_size", "vocab_size", "head_dim",
         "compress_ratios", "o_groups", "num_experts_per_tok", "swiglu_limit", "rms_norm_eps",
         "rope_theta", "rope_scaling", "hc_mult", "sliding_window")
    )  # fmt: skip
    text[key] = w.rng.choice(("4", -1, 0, [], {}, True, 1e400, [4], "yarn"))
    w.said(f"config {key} = {text[key]!r}", keeps=False)


def _alias(w: Walk) -> None:
    """A second key for a number, which contradicts the first."""
    config = w.checkpoint.config
    text = config.get("text_config", config)
    alias, key = w.rng.choice(
        (("num_local_experts", "n_routed_experts"), ("num_experts", "n_routed_experts"),
         ("num_experts_per_token", "num_experts_per_tok"), ("moe_topk", "num_experts_per_tok"),
         ("top_k", "num_experts_per_tok"), ("n_layers", "num_hidden_layers"),
         ("num_layers", "num_hidden_layers"), ("dim", "hidden_size"),
         ("intermediate_size", "moe_intermediate_size"), ("n_heads", "num_attention_heads"))
    )  # fmt: skip
    text[alias] = text[key] + 3
    w.said(f"config {alias} {text[alias]} beside {key} {text[key]}", keeps=None)


def _some_decoded(w: Walk) -> None:
    """A fine-tune that touched one layer: its matrices in BF16."""
    stage = w.rng.choice(("layers.0.", "layers.2.", "mtp.0."))
    if any(t.startswith(stage) for t in w.touched):
        return
    decode(w.checkpoint, lambda m: m.startswith(stage))
    w.touched |= {n for n in w.checkpoint.names if n.startswith(stage)}
    w.touched |= {n.rpartition(".")[0] for n in w.touched if n.startswith(stage)}
    w.said(f"{stage} in BF16", keeps=True)


MORE_KEEPING = (
    _spelling, _one_file, _more_files, _index_metadata, _scale_name, _as_f4, _some_decoded,
)  # fmt: skip
OPEN = (_scale_shape, _turned_scale, _alias)
MORE_CHANGING = (
    _reciprocal, _reciprocal, _not_a_number, _half_a_stage, _swapped_tensors, _twice, _wrong_index,
    _wrong_index, _beside, _lost_bytes, _wrong_kind,
)  # fmt: skip
