"""The expert kernels at sizes not divisible by eight: right results, nothing written outside.

The words' rows are filled up to eights, so a hidden or intermediate size that is none makes the
kernels' tiles wider than what they are asked for. A scheme in groups has whole groups of columns,
so the other projections, which have the odd size as columns, are in BF16 or tiled FP8.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.kernel_tools import (
    KERNEL_SCHEMES,
    interprets_block_scaled,
    poisoned_allocations,
    random_qtensor,
)
from tests.kernels.twins.test_moe import LIMIT, assert_within, gpu_arch, inputs, to_device
from v4quant_kernels import dispatch
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.experts import ExpertWeights, stack_experts
from v4quant_kernels.reference64 import moe64
from v4quant_kernels.runtime import prepare_experts
from v4quant_kernels.scheme import SCHEMES

ODD = (9, 18, 27, 36, 45, 54, 63)  # every remainder of eight
EIGHT_BITS = [("mxfp4", "fp8"), ("fp8", "fp8"), ("mxfp4", "native"), ("mxfp4", "native8"),
              ("mxfp8", "native")]  # fmt: skip


def experts_of(
    inner: str, outer: str, hidden: int, width: int, rng: torch.Generator
) -> ExpertWeights:
    """Two experts whose gate and up are in `inner` and whose down is in `outer`."""
    return stack_experts([
        (
            random_qtensor(inner, width, hidden, rng),
            random_qtensor(inner, width, hidden, rng),
            random_qtensor(outer, hidden, width, rng),
        )
        for _ in range(2)
    ])  # fmt: skip


def odd_pairs(scheme: str, rng: torch.Generator) -> list[ExpertWeights]:
    """Experts with `scheme` where the odd size is rows: of hidden, now and then of the other."""
    group, other = max(32, SCHEMES[scheme].group_size), ("bf16", "fp8")
    found = []
    for i, odd in enumerate(ODD):
        found.append(experts_of(other[i % 2], scheme, odd, group, rng))
        if i % 3 == 0:
            found.append(experts_of(scheme, other[i % 2], group, odd, rng))
    return found


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_every_odd_size(
    scheme: str, gpu: Any, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums alone and SwiGLU at the end of a tile, by turns."""
    for i, experts in enumerate(odd_pairs(scheme, generator)):
        arguments = inputs(experts, 1, 2, generator)
        tile = (None, gpu.Tile(32, 64, swap=i % 4 == 1))[i % 2]
        with poisoned_allocations(monkeypatch):
            out = gpu.moe(
                *(t.to(device) for t in arguments), to_device(experts, device), LIMIT, tile=tile
            )
        assert_within(out, *moe64(*arguments, experts, LIMIT))


@pytest.mark.parametrize(("scheme", "operand"), EIGHT_BITS)
def test_every_odd_size_of_eight_bit_operands(
    scheme: str,
    operand: Any,
    gpu: Any,
    device: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cuda" and dispatch.operand_for(gpu_arch(), "e4m3") != operand:
        pytest.skip("another GPU's tensor cores")
    if device == "cpu" and operand != "fp8" and not interprets_block_scaled():
        pytest.skip("this Triton's interpreter knows no block-scaled products")
    for i, experts in enumerate(odd_pairs(scheme, generator)):
        arguments = inputs(experts, 1, 2, generator)
        tile = (gpu.Tile(16, 128, swap=True), gpu.Tile(32, 64))[i % 2]
        prepared = prepare_experts(to_device(experts, device), operand)
        with poisoned_allocations(monkeypatch):
            out = gpu.moe(
                *(t.to(device) for t in arguments), prepared, LIMIT, None, "e4m3", tile=tile
            )
        fp8_sums = operand == "fp8" and device == "cuda"
        assert_within(out, *moe64(*arguments, experts, LIMIT, "e4m3", fp8_sums=fp8_sums))


@pytest.mark.parametrize("scheme", [s for s in KERNEL_SCHEMES if s not in {"bf16", "fp8"}])
def test_columns_that_are_no_whole_groups_are_refused(
    scheme: str, generator: torch.Generator
) -> None:
    group = SCHEMES[scheme].group_size
    columns = group + group // 2
    with pytest.raises(UnsupportedScheme, match=rf"w1 has {columns} columns.*{scheme}"):
        experts_of(scheme, "bf16", columns, 16, generator)
    with pytest.raises(UnsupportedScheme, match=rf"w2 has {columns} columns.*{scheme}"):
        experts_of("bf16", scheme, 16, columns, generator)
