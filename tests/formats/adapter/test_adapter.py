"""A LoRA adapter is merged while converting, and what is not plain LoRA is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY
from tests.support.lora import ALPHA, MODULES, RANK, Lora
from tests.support.other_tools import stored
from v4quant.api.checks import verify
from v4quant.api.conversion import quantize
from v4quant.checks.diff import diff_checkpoints
from v4quant.source import open_source
from v4quant_formats.adapter import AdapterError, with_adapter
from v4quant_formats.errors import MissingTensor, UnexpectedTensor, WrongDtype
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense, read_dense_rows
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress


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
    with open_checkpoint(TINY) as checkpoint:
        adapter = with_adapter(checkpoint, lora.write(tmp_path)).deltas
    assert adapter is not None
    for module, delta in lora.deltas.items():
        alpha = 2.0 if module.endswith("wq_a") else ALPHA
        wanted = delta * (RANK / ALPHA) * alpha / RANK**0.5
        torch.testing.assert_close(adapter.delta(module, slice(None)), wanted)


def first(lora: Lora, half: str) -> str:
    return next(n for n in lora.tensors if f"lora_{half}" in n)


Edit = Callable[[Lora], object]
REFUSED: list[tuple[Edit, type[V4QuantError], str]] = [
    (lambda x: x.config.update(use_dora=True), AdapterError, "DoRA"),
    (lambda x: x.config.update(lora_bias=True), AdapterError, "lora_bias"),
    (lambda x: x.config.update(peft_type="IA3"), AdapterError, "IA3"),
    (lambda x: x.config.update(init_lora_weights="pissa"), AdapterError, "changed the base"),
    (lambda x: x.config.update(layer_replication=[[0, 2]]), AdapterError, "repeats layers"),
    (lambda x: x.config.update(alora_invocation_tokens=[5]), AdapterError, "some tokens"),
    (lambda x: x.config.update(trainable_token_indices=[5]), AdapterError, "single tokens"),
    (lambda x: x.config.update(lora_alpha="16"), AdapterError, "lora_alpha"),
    (lambda x: x.config.update(r=8), WrongDtype, "says rank 8.* is 4"),
    (lambda x: x.tensors.pop(first(x, "B")), MissingTensor, "only lora_A"),
    (lambda x: x.add("model.layers.0.self_attn.q_a_proj.lora_magnitude_vector", torch.ones(128)),
     AdapterError, "neither lora_A nor lora_B"),
    (lambda x: x.add("model.layers.0.self_attn.q_a_proj.bias", torch.ones(128)),
     UnexpectedTensor, "nor a whole tensor"),
    (lambda x: x.add("lm_head.weight", torch.ones(400, 128)), WrongDtype, "another model's"),
    (lambda x: x.add("model.layers.9.input_layernorm.weight", torch.ones(128)),
     UnexpectedTensor, "which the model has not"),
    (lambda x: [x.add(n, torch.ones(384, 128)) for n in ("lm_head.weight", "head.weight")],
     UnexpectedTensor, "again"),
    (lambda x: x.add("lm_head.weight", torch.ones(384, 128, dtype=torch.int32)),
     WrongDtype, "I32"),
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
