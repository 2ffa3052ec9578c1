"""Starting V4.1's training from a trained V4 of the same widths, or from a written V4.1.

From V4, layer by layer:
Embedding, head, experts, attention matrices and norms carry over as they are. Three things are
turned into their counterparts: queries lose the norm per head, so its mean effect goes into wq_b;
the input weights of a sublayer come from the sublayer before it, so each takes those rows of the
hyper-connection that its follower had; a compressor starts as the window's key projection with an
even share. What V4 has no counterpart for (Engram, indexer) starts fresh.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_v4_training.model import read_config
from tiny_v4_training.v41_draft import Draft
from tiny_v4_training.v41_heldout import load_v41
from tiny_v4_training.v41_model import V41Trunk
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.codec import dequantize
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES


class DoesNotFit(Exception):
    """The checkpoint has other dimensions than the model to train."""


def from_v4(name: str) -> bool:
    """Parameters that a V4 brings trained, so that they have to adapt only."""
    return any(part in name for part in ("gate_up_proj", "down_proj", "shared_experts"))


def from_v41(name: str) -> bool:
    """Parameters that a V4.1 brings trained: all but the Engram, whose hashes may be others."""
    return ".engram." not in name


@torch.no_grad()
def continue_from(trunk: V41Trunk, draft: Draft, folder: Path) -> None:
    """Take over a written V4.1 but for its Engram. Raises DoesNotFit."""
    written = load_v41(folder, read_config(folder / "config.json")["text_config"])
    for ours, theirs in zip((trunk, draft), written, strict=True):
        own, given = ours.state_dict(), theirs.state_dict()
        for name in filter(from_v41, own):
            if name not in given or given[name].shape != own[name].shape:
                raise DoesNotFit(f"{folder}: {name} is not as here")
            own[name].copy_(given[name])


@torch.no_grad()
def start_from(trunk: V41Trunk, folder: Path) -> None:
    """Copy what carries over into a freshly initialised trunk. Raises DoesNotFit."""
    with open_checkpoint(folder) as checkpoint:
        layers = checkpoint.config["num_hidden_layers"]
        if layers < trunk.c["num_hidden_layers"]:
            raise DoesNotFit(f"{folder}: has {layers} layers only")
        state = dict(_translated(trunk, checkpoint))
    own = trunk.state_dict()
    for name, tensor in state.items():
        target = own[name]
        if target.shape[1:] != tensor.shape[1:] or target.shape[0] < tensor.shape[0]:
            raise DoesNotFit(
                f"{folder}: {name} is {tuple(tensor.shape)}, here it is {tuple(target.shape)}"
            )
        target[: tensor.shape[0]] = tensor  # a larger vocabulary keeps its fresh rows


def _translated(trunk: V41Trunk, source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    c = trunk.c
    for name in ("embed.weight", "head.weight", "norm.weight"):
        yield name, _read(source, name)
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}."
        for name in ("attn_norm", "ffn_norm", "attn.q_norm", "attn.kv_norm", "attn.wq_a"):
            yield f"{at}{name}.weight", _read(source, f"{at}{name}.weight")
        for name in ("wkv", "wo_a", "wo_b"):
            yield f"{at}attn.{name}.weight", _read(source, f"{at}attn.{name}.weight")
        yield f"{at}attn.attn_sink", _read(source, f"{at}attn.attn_sink")
        yield f"{at}attn.wq_b.weight", _normed_queries(source, at, c["head_dim"])
        yield from _experts(source, at, c["n_routed_experts"])
        if i in c["kv_source_layer_ids"]:
            to = f"{at}attn.compressor."
            yield to + "wkv.weight", _read(source, f"{at}attn.wkv.weight")
            yield to + "norm.weight", _read(source, f"{at}attn.kv_norm.weight")
            if c["compress_ratios"][i] > 1:
                yield to + "wgate.weight", torch.zeros(c["head_dim"], c["hidden_size"])
    yield from _hyper_connections(source, c)


def _normed_queries(source: Checkpoint, at: str, dim: int) -> Tensor:
    """wq_b scaled per head so that its output has the root mean square 1 on the average."""
    w = _read(source, f"{at}attn.wq_b.weight").unflatten(0, (-1, dim))
    norm = _read(source, f"{at}attn.q_norm.weight")
    size = (w * norm).square().sum(-1).mean(-1).sqrt()
    scaled: Tensor = w / size.view(-1, 1, 1)
    return scaled.flatten(0, 1)


def _experts(source: Checkpoint, at: str, count: int) -> Iterator[tuple[str, Tensor]]:
    def part(expert: int | str, which: str) -> Tensor:
        module = "shared_experts" if expert == "shared" else f"experts.{expert}"
        return _read(source, f"{at}ffn.{module}.{which}.weight")

    for which in ("w1", "w2", "w3"):
        yield f"{at}ffn.shared_experts.{which}.weight", part("shared", which)
    both = [torch.cat([part(e, "w1"), part(e, "w3")]) for e in range(count)]
    yield f"{at}ffn.gate_up_proj", torch.stack(both)
    yield f"{at}ffn.down_proj", torch.stack([part(e, "w2") for e in range(count)])
    yield f"{at}ffn.gate.weight", _read(source, f"{at}ffn.gate.weight")[:count]


def _hyper_connections(source: Checkpoint, c: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """post and mixing rows of each sublayer; the input rows of the one behind it."""
    m = c["hc_mult"]
    order = [f"layers.{i}.hc_{p}" for i in range(c["num_hidden_layers"]) for p in ("attn", "ffn")]
    for here, behind in zip(order, [*order[1:], "hc_head"], strict=True):
        for leaf, rows in (("fn", m), ("base", m), ("scale", 1)):
            own = _read(source, f"{here}_{leaf}").clone()
            own[:rows] = _read(source, f"{behind}_{leaf}")[:rows]
            yield f"{here}_{leaf}", own


def _read(source: Checkpoint, name: str) -> Tensor:
    """A weight in float32, decoded if a scale lies beside it."""
    tensor = source.read(name)
    scale_name = name.removesuffix("weight") + "scale"
    if not name.endswith(".weight") or scale_name not in source.tensors:
        return tensor.float()
    scale = source.read(scale_name)
    if tensor.dtype == torch.int8:
        shape = (tensor.shape[0], 2 * tensor.shape[1])
        return dequantize(QTensor(SCHEMES["mxfp4"], shape, tensor.view(torch.uint8), scale))
    return dequantize(QTensor(SCHEMES["fp8"], (tensor.shape[0], tensor.shape[1]), tensor, scale))
