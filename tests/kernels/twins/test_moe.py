"""The expert kernel and its torch twin against a float64 reference and its error bound."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import kernel_tools
from tests.kernels.kernel_tools import (
    interprets_block_scaled,
    moved,
    poisoned_allocations,
    random_experts,
    random_qtensor,
)
from v4quant_kernels import dispatch
from v4quant_kernels.codec import dequantize
from v4quant_kernels.errors import UnsupportedScheme, V4QuantError
from v4quant_kernels.experts import ExpertWeights, local_expert_ids, stack_experts
from v4quant_kernels.reference64 import decode64, moe64
from v4quant_kernels.runtime import prepare_experts
from v4quant_kernels.scheme import SCHEMES
from v4quant_kernels.twins import moe as ref_moe

LIMIT = 3.0  # low enough that the clamps act on these inputs
SCHEME_NAMES = kernel_tools.KERNEL_SCHEMES
SIZES = {
    "fp8": (200, 136),
    "int8-g128": (256, 128),
    "int4-g128": (128, 256),
    "int3-g128": (128, 128),
    "int2-g128": (128, 128),
}


def sizes(scheme: str) -> tuple[int, int]:
    """(hidden, intermediate), whole groups but no multiples of the tiles."""
    group = SCHEMES[scheme].group_size
    return SIZES.get(scheme, (3 * max(group, 16), 5 * max(group, 16)))


def inputs(
    experts: ExpertWeights, tokens: int, top_k: int, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    x = (torch.randn(tokens, experts.hidden_size, generator=rng) * 0.2).bfloat16()
    ids = torch.randint(experts.num_experts, (tokens, top_k), generator=rng)
    return x, ids, torch.rand(tokens, top_k, generator=rng)


def assert_within(actual: Tensor, value: Tensor, bound: Tensor) -> None:
    error = (actual.cpu().double() - value).abs()
    assert (error <= bound).all(), f"worst error / bound: {(error / bound).max():.3g}"


def gpu_arch() -> int:
    return dispatch.architecture(torch.empty(0, device="cuda"))


def to_device(experts: ExpertWeights, device: str) -> ExpertWeights:
    def move(matrix: Any) -> Any:
        parts = {p: getattr(matrix, p).to(device) for p in ("codes", "scale", "global_scale")}
        return replace(matrix, **parts)

    return ExpertWeights(move(experts.w1), move(experts.w3), move(experts.w2))


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_two_independent_decoders_agree(scheme: str, generator: torch.Generator) -> None:
    hidden, width = sizes(scheme)
    matrix = random_qtensor(scheme, width, hidden, generator)
    assert torch.equal(dequantize(matrix).double(), decode64(matrix).float().double())


@pytest.mark.parametrize("activations", ["bf16", "e4m3"])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_twin_keeps_the_bound(scheme: str, activations: Any, generator: torch.Generator) -> None:
    """By float32 products and by those of BF16 operands, which lose nothing."""
    experts = random_experts(scheme, 4, *sizes(scheme), generator)
    x, ids, routing = inputs(experts, 23, 2, generator)
    expected = moe64(x, ids, routing, experts, LIMIT, activations)
    for products in ("f32", "bf16"):
        out = dispatch.moe(
            x, ids, routing, experts, LIMIT, None, activations,
            products=products, backend="torch",  # type: ignore[arg-type]
        )  # fmt: skip
        assert_within(out, *expected)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_kernel_keeps_the_bound(
    scheme: str, gpu: Any, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and bfloat16 tensor cores; both epilogues, and a tile's sums split along K."""
    experts = random_experts(scheme, 3, *sizes(scheme), generator)
    arguments = inputs(experts, 5, 2, generator)
    before = [t.clone() for t in arguments]
    prepared = prepare_experts(to_device(experts, device))
    cases: list[tuple[Any, int]] = [("bf16", 1)]
    if scheme in {"mxfp4", "int4-g32", "fp8"}:
        cases += [("e4m3", 2)]
    for activations, split in cases:
        with poisoned_allocations(monkeypatch):
            out = gpu.moe(
                *(t.to(device) for t in arguments), prepared, LIMIT, None, activations, split=split
            )
        assert_within(out, *moe64(*arguments, experts, LIMIT, activations))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize(("scheme", "swap"), [("mxfp4", False), ("int4-g32", True)])
def test_large_tiles_apply_swiglu_themselves(
    scheme: str,
    swap: bool,
    gpu: Any,
    device: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = random_experts(scheme, 2, *sizes(scheme), generator)
    arguments = inputs(experts, 7, 2, generator)
    tile = gpu.Tile(32, 64, swap=swap)
    with poisoned_allocations(monkeypatch):
        out = gpu.moe(
            *(t.to(device) for t in arguments), to_device(experts, device), LIMIT, tile=tile
        )
    assert_within(out, *moe64(*arguments, experts, LIMIT))


@pytest.mark.parametrize(
    ("scheme", "operand"),
    [("mxfp4", "fp8"), ("fp8", "fp8"), ("mxfp4", "native"), ("mxfp4", "native8"),
     ("mxfp8", "native")],
)  # fmt: skip
def test_eight_bit_tensor_cores(
    scheme: str,
    operand: Any,
    gpu: Any,
    device: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """E4M3 activations multiplied as they are, with decoded or block-scaled weights."""
    if device == "cuda" and dispatch.operand_for(gpu_arch(), "e4m3") != operand:
        pytest.skip("another GPU's tensor cores")
    if device == "cpu" and operand != "fp8" and not interprets_block_scaled():
        pytest.skip("this Triton's interpreter knows no block-scaled products")
    experts = random_experts(scheme, 2, *sizes(scheme), generator)
    prepared = prepare_experts(to_device(experts, device), operand)
    assert prepared.down.operand == operand and prepared.gate_up.operand == operand
    arguments = inputs(experts, 6, 2, generator)
    small = gpu.Tile(16, 128, swap=True)
    for tile, split in (
        (small, None),
        (gpu.Tile(32, 128), None),
        (small, 3),
    ):  # some get no columns
        with poisoned_allocations(monkeypatch):
            out = gpu.moe(
                *(t.to(device) for t in arguments),
                prepared,
                LIMIT,
                None,
                "e4m3",
                tile=tile,
                split=split,
            )
        fp8_sums = operand == "fp8" and device == "cuda"
        assert_within(out, *moe64(*arguments, experts, LIMIT, "e4m3", fp8_sums=fp8_sums))
    with pytest.raises(V4QuantError, match="prepare them for bfloat16"):
        gpu.moe(*(t.to(device) for t in arguments), prepared, LIMIT)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("load", ["one takes all", "some empty", "skipped slots"])
def test_uneven_routing(
    load: str,
    rows: int,
    gpu: Any,
    device: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More slots than a tile for one expert, none for others, and slots of no expert."""
    experts = random_experts("mxfp4", 4, 64, 96, generator)
    x, ids, routing = inputs(experts, 21, 2, generator)
    if load == "one takes all":
        ids.fill_(2)
    elif load == "some empty":
        ids = ids % 2 * 3
    else:
        ids[::3, 0], ids[1::4, 1], ids[5] = -1, -1, -1
    tile = gpu.Tile(rows, 64, swap=rows == 16)
    with poisoned_allocations(monkeypatch):
        out = gpu.moe(
            x.to(device),
            ids.to(device),
            routing.to(device),
            to_device(experts, device),
            LIMIT,
            tile=tile,
        )
    value, bound = moe64(x, ids, routing, experts, LIMIT)
    assert_within(out, value, bound)
    assert_within(ref_moe.moe(x, ids, routing, experts, LIMIT), value, bound)


def test_slots_are_sorted_by_expert(gpu: Any, device: str, generator: torch.Generator) -> None:
    ids = torch.randint(-1, 6, (1500,), generator=generator, dtype=torch.int32)
    plan = gpu.sort_slots(gpu.Routed(ids.to(device), None, 7), 16)  # expert 6 is empty
    slots, tile_expert = plan.sorted_slots.cpu().view(-1, 16), plan.tile_expert.cpu()
    found = []
    for expert in range(7):
        mine = slots[tile_expert == expert].flatten()
        expected = (ids == expert).nonzero().squeeze(1).int()
        assert torch.equal(mine[: len(expected)], expected)
        assert (mine[len(expected) :] == -1).all() and len(mine) - len(expected) < 16
        found += [expert] * (tile_expert == expert).sum().item()
    assert tile_expert.tolist() == found + [-1] * (len(tile_expert) - len(found))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_few_tokens(tokens: int, backend: Any, device: str, generator: torch.Generator) -> None:
    experts = random_experts("int4-g64", 2, 128, 64, generator)
    arguments = inputs(experts, tokens, 2, generator)
    on_device = [t.to(device) for t in arguments]
    out = dispatch.moe(*on_device, to_device(experts, device), LIMIT, backend=backend)
    assert out.shape == (tokens, 128) and out.dtype == torch.bfloat16
    assert_within(out, *moe64(*arguments, experts, LIMIT))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_expert_parallel_ranks_add_up(
    backend: Any, device: str, generator: torch.Generator
) -> None:
    """Each rank holds half the experts; foreign slots add nothing, and an unknown id is skipped."""
    experts = [
        tuple(random_qtensor("mxfp4", n, k, generator) for n, k in ((32, 64), (32, 64), (64, 32)))
        for _ in range(4)
    ]
    whole = stack_experts(experts)  # type: ignore[arg-type]
    x, ids, routing = inputs(whole, 6, 2, generator)
    ids[0] = torch.tensor([0, 3])
    ids[1, 1], ids[2] = 99, 4
    for mine in ([0, 2], [3, 1]):
        rank = stack_experts([experts[i] for i in mine])  # type: ignore[misc]
        expert_map = torch.tensor([2, -1, -1, 2])  # 2: none of two
        expert_map[mine] = torch.arange(2)
        out = dispatch.moe(
            x.to(device),
            ids.to(device),
            routing.to(device),
            to_device(rank, device),
            LIMIT,
            expert_map.to(device),
            backend=backend,
        )
        here = sum(ids == i for i in mine).bool()
        assert_within(out, *moe64(x, ids.where(here, -1), routing, whole, LIMIT))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("ids_type", [torch.int8, torch.int16, torch.int32])
def test_arguments_may_lie_anywhere(
    backend: Any, ids_type: torch.dtype, device: str, generator: torch.Generator
) -> None:
    """With others between their numbers, such as a column of all ranks' maps."""
    experts = to_device(random_experts("mxfp4", 3, 64, 32, generator), device)
    x, ids, routing = inputs(random_experts("mxfp4", 5, 64, 32, generator), 4, 3, generator)
    expert_map = torch.tensor([2, -1, 0, 1, -1])
    arguments = [t.to(device) for t in (x, ids, routing)]
    expected = dispatch.moe(*arguments, experts, LIMIT, expert_map.to(device), backend=backend)
    for apart in (1, 3):
        x, ids, routing = (moved(t, apart) for t in arguments)
        there = moved(expert_map.to(ids_type).to(device), apart)
        found = dispatch.moe(x, ids.to(ids_type), routing, experts, LIMIT, there, backend=backend)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extreme_scales(backend: Any, device: str, generator: torch.Generator) -> None:
    """Scale bytes 254 (2^127) before tiny tokens, and 1 (2^-126) behind."""
    experts = random_experts("mxfp4", 1, 64, 32, generator)
    for matrix, byte in ((experts.w1, 254), (experts.w3, 254), (experts.w2, 1)):
        matrix.codes.bitwise_and_(0x99)  # 0 and +-0.5, so that nothing overflows
        matrix.scale.fill_(byte)
    x = (torch.randn(3, 64, generator=generator) * 2.0**-126).bfloat16()
    ids, routing = torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), 8.0)
    value, bound = moe64(x, ids, routing, experts, LIMIT)
    on_device = [t.to(device) for t in (x, ids, routing)]
    out = dispatch.moe(*on_device, to_device(experts, device), LIMIT, backend=backend)
    assert (out != 0).any()
    assert_within(out, value, bound)


@pytest.mark.parametrize("activations", ["bf16", "e4m3"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_stays_with_its_token(
    backend: Any, activations: Any, device: str, generator: torch.Generator
) -> None:
    experts = random_experts("mxfp4", 1, 64, 32, generator)
    x, ids, routing = inputs(experts, 5, 1, generator)
    x[2, 9] = torch.nan
    experts.w1.codes[0, :, 4], experts.w3.codes[0, :, 4] = 0x22, 0x22  # column 9 is not all zeros
    on_device = [t.to(device) for t in (x, ids, routing)]
    out = dispatch.moe(
        *on_device, to_device(experts, device), LIMIT, activations=activations, backend=backend
    )
    assert torch.equal(out.isnan().all(1).cpu(), torch.arange(5) == 2)
    assert not out[[0, 1, 3, 4]].isnan().any()


def test_a_gate_that_is_no_number_stays_visible(gpu: Any, device: str) -> None:
    """As a NaN of the up projection does: minimum and maximum alone would hide both."""
    from v4quant_kernels.gpu.activation import activate
    from v4quant_kernels.gpu.routing import Routed

    sums = torch.ones(1, 1, 16, device=device)  # eight gates, then as many of up
    sums[..., [3, 8 + 5]] = torch.nan
    who = Routed(torch.zeros(1, dtype=torch.int64, device=device), None, 1)
    h = activate(sums, torch.ones(1, 1, device=device), who, 8, LIMIT, "none")
    assert h[0].isnan().nonzero().flatten().tolist() == [3, 5]


def test_same_input_same_bits(gpu: Any, device: str, generator: torch.Generator) -> None:
    experts = to_device(random_experts("int4-g32", 3, 96, 64, generator), device)
    arguments = [t.to(device) for t in inputs(experts, 9, 3, generator)]
    first, second = (gpu.moe(*arguments, experts, LIMIT) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("which", ["w1", "w3", "w2"])
def test_the_bound_notices_one_wrong_code(which: str, generator: torch.Generator) -> None:
    experts = random_experts("int4-g64", 1, 128, 128, generator)
    x, ids, routing = inputs(experts, 64, 1, generator)
    value, bound = moe64(x, ids, routing.fill_(1.0), experts, math.inf)
    codes = getattr(experts, which).codes
    codes[0, 7, 20] ^= 0x88  # two weights off by half the range
    out = ref_moe.moe(x, ids, routing, experts, math.inf).double()
    assert ((out - value).abs() > bound).any()


def test_local_ids() -> None:
    ids = torch.tensor([[0, 3, -1], [2, 1, 7]])
    expert_map = torch.tensor([-1, 0, 1, -1])
    expected = torch.tensor([[-1, -1, -1], [1, 0, -1]], dtype=torch.int32)
    assert torch.equal(local_expert_ids(ids, 2, expert_map), expected)
    assert local_expert_ids(ids, 3, None).tolist() == [[0, -1, -1], [2, 1, -1]]


def test_stacking_refuses_what_does_not_fit(generator: torch.Generator) -> None:
    def matrix(scheme: str, rows: int, columns: int) -> Any:
        return random_qtensor(scheme, rows, columns, generator)

    good = matrix("mxfp4", 32, 64), matrix("mxfp4", 32, 64), matrix("mxfp4", 64, 32)
    with pytest.raises(V4QuantError, match="at least one"):
        stack_experts([])
    with pytest.raises(UnsupportedScheme, match="w1 is mxfp4 and w3 is mxfp8"):
        stack_experts([(good[0], matrix("mxfp8", 32, 64), good[2])])
    with pytest.raises(V4QuantError, match="w2 must be its transpose"):
        stack_experts([(good[0], good[1], good[0])])
    with pytest.raises(V4QuantError, match="expert 1 has w2 of shape"):
        stack_experts([good, (good[0], good[1], matrix("mxfp4", 96, 32))])
    with pytest.raises(UnsupportedScheme, match="expert 1 has w1 in int8-g32"):
        stack_experts([good, (matrix("int8-g32", 32, 64), good[1], good[2])])


def test_stacking_keeps_every_expert(generator: torch.Generator) -> None:
    triples = [
        (
            random_qtensor("nvfp4", 32, 64, generator),
            random_qtensor("nvfp4", 32, 64, generator),
            random_qtensor("int4-g32", 64, 32, generator),
        )
        for _ in range(3)
    ]
    stacked = stack_experts(triples)
    for expert, triple in enumerate(triples):
        for actual, expected in zip(stacked[expert], triple, strict=True):
            assert actual.scheme == expected.scheme
            assert torch.equal(dequantize(actual), dequantize(expected))


def test_wrong_inputs_are_refused(generator: torch.Generator) -> None:
    experts = random_experts("mxfp4", 1, 64, 32, generator)
    x, ids, routing = inputs(experts, 2, 1, generator)
    for wrong, message in (
        ((x.float(), ids, routing), "x must be bfloat16"),
        ((x[:, :32], ids, routing), r"\[tokens, 64\]"),
        ((x, ids.float(), routing), "expert_ids must be signed integers"),
        ((x, ids.to(torch.uint8), routing), "expert_ids must be signed integers"),
        ((x, ids, routing.double()), "expert_weights must be float32"),
        ((x, ids, routing[:1]), "expert_weights"),
    ):
        with pytest.raises(V4QuantError, match=message):
            dispatch.moe(*wrong, experts, LIMIT)
    for wrong_map in (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(V4QuantError, match="expert_map must be signed integers"):
            dispatch.moe(x, ids, routing, experts, LIMIT, wrong_map)
