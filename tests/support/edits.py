"""Edits of a checkpoint as people and tools make them, each of which says what it did.

An edit kept the meaning (another dtype that holds the same values, another tool's name), or changed
it, or left it open: then a reader may refuse, or read the same values as before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.formats.test_naming import theirs
from tests.support.other_tools import NAMES, coded_modules, decode, is_expert, stored
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor

_BY_NAME = {name: dtype for dtype, name in NAMES.items()}


@dataclass
class Walk:
    """A checkpoint on its way. keeps: whether its meaning is still the release's; None where a
    reader may refuse. configured, relaid:
    whether config.json, or the order of files, has been edited. after: edits of files, done
    once the checkpoint is written."""

    checkpoint: EditableCheckpoint
    rng: random.Random
    keeps: bool | None = True
    configured: bool = False
    relaid: bool = False
    touched: set[str] = field(default_factory=set)
    done: list[str] = field(default_factory=list)
    after: list[Callable[[Path], object]] = field(default_factory=list)

    def pick(self, allowed: Callable[[str], bool] = lambda name: True) -> str:
        """A tensor no edit has touched, nor its module."""
        free = [
            n
            for n in self.checkpoint.names
            if allowed(n) and n.rpartition(".")[0] not in self.touched and n not in self.touched
        ]
        name = self.rng.choice(sorted(free))
        self.touched |= {name, name.rpartition(".")[0]}
        return name

    def said(self, what: str, keeps: bool | None) -> None:
        """An edit was done."""
        self.done.append(what)
        if self.keeps is not False and keeps is not True:
            self.keeps = keeps

    def later(self, change: Callable[[Path], object], what: str, keeps: bool) -> None:
        """An edit of the written folder."""
        self.after.append(change)
        self.said(what, keeps)

    def write(self, folder: Path) -> None:
        """Write it, with the edits of files."""
        self.checkpoint.write(folder)
        for change in self.after:
            change(folder)


def _rename(w: Walk) -> None:
    old = w.pick()
    parts = old.split(".")
    place = w.rng.randrange(len(parts))
    change = w.rng.choice(
        (
            lambda p: str(int(p) + 7) if p.isdecimal() else p + "_orig",
            lambda p: "0" + p,
            lambda p: p.upper() if p.upper() != p else "x" + p,
            lambda p: p[:-1] or "z",
        )
    )
    parts[place] = change(parts[place])
    new = w.rng.choice(("", "", "model.", "base_model.model.")) + ".".join(parts)
    if new in w.checkpoint.names:
        return
    w.checkpoint.rename(old, new)
    w.said(f"rename {old} -> {new}", keeps=False)


def _their_name(w: Walk) -> None:
    old = w.pick(lambda n: not n.startswith("mtp."))
    new = w.rng.choice((theirs(old), f"model.{old}"))
    w.checkpoint.rename(old, new)
    w.said(f"their name {new}", keeps=True)


def _drop(w: Walk) -> None:
    name = w.pick()
    w.checkpoint.remove(name)
    w.said(f"drop {name}", keeps=False)


def _drop_stage(w: Walk) -> None:
    stage = w.rng.choice(("mtp.0.", "layers.3.", "layers.1."))
    for name in [n for n in w.checkpoint.names if stage in n]:
        w.checkpoint.remove(name)
        w.touched.add(name)
    w.said(f"drop {stage}", keeps=False)


def _duplicate(w: Walk) -> None:
    name = w.pick()
    tensor = w.checkpoint[name]
    copy = StoredTensor(tensor.dtype, tensor.shape, tensor.data)
    stray = [f"model.{name}", f"{name}.1", f"old.{name}", f"layers.0.copy.{name}"]
    if name.endswith(".scale"):
        stray += [name.replace(".scale", ".weight_scale_inv"), name.replace(".scale", ".scales")]
    other = w.rng.choice(stray)
    w.checkpoint[other] = copy
    w.said(f"duplicate {name} as {other}", keeps=False)


def _transpose(w: Walk) -> None:
    def tall(name: str) -> bool:
        shape = w.checkpoint[name].shape
        return len(shape) == 2 and shape[0] != shape[1]

    tensor = w.checkpoint[name := w.pick(tall)]
    tensor.shape = (tensor.shape[1], tensor.shape[0])
    w.said(f"transpose {name}", keeps=False)


def _reshape(w: Walk) -> None:
    tensor = w.checkpoint[name := w.pick(lambda n: len(w.checkpoint[n].shape) == 2)]
    rows, columns = tensor.shape
    if columns % 2:
        return
    tensor.shape = w.rng.choice(((rows * 2, columns // 2), (rows * columns,), (1, rows, columns)))
    w.said(f"reshape {name} to {tensor.shape}", keeps=False)


def _wider(w: Walk) -> None:
    """A dtype that holds every value of a plain tensor."""
    name = w.pick(lambda n: w.checkpoint[n].dtype in ("BF16", "I64") and _is_plain(w, n))
    tensor = w.checkpoint[name]
    value = torch.frombuffer(bytearray(tensor.data), dtype=_BY_NAME[tensor.dtype])
    wide = value.int() if tensor.dtype == "I64" else value.float()
    w.checkpoint[name] = stored(wide.view(tensor.shape))
    w.said(f"wider {name}", keeps=True)


def _is_plain(w: Walk, name: str) -> bool:
    return name.rpartition(".")[0] + ".scale" not in w.checkpoint.names


def _same_bytes(w: Walk) -> None:
    """Bytes under another name for the same thing."""
    name = w.pick(lambda n: w.checkpoint[n].dtype in ("I8", "F8_E8M0"))
    w.checkpoint[name].dtype = "U8"
    w.said(f"{name} as U8", keeps=True)


def _float_scales(w: Walk) -> None:
    name = w.pick(lambda n: w.checkpoint[n].dtype == "F8_E8M0")
    tensor = w.checkpoint[name]
    powers = torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8).double() - 127
    dtype = w.rng.choice((torch.float32, torch.bfloat16))
    w.checkpoint[name] = stored(torch.exp2(powers).to(dtype).view(tensor.shape))
    w.said(f"{name} as {dtype}", keeps=True)


def _unquantize(w: Walk) -> None:
    module = w.pick(lambda n: n.endswith(".scale")).removesuffix(".scale")
    dtype = w.rng.choice((torch.float32, torch.bfloat16))
    decode(w.checkpoint, lambda m: m == module, dtype)
    w.said(f"{module} unquantized", keeps=True)


def _wrong_dtype(w: Walk) -> None:
    """The same bytes called something that these bytes are not."""
    wrong = {
        "F32": ("I32",), "BF16": ("I16",), "I64": ("F64",), "F8_E4M3": ("F8_E5M2", "I8"),
        "F8_E8M0": ("F8_E4M3", "I8"), "I8": ("F8_E4M3", "F8_E5M2"),
    }  # fmt: skip
    tensor = w.checkpoint[name := w.pick(lambda n: w.checkpoint[n].dtype in wrong)]
    tensor.dtype = w.rng.choice(wrong[tensor.dtype])
    w.said(f"{name} called {tensor.dtype}", keeps=False)


def _stray(w: Walk) -> None:
    """What other tools leave beside a matrix."""
    module = w.rng.choice([m for m in coded_modules(w.checkpoint) if m not in w.touched])
    w.touched.add(module)
    ending = w.rng.choice(
        (
            "bias", "lora_A.weight", "lora_B.default.weight", "lora_magnitude_vector", "zero_point",
            "weight_zero_point", "qzeros", "g_idx", "weight_g_idx", "rotation", "smooth",
            "pre_quant_scale", "input_zero_point", "absmax", "weight.absmax",
            "weight.quant_state.bitsandbytes__nf4", "had_K", "weight_scale_3", "lora_embedding_A",
            "weight_shape", "weight_perm", "scale_inv", "weights", "output_scale", "k_scale",
        )
    )  # fmt: skip
    w.checkpoint[f"{module}.{ending}"] = stored(torch.ones(8, 8))
    w.said(f"stray {module}.{ending}", keeps=False)


def _counts(w: Walk) -> None:
    """A number of config.json that the tensors contradict."""
    key = w.rng.choice(
        (
            "num_hidden_layers", "n_routed_experts", "hidden_size", "vocab_size", "head_dim",
            "num_attention_heads", "q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads",
            "moe_intermediate_size", "index_head_dim", "hc_mult", "num_hash_layers",
            "num_nextn_predict_layers", "num_experts_per_tok", "n_shared_experts",
        )
    )  # fmt: skip
    old = w.checkpoint.config[key]
    choices = {old - 1, old + 1, old * 2, old + 3} - {old}
    w.checkpoint.config[key] = new = w.rng.choice(sorted(choices))
    w.said(f"config {key} {old} -> {new}", keeps=False)


def _ratios(w: Walk) -> None:
    ratios = w.checkpoint.config["compress_ratios"]
    layer = w.rng.randrange(4)
    ratios[layer] = w.rng.choice([r for r in (0, 4, 128) if r != ratios[layer]])
    w.said(f"config compress_ratios {ratios}", keeps=False)


def _fixed(w: Walk) -> None:
    """What V4's arithmetic has no other form of."""
    key, value = w.rng.choice(
        (
            ("scoring_func", "sigmoid"), ("hidden_act", "gelu"), ("attention_bias", True),
            ("norm_topk_prob", False), ("tie_word_embeddings", True), ("topk_method", "greedy"),
            ("num_key_value_heads", 2),
        )
    )  # fmt: skip
    w.checkpoint.config[key] = value
    w.said(f"config {key} = {value}", keeps=False)


def _stale_ids(w: Walk) -> None:
    name = w.pick(lambda n: n.endswith("tid2eid"))
    tensor = w.checkpoint[name]
    ids = torch.frombuffer(bytearray(tensor.data), dtype=_BY_NAME[tensor.dtype]).view(tensor.shape)
    row, column = w.rng.randrange(ids.shape[0]), w.rng.randrange(ids.shape[1])
    ids[row, column] = w.rng.choice((-1, 4, 9, 2**31 - 1, int(ids[row, 1 - column])))
    w.checkpoint[name] = stored(ids)
    w.said(f"{name}[{row}] = {ids[row].tolist()}", keeps=False)


def _draft_hole(w: Walk) -> None:
    if any("mtp.0." in t for t in w.touched):
        return
    new = w.rng.choice(("mtp.1.", "mtp.3.", "mtp.-1."))
    for name in [n for n in w.checkpoint.names if n.startswith("mtp.0.")]:
        w.checkpoint.rename(name, name.replace("mtp.0.", new))
        w.touched.add(name)
    w.said(f"mtp.0 -> {new}", keeps=False)


def _half_experts(w: Walk) -> None:
    """An FP4 expert decoded as if it were FP8: half the columns."""
    name = w.pick(lambda n: is_expert(n) and w.checkpoint[n].dtype == "I8")
    tensor = w.checkpoint[name]
    values = torch.frombuffer(bytearray(tensor.data), dtype=torch.int8).view(tensor.shape)
    w.checkpoint[name] = stored(values.bfloat16())
    w.checkpoint.remove(name.replace(".weight", ".scale"))
    w.said(f"half of {name}", keeps=False)


KEEPING = (_their_name, _wider, _same_bytes, _float_scales, _unquantize)
CHANGING = (
    _rename, _drop, _drop_stage, _duplicate, _transpose, _reshape, _wrong_dtype, _stray, _stray,
    _counts, _counts, _ratios, _fixed, _stale_ids, _draft_hole, _half_experts,
)  # fmt: skip
