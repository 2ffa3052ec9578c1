"""Writing a trained V4.1 as it is released: official names and formats, the tables in own shards.

A shard above `SHARD_BYTES` is cut between tensors, so that no file of the folder is large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiny_v4_training.export import write_folder
from tiny_v4_training.v41_formats import e8m0, fp4, fp8_rows, fp8_tiles, kind

SHARD_BYTES = 2_000_000


def write_v41_release(
    out: Path,
    raw: Mapping[str, Any],
    trunk: nn.Module,
    draft: nn.Module,
    tokenizer: Path,
    tokenizer_json: str,
) -> int:
    """Write a checkpoint folder and return its tensor bytes; the index is written last."""
    shards = [part for shard in _shards(raw, trunk, draft) for part in _cut(shard)]
    return write_folder(out, raw, shards, tokenizer, tokenizer_json)


def stored(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold one parameter of the models, under the names of the release."""
    at = name.removesuffix(".weight")
    match kind(name):
        case "fp4":
            for expert, both in enumerate(tensor):
                fused = name.endswith("gate_up_proj")
                parts = (
                    dict(zip(("w1", "w3"), both.chunk(2), strict=True)) if fused else {"w2": both}
                )
                for which, matrix in parts.items():
                    module = f"{name.rpartition('.')[0]}.experts.{expert}.{which}"
                    codes, exponent = fp4(matrix)
                    packed = codes[..., 0::2] | codes[..., 1::2] << 4
                    yield f"{module}.weight", packed.to(torch.uint8).view(torch.int8)
                    yield f"{module}.scale", e8m0(exponent)
        case "fp8" | "rows" as form:
            codes, exponent = (fp8_tiles if form == "fp8" else fp8_rows)(tensor)
            yield f"{at}.weight", codes
            yield f"{at}.scale", e8m0(exponent)
        case "f32":
            if name.endswith("e_score_correction_bias"):
                at = f"{name.rpartition('.')[0]}.bias"
                yield at, tensor.float()
                yield f"{at}_vl", tensor.float().clone()  # images were never trained on
            else:
                yield name, tensor.float()
        case _:
            yield name, tensor.bfloat16()


def _shards(
    raw: Mapping[str, Any], trunk: nn.Module, draft: nn.Module
) -> Iterator[dict[str, Tensor]]:
    """Embedding, one layer per shard, final parts, one stage per shard, one table per shard."""
    c, state = raw["text_config"], dict(trunk.state_dict())
    tables = {n: state.pop(n) for n in list(state) if n.endswith("engram.embed.weight")}
    yield _store({"embed.weight": state.pop("embed.weight")})
    for layer in range(c["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        yield _store({n: t for n, t in state.items() if n.startswith(prefix)})
    yield _store({n: state[n] for n in ("norm.weight", "head.weight")})
    drafted = draft.state_dict()
    for stage in range(c["num_nextn_predict_layers"]):
        yield _store({n: t for n, t in drafted.items() if n.startswith(f"mtp.{stage}.")})
    for name, table in tables.items():
        yield _store({name: table})


def _store(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.contiguous() for name, x in tensors.items() for n, t in stored(name, x)}


def _cut(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part
