"""LoRA on fused experts adds what PEFT's einsum gives, in the order its shapes or version tell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY
from tests.support.lora import ALPHA, Lora
from v4quant.api.checks import verify
from v4quant.api.conversion import quantize
from v4quant_formats.adapter import AdapterError, with_adapter
from v4quant_formats.errors import UnexpectedTensor, WrongDtype
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense, read_dense_rows
from v4quant_kernels.progress import SilentProgress

EXPERTS, HIDDEN, RANK = 4, 128, 3
PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
OLD, NEW = "0.18.0", "0.19.1"


class FusedLora(Lora):
    """Adapts fused experts of layers 0 and 1 as a version of PEFT writes it."""

    def __init__(self, rng: torch.Generator, version: str, parameters: Iterable[str]) -> None:
        super().__init__(rng, modules=())
        self.config |= {"r": RANK, "target_parameters": ["any"], "peft_version": version}
        wrappers = ["experts.base_layer", "experts"]
        for layer in (0, 1):
            for wrapper, parameter in zip(wrappers, parameters, strict=False):
                rows, columns = len(PARTS[parameter]) * HIDDEN, HIDDEN
                # What PEFT takes for the parameter's inputs and outputs.
                given, made = (columns, rows) if version == NEW else (rows, columns)
                a = torch.randn(RANK * EXPERTS, given, generator=rng).bfloat16()
                b = (torch.randn(made, RANK * EXPERTS, generator=rng) * 1e-3).bfloat16()
                self.add(f"model.layers.{layer}.mlp.{wrapper}.lora_A.weight", a)
                self.add(f"model.layers.{layer}.mlp.{wrapper}.lora_B.weight", b)
                form = "o r e, e r i -> e o i" if version == NEW else "o r e, e r i -> e i o"
                stacks = b.double().view(made, RANK, EXPERTS), a.double().view(EXPERTS, RANK, given)
                delta = torch.einsum(form, *stacks) * (ALPHA / RANK)
                for expert in range(EXPERTS):
                    halves = delta[expert].chunk(len(PARTS[parameter]))
                    for part, half in zip(PARTS[parameter], halves, strict=True):
                        self.deltas[f"layers.{layer}.ffn.experts.{expert}.{part}"] = half


@pytest.mark.parametrize(
    ("version", "parameters"),
    [(NEW, ["gate_up_proj", "down_proj"]), (OLD, ["down_proj", "gate_up_proj"]),
     (NEW, ["gate_up_proj"]), (OLD, ["down_proj"]), (NEW, ["down_proj"])],
)  # fmt: skip
def test_merged_as_peft_merges(
    version: str, parameters: list[str], tmp_path: Path, generator: torch.Generator
) -> None:
    lora = FusedLora(generator, version, parameters)
    folder = lora.write(tmp_path)
    with open_checkpoint(TINY) as base:
        merged = with_adapter(base, folder)
        for module, delta in lora.deltas.items():
            wanted = (read_dense(base, module).double() + delta).float()
            torch.testing.assert_close(read_dense(merged, module), wanted, rtol=1e-6, atol=1e-9)
            rows = read_dense_rows(merged, module, 3, 70)
            torch.testing.assert_close(rows, wanted[3:70], rtol=1e-6, atol=1e-9)
        assert torch.equal(*(read_dense(c, "layers.2.ffn.experts.0.w1") for c in (base, merged)))


def test_converted_with_norms(tmp_path: Path, generator: torch.Generator) -> None:
    lora, out = FusedLora(generator, NEW, PARTS), tmp_path / "out"
    adapter = lora.write(tmp_path / "adapter")
    quantize(TINY, out, scheme="int8-g32", adapter=adapter, progress=SilentProgress())
    assert verify(out, source=TINY, adapter=adapter, progress=SilentProgress()).ok
    norms = json.loads((out / "v4quant.json").read_text())["adapter"]["norms"]
    assert norms == {m: pytest.approx(float(d.norm()), rel=1e-5) for m, d in lora.deltas.items()}


def test_shapes_decide_before_the_version(tmp_path: Path, generator: torch.Generator) -> None:
    """A pair that fits one order tells the other pairs', whatever the config says."""
    lora = FusedLora(generator, NEW, PARTS)
    lora.config["peft_version"] = OLD
    with open_checkpoint(TINY) as base:
        deltas = with_adapter(base, lora.write(tmp_path)).deltas
    assert deltas is not None
    for module, delta in lora.deltas.items():
        torch.testing.assert_close(deltas.delta(module, slice(None)), delta)


def test_what_nothing_tells_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    both, square = FusedLora(generator, NEW, PARTS), FusedLora(generator, NEW, ["down_proj"])
    del square.config["peft_version"]
    turned = FusedLora(generator, OLD, PARTS)
    both.tensors |= {n: t for n, t in turned.tensors.items() if "layers.1" in n}
    twice, odd = FusedLora(generator, NEW, PARTS), FusedLora(generator, NEW, PARTS)
    twice.add("model.layers.0.mlp.experts.1.w1.lora_A.weight", torch.ones(RANK, HIDDEN))
    twice.add("model.layers.0.mlp.experts.1.w1.lora_B.weight", torch.ones(HIDDEN, RANK))
    for half, shape in (("A", (RANK * EXPERTS, 64)), ("B", (HIDDEN, RANK * EXPERTS))):
        odd.add(f"model.layers.1.mlp.experts.lora_{half}.weight", torch.ones(shape))
    with open_checkpoint(TINY) as base:
        for lora, kind, text in (
            (square, AdapterError, "either order"), (both, AdapterError, "two orders"),
            (twice, UnexpectedTensor, "changed twice"), (odd, WrongDtype, "fit no fused parameter"),
        ):  # fmt: skip
            with pytest.raises(kind, match=text):
                with_adapter(base, lora.write(tmp_path))
