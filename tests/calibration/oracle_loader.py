"""An independent reader of the released layout, for tests only.

It shares no code with the project: the safetensors package reads the bytes, and FP4 and FP8 are
decoded here by table and by torch's own casts. What the project's reader and codecs answer can
therefore be held against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


class OracleParams:
    """Dense float32 tensors of a checkpoint in the released layout, by official base name."""

    def __init__(self, folder: Path, made: Mapping[str, Tensor] | None = None) -> None:
        """made: tensors that are not stored, by base name (V4.1's token map)."""
        config = json.loads((folder / "config.json").read_text())
        self.tile = config["quantization_config"]["weight_block_size"][0]
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        self.tensors: dict[str, Tensor] = dict(made or {})
        for file in sorted(set(index.values())):
            with safe_open(folder / file, "pt") as shard:
                self.tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118

    def __call__(self, base: str, /) -> Tensor:
        if base in self.tensors:
            value = self.tensors[base]
            return value if value.dtype == torch.int64 else value.float()
        weight = self.tensors[f"{base}.weight"]
        scale = self.tensors.get(f"{base}.scale")
        if scale is None:
            return weight.float()
        if weight.dtype == torch.int8:
            return _fp4(weight, scale)
        assert weight.dtype == torch.float8_e4m3fn
        height, width = (1, 32) if base.endswith("engram.embed") else (self.tile, self.tile)
        tiles = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
        return weight.float() * tiles[: weight.shape[0], : weight.shape[1]]


def _fp4(packed: Tensor, scale: Tensor) -> Tensor:
    codes = packed.view(torch.uint8).long()
    values = torch.stack([E2M1[codes & 15], E2M1[codes >> 4]], dim=-1).flatten(-2)
    return values * scale.float().repeat_interleave(32, 1)
