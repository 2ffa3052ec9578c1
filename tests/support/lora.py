"""A LoRA adapter of the tiny model in PEFT's layout, and what it adds, by PEFT's formulas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.formats.test_naming import theirs
from tests.support.conversion import TINY
from tests.support.other_tools import stored
from tests.support.shard_bytes import StoredTensor, honest_shard
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense

RANK, ALPHA = 4, 6.0
MODULES = ("layers.0.attn.wq_a", "layers.2.attn.wo_b", "layers.1.attn.compressor.wkv",
           "layers.1.ffn.shared_experts.w2", "layers.2.ffn.experts.1.w1",
           "layers.2.ffn.experts.3.w2")  # fmt: skip


class Lora:
    """An adapter of the tiny model, and what it adds, by PEFT's formula."""

    def __init__(self, rng: torch.Generator, modules: Sequence[str] = MODULES) -> None:
        self.config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA,
                                       "bias": "none", "target_modules": ["any"]}  # fmt: skip
        self.tensors: dict[str, StoredTensor] = {}
        self.deltas: dict[str, torch.Tensor] = {}
        with open_checkpoint(TINY) as checkpoint:
            for module in modules:
                weight = read_dense(checkpoint, module)
                rows, columns = weight.shape
                a = torch.randn(RANK, columns, generator=rng).bfloat16()
                b = (torch.randn(rows, RANK, generator=rng) * weight.std() * 0.02).bfloat16()
                name = "base_model.model." + theirs(f"{module}.weight").removesuffix(".weight")
                self.tensors[f"{name}.lora_A.weight"] = stored(a)
                self.tensors[f"{name}.lora_B.weight"] = stored(b)
                self.deltas[module] = ALPHA / RANK * (b.double() @ a.double())

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        (folder / "adapter_model.safetensors").write_bytes(honest_shard(self.tensors))
        return folder

    def add(self, name: str, value: torch.Tensor) -> None:
        """A tensor of the file."""
        self.tensors[f"base_model.model.{name}"] = stored(value)
