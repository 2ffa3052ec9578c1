"""`--products kernels`: routed experts multiplied as stored, by the twin and by Triton's kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.conversion import TINY
from tests.support.pretend_device import DEVICE, PretendDevice
from v4quant.evaluation.memory import Work, plan_evaluation
from v4quant.memory import Limits
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model import packed_experts
from v4quant_calibration.model.experts import mixture_of_experts
from v4quant_calibration.model.numerics import quantized_input
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.router import Routing
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_coded
from v4quant_kernels import dispatch
from v4quant_kernels.errors import UnsupportedScheme, V4QuantError
from v4quant_kernels.experts import stack_experts
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.reference64 import moe64

CONFIG = load_model_config(TINY)
LAYER = "layers.1"


def routed(
    checkpoint: Any, x: Tensor, routing: Routing, options: ForwardOptions, device: Any = "cpu"
) -> Tensor:
    """What the routed experts add."""
    params = CheckpointParams(checkpoint, torch.device(device))
    output = torch.zeros_like(x)
    packed_experts.add_routed_experts(x, routing, output, params, LAYER, CONFIG, options)
    return output


def case(generator: torch.Generator, tokens: int) -> tuple[Tensor, Routing]:
    x = torch.randn(tokens, CONFIG.hidden_size, generator=generator)
    scores = torch.rand(tokens, CONFIG.n_routed_experts, generator=generator)
    ids = scores.topk(CONFIG.num_experts_per_tok, dim=-1).indices
    ids[ids == 1] = 2  # an expert that nobody chose is not read
    weights = torch.rand(ids.shape, generator=generator)
    return x, Routing(ids, weights)


def value_and_bound(
    checkpoint: Any, x: Tensor, routing: Routing, official: bool
) -> tuple[Tensor, Tensor]:
    """The sum of the groups' float64 references, of which each is rounded to BF16."""
    active = torch.unique(routing.expert_ids).tolist()
    value = bound = torch.zeros(x.shape, dtype=torch.float64)
    for begin in range(0, len(active), packed_experts.GROUP):
        chosen = active[begin : begin + packed_experts.GROUP]
        row = torch.full((CONFIG.n_routed_experts,), -1)
        row[chosen] = torch.arange(len(chosen))
        names = [[f"{LAYER}.ffn.experts.{e}.{w}" for w in ("w1", "w3", "w2")] for e in chosen]
        experts = stack_experts(
            [tuple(read_coded(checkpoint, n) for n in triple) for triple in names]  # type: ignore[misc]
        )
        limit = CONFIG.swiglu_limit or math.inf
        part, error = moe64(
            x.bfloat16(), row[routing.expert_ids], routing.weights, experts, limit,
            "e4m3" if official else "bf16",
        )  # fmt: skip
        value, bound = value + part, bound + error + 2.0**-22 * part.abs()
    return value, bound


@pytest.mark.parametrize(
    ("scheme", "backend", "activations"),
    [("mxfp4", "torch", "plain"), ("mxfp4", "triton", "official"),
     ("int4-g128", "torch", "official"), ("int4-g128", "triton", "plain")],
)  # fmt: skip
def test_every_group_keeps_the_kernels_bound(
    scheme: str,
    backend: str,
    activations: Any,
    converted: Callable[[str], Path],
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: True)
    monkeypatch.setattr(packed_experts, "GROUP", 2)
    monkeypatch.setattr(packed_experts, "ROWS", 5)
    options = ForwardOptions(activations, torch.bfloat16, expert_kernels=True)
    x, routing = case(generator, 7 if backend == "triton" else 40)
    x = quantized_input(x, CONFIG, options)
    with open_checkpoint(converted(scheme)) as checkpoint:
        found = routed(checkpoint, x, routing, options)
        value, bound = value_and_bound(checkpoint, x, routing, options.official)
    error = (found.double() - value).abs()
    assert bool((error <= bound).all()), f"worst {(error / bound).max():.3g} of the bound"
    assert bool((found != 0).any())


class Seen(SilentObserver):
    """Counts what it was shown."""

    def __init__(self) -> None:
        self.routes, self.rows = 0, 0

    def on_route(self, layer: str, expert_ids: Tensor, weights: Tensor) -> None:
        self.routes += 1

    def on_expert_output(self, layer: str, expert: int, tokens: Tensor, y: Tensor) -> None:
        self.rows += 1


def test_a_whole_pass_elsewhere_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU, where the twin stands for the kernel: nothing mixes two devices."""
    monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: False)
    ids = torch.arange(60) * 7 % CONFIG.vocab_size
    options = ForwardOptions(expert_kernels=True)
    rows, seen = [], Seen()
    with open_checkpoint(TINY) as checkpoint:
        for device in (torch.device("cpu"), DEVICE):
            with PretendDevice():
                model = StreamModel(CheckpointParams(checkpoint, device), options, seen)
                streams = stream_forward([model], CONFIG, [ids])[0]
                rows.append(streams.read(0, 60).cpu())
        plain = StreamModel(CheckpointParams(checkpoint), ForwardOptions())
        exact = stream_forward([plain], CONFIG, [ids])[0].read(0, 60)
    assert torch.equal(rows[0], rows[1])
    assert seen.routes == 2 * CONFIG.num_hidden_layers and seen.rows == 0
    away = (rows[0] - exact).norm() / exact.norm()
    assert 0 < away < 0.02


def test_what_kernels_cannot_multiply_is_refused(generator: torch.Generator) -> None:
    x, routing = case(generator, 3)
    options = ForwardOptions(expert_kernels=True)
    with open_checkpoint(TINY) as checkpoint:
        provider = CheckpointParams(checkpoint)

        class Made:
            """Weights that are in no file."""

            def __call__(self, base: str, /) -> Tensor:
                return provider(base)

        class Unfit(Made):
            """Weights of a scheme that no kernel knows."""

            def packed(self, base: str, /) -> QTensor:
                raise UnsupportedScheme("no kernel")

        with pytest.raises(V4QuantError, match="not stored in a file"):
            mixture_of_experts(x, routing, Made(), LAYER, CONFIG, options, None)
        with pytest.raises(UnsupportedScheme, match=r"experts of layers.1 .*use f32 or bf16"):
            mixture_of_experts(x, routing, Unfit(), LAYER, CONFIG, options, None)


def test_memory_counts_the_group() -> None:
    few = Work(2, 1, (64,), False)
    more = Work(2, 1, (64,), False, kernels=True)
    wide = replace(CONFIG, hidden_size=4096, moe_intermediate_size=2048)
    least = [plan_evaluation(wide, work, Limits()).nbytes for work in (few, more)]
    packed = packed_experts.GROUP * 3 * 4096 * 2048 * 2  # BF16, of which at least two copies exist
    assert least[1] >= least[0] + 2 * packed
