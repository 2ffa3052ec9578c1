"""A LoRA adapter is merged while converting, and what is not plain LoRA is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.test_naming import theirs
from tests.support.conversion import TINY
from tests.support.other_tools import stored
from tests.support.shard_bytes import StoredTensor, honest_shard
from v4quant.api.checks import verify
from v4quant.api.conversion import quantize
from v4quant.checks.diff import diff_checkpoints
from v4quant.source import open_source
from v4quant_formats.adapter import AdapterError, open_adapter, with_adapter
from v4quant_formats.errors import MissingTensor, UnexpectedTensor, WrongDtype
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense, read_dense_rows
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress

RANK, ALPHA = 4, 6.0
MODULES = ("layers.0.attn.wq_a", "layers.2.attn.wo_b", "layers.1.attn.compressor.wkv",
           "layers.1.ffn.shared_experts.w2", "layers.2.ffn.experts.1.w1",
           "layers.2.ffn.experts.3.w2")  # fmt: skip


class Lora:
    """An adapter of the tiny model, and what it adds, by PEFT's formula."""

    def __init__(self, rng: torch.Generator) -> None:
        self.config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA,
                                       "bias": "none", "target_modules": ["any"]}  # fmt: skip
        self.tensors: dict[str, StoredTensor] = {}
        self.deltas: dict[str, torch.Tensor] = {}
        with open_checkpoint(TINY) as checkpoint:
            for module in MODULES:
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


@pytest.mark.parametrize("scheme", ["int8-g32", "bf16", "mxfp4"])
def test_merged_while_converting(scheme: str, tmp_path: Path, generator: torch.Generator) -> None:
    lora = Lora(generator)
    adapter, out = lora.write(tmp_path / "adapter"), tmp_path / "out"
    quantize(TINY, out, scheme=scheme, adapter=adapter, progress=SilentProgress())
    assert verify(out, source=TINY, adapter=adapter, progress=SilentProgress()).ok
    assert not verify(out, source=TINY, progress=SilentProgress()).ok, "it is no longer the base"
    manifest = json.loads((out / "v4quant.json").read_text())
    norms = manifest["adapter"]["norms"]
    for module, delta in lora.deltas.items():
        assert norms[module] == pytest.approx(float(delta.norm()), rel=1e-5)
    lossy = {r["module"] for r in manifest["tensors"] if not r["exact"]}
    assert lossy == set(MODULES), "all else stays exact"


def test_every_reader_sees_the_merged_values(tmp_path: Path, generator: torch.Generator) -> None:
    lora = Lora(generator)
    folder = lora.write(tmp_path)
    with open_source(TINY, adapter=folder) as merged, open_checkpoint(TINY) as base:
        assert merged.digest() != base.digest()
        for module, delta in lora.deltas.items():
            wanted = (read_dense(base, module).double() + delta).float()
            assert torch.equal(read_dense(merged, module), wanted)
            assert torch.equal(read_dense_rows(merged, module, 3, 70), wanted[3:70])
        found = diff_checkpoints(base, merged, SilentProgress(), full=True)
        assert {d.module for d in found.differences} == set(MODULES)


def test_patterns_and_rslora(tmp_path: Path, generator: torch.Generator) -> None:
    lora = Lora(generator)
    lora.config |= {"use_rslora": True, "alpha_pattern": {"q_a_proj": 2.0}}
    adapter = open_adapter(lora.write(tmp_path))
    for module, delta in lora.deltas.items():
        alpha = 2.0 if module.endswith("wq_a") else ALPHA
        wanted = delta * (RANK / ALPHA) * alpha / RANK**0.5
        torch.testing.assert_close(adapter.delta(module), wanted)


def first(lora: Lora, half: str) -> str:
    return next(n for n in lora.tensors if f"lora_{half}" in n)


Edit = Callable[[Lora], object]
REFUSED: list[tuple[Edit, type[V4QuantError], str]] = [
    (lambda x: x.config.update(use_dora=True), AdapterError, "DoRA"),
    (lambda x: x.config.update(bias="all"), AdapterError, "biases"),
    (lambda x: x.config.update(modules_to_save=["lm_head"]), AdapterError, "modules_to_save"),
    (lambda x: x.config.update(target_parameters=["experts.down_proj"]), AdapterError, "fused"),
    (lambda x: x.config.update(peft_type="IA3"), AdapterError, "IA3"),
    (lambda x: x.config.update(init_lora_weights="pissa"), AdapterError, "changed the base"),
    (lambda x: x.config.update(layer_replication=[[0, 2]]), AdapterError, "repeats layers"),
    (lambda x: x.config.update(alora_invocation_tokens=[5]), AdapterError, "some tokens"),
    (lambda x: x.config.update(trainable_token_indices=[5]), AdapterError, "single tokens"),
    (lambda x: x.config.update(lora_alpha="16"), AdapterError, "lora_alpha"),
    (lambda x: x.config.update(r=8), WrongDtype, "rank 4.*says 8"),
    (lambda x: x.tensors.pop(first(x, "B")), MissingTensor, "only lora_A"),
    (lambda x: x.tensors.update({"base_model.model.lm_head.weight": x.tensors[first(x, "A")]}),
     AdapterError, "neither lora_A nor lora_B"),
    (lambda x: x.tensors.update(
        {"base_model.model.model.layers.0.attn_norm.lora_A.weight": x.tensors[first(x, "A")]}),
     UnexpectedTensor, "not a linear layer"),
    (lambda x: setattr(x.tensors[first(x, "A")], "shape", (128, RANK)), WrongDtype, "rank"),
    (lambda x: x.tensors.update({first(x, "A"): stored(torch.zeros(RANK, 64))}),
     WrongDtype, "another model's"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "kind", "text"), REFUSED)
def test_what_is_more_than_lora_is_refused(
    edit: Edit, kind: type[V4QuantError], text: str, tmp_path: Path, generator: torch.Generator
) -> None:
    lora = Lora(generator)
    edit(lora)
    folder = lora.write(tmp_path)
    with open_checkpoint(TINY) as checkpoint, pytest.raises(kind, match=text):
        with_adapter(checkpoint, folder)
