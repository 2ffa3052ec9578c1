"""Whole tensors of an adapter (modules_to_save, biases, embeddings) take the base's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY
from tests.support.lora import ALPHA, RANK, Lora
from v4quant.api.checks import verify
from v4quant.api.conversion import quantize
from v4quant_formats.adapter import with_adapter
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense, read_dense_at, read_dense_rows
from v4quant_kernels.progress import SilentProgress

HIDDEN, VOCABULARY = 128, 384


def saved(lora: Lora, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Modules of several kinds as PEFT saves them: {official module: values}."""
    made = {
        "layers.1.attn.wq_b": ("model.layers.1.self_attn.q_b_proj.weight", (256, HIDDEN)),
        "layers.0.ffn.gate": ("model.layers.0.mlp.gate.weight", (4, HIDDEN)),
        "layers.1.attn_norm": ("model.layers.1.input_layernorm.weight", (HIDDEN,)),
        "layers.2.ffn.gate.bias": ("model.layers.2.mlp.gate.e_score_correction_bias", (4,)),
        "layers.1.ffn.experts.2.w2": ("model.layers.1.mlp.experts.2.w2.weight", (HIDDEN, HIDDEN)),
        "embed": ("model.embed_tokens.base_layer.weight", (VOCABULARY, HIDDEN)),
    }
    values: dict[str, torch.Tensor] = {}
    for module, (name, shape) in made.items():
        values[module] = torch.randn(shape, generator=rng).bfloat16() * 0.03
        lora.add(name, values[module])
    stack = torch.randn(4, HIDDEN, HIDDEN, generator=rng).bfloat16() * 0.03
    lora.add("model.layers.0.mlp.experts.down_proj", stack)
    return values | {f"layers.0.ffn.experts.{e}.w2": stack[e] for e in range(4)}


def low_rank_on_the_vocabulary(lora: Lora, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """LoRA on embedding and head: {official module: delta}."""
    a, b = (torch.randn(s, generator=rng) * 0.02 for s in ((RANK, VOCABULARY), (HIDDEN, RANK)))
    lora.add("model.embed_tokens.lora_embedding_A", a)
    lora.add("model.embed_tokens.lora_embedding_B", b)
    lora.add("lm_head.lora_A.weight", b.mT.contiguous())
    lora.add("lm_head.lora_B.weight", a.mT.contiguous())
    delta = ALPHA / RANK * (b.double() @ a.double()).mT
    return {"embed": delta, "head": delta}


@pytest.mark.parametrize("scheme", ["int8-g32", "q8_0"])
def test_every_reader_sees_them(scheme: str, tmp_path: Path, generator: torch.Generator) -> None:
    lora = Lora(generator)
    lora.config["modules_to_save"] = ["any"]
    values, deltas = saved(lora, generator), low_rank_on_the_vocabulary(lora, generator)
    folder, out = lora.write(tmp_path / "adapter"), tmp_path / "out"
    with open_checkpoint(TINY) as base:
        merged = with_adapter(base, folder)
        assert merged.digest() != base.digest()
        assert list(merged.tensors)[:5] == list(base.tensors)[:5], "the order stays"
        for module in values.keys() | deltas.keys():
            plain = values.get(module, read_dense(base, module)).double()
            wanted = (plain + deltas.get(module, 0)).float()
            assert torch.equal(read_dense(merged, module), wanted), module
            some = torch.tensor([0, 1, 3])
            assert torch.equal(read_dense_at(merged, module, some), wanted[some])
            assert torch.equal(read_dense_rows(merged, module, 1, 4), wanted[1:4])
    quantize(TINY, out, scheme=scheme, adapter=folder, progress=SilentProgress())
    assert verify(out, source=TINY, adapter=folder, progress=SilentProgress()).ok
    manifest = json.loads(next(out.glob("*v4quant.json")).read_text())
    assert set(manifest["adapter"]["replaced"]) == values.keys()
