"""The kernels' weight layout: nothing is lost, and what cannot be laid out exactly is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.kernel_tools import KERNEL_SCHEMES, random_experts, random_qtensor
from v4quant_kernels import dispatch
from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme, V4QuantError
from v4quant_kernels.experts import ExpertWeights, stack_experts
from v4quant_kernels.runtime import check_layout, layout_codes, prepare_experts
from v4quant_kernels.scheme import SCHEMES
from v4quant_kernels.twins import moe as ref_moe

OPERANDS: tuple[Any, ...] = ("bf16", "fp8", "native", "native8")


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def experts_of(scheme: str, rng: torch.Generator, count: int = 2) -> ExpertWeights:
    group = SCHEMES[scheme].group_size
    sizes = (200, 136) if scheme == "fp8" else (2 * max(group, 32), 3 * max(group, 32))
    hidden, width = (128, 256) if group == 128 and scheme != "fp8" else sizes
    return random_experts(scheme, count, hidden, width, rng)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_every_byte_comes_back(scheme: str, operand: Any, generator: torch.Generator) -> None:
    experts = experts_of(scheme, generator)
    prepared = prepare_experts(experts, operand)
    for expert in range(2):
        for actual, expected in zip(prepared[expert], experts[expert], strict=True):
            assert actual.scheme == expected.scheme and actual.shape == expected.shape
            assert same(actual.codes, expected.codes) and same(actual.scale, expected.scale)
            if expected.global_scale is not None:
                assert actual.global_scale is not None
                assert torch.equal(actual.global_scale, expected.global_scale)
    sizes = (prepared.num_experts, prepared.hidden_size, prepared.intermediate_size)
    assert sizes == (2, experts.hidden_size, experts.intermediate_size)


def test_four_bits_stay_four_bits(generator: torch.Generator) -> None:
    for operand in OPERANDS:
        matrix = prepare_experts(random_experts("mxfp4", 1, 256, 256, generator), operand).gate_up
        assert matrix.words.nbytes + matrix.scale.nbytes == 2 * 256 * 256 * 17 // 32


def test_the_twin_reads_prepared_experts(generator: torch.Generator) -> None:
    experts = random_experts("nvfp4", 3, 64, 96, generator)
    x = torch.randn(4, 64, generator=generator).bfloat16()
    ids, routing = torch.randint(3, (4, 2), generator=generator), torch.rand(4, 2)
    expected = ref_moe.moe(x, ids, routing, experts, 10.0)
    assert torch.equal(ref_moe.moe(x, ids, routing, prepare_experts(experts), 10.0), expected)
    assert torch.equal(dispatch.moe(x, ids, routing, dispatch.prepare(experts), 10.0), expected)


def test_float32_scales_of_base_releases(generator: torch.Generator) -> None:
    experts = experts_of("fp8", generator)

    def widened(matrix: Any, factor: float) -> Any:
        return replace(matrix, scale=torch.exp2(matrix.scale.float() - 127) * factor)

    base = ExpertWeights(*(widened(m, 1.0) for m in (experts.w1, experts.w3, experts.w2)))
    for expected, actual in zip(base[1], prepare_experts(base)[1], strict=True):
        assert same(actual.scale, expected.scale) and same(actual.codes, expected.codes)
    odd = ExpertWeights(widened(experts.w1, 1.5), base.w3, base.w2)
    with pytest.raises(UnsupportedScheme, match="not all normal powers of two"):
        prepare_experts(odd)


@pytest.mark.parametrize(
    ("scheme", "byte", "part", "message"),
    [("mxfp4", 255, "scale", "scale that is NaN"), ("nvfp4", 127, "scale", "scale that is NaN"),
     ("nvfp4", 200, "scale", "NaN or negative"), ("fp8", 255, "codes", "not numbers")],
)  # fmt: skip
def test_what_is_no_number_is_refused(
    scheme: str, byte: int, part: str, message: str, generator: torch.Generator
) -> None:
    experts = experts_of(scheme, generator)
    getattr(experts.w3, part)[1, 0, 0] = byte
    with pytest.raises(NonFiniteWeight, match=message):
        prepare_experts(experts)


def test_scales_too_far_apart(generator: torch.Generator) -> None:
    """Refused where a product would lose bits; a group of zeros has no bits to lose."""
    experts = random_experts("mxfp4", 1, 64, 32, generator)
    experts.w1.scale[0, 0, 0], experts.w1.scale[0, 0, 1] = 254, 1
    experts.w1.codes[0, 0, 16:] = 0x11
    with pytest.raises(UnsupportedScheme, match="apart"):
        prepare_experts(experts)
    experts.w1.codes[0, 0, 16:] = 0x80
    for actual, expected in zip(prepare_experts(experts)[0], experts[0], strict=True):
        assert same(actual.scale, expected.scale) and same(actual.codes, expected.codes)


def test_rows_beyond_fp8_fall_back(generator: torch.Generator) -> None:
    experts = random_experts("mxfp4", 2, 64, 32, generator)
    experts.w3.codes[1, 3] = 0x11
    experts.w3.scale[1, 3, 0], experts.w3.scale[1, 3, 1] = 130, 119
    assert prepare_experts(experts, "fp8").gate_up.tag == "v4q3/t8/relative"
    experts.w3.scale[1, 3, 1] = 118
    prepared = prepare_experts(experts, "fp8")
    assert prepared.gate_up.tag == "v4q3/t16/field" and prepared.gate_up.operand == "bf16"
    assert prepared.down.operand == "fp8"


def test_formats_without_a_kernel_are_refused() -> None:
    with pytest.raises(UnsupportedScheme, match="no kernel multiplies 'q4_k'"):
        layout_codes(SCHEMES["q4_k"], "bf16")


def test_unknown_layouts_are_refused(generator: torch.Generator) -> None:
    matrix = prepare_experts(random_experts("mxfp4", 1, 64, 32, generator)).down
    check_layout(matrix)
    with pytest.raises(V4QuantError, match="prepare them again"):
        check_layout(replace(matrix, code="t17"))


def test_gate_and_up_alternate_in_eights(generator: torch.Generator) -> None:
    q = [random_qtensor("bf16", 20, 8, generator) for _ in range(2)]
    down = random_qtensor("bf16", 8, 20, generator)
    matrix = prepare_experts(stack_experts([(q[0], q[1], down)])).gate_up
    rows = matrix.words[0].view(torch.bfloat16)
    assert rows.shape == (48, 32) and not rows[:, 8:].any()
    rows = rows[:, :8]
    assert torch.equal(rows[:8], q[0].codes[:8]) and torch.equal(rows[8:16], q[1].codes[:8])
    assert torch.equal(rows[16:24], q[0].codes[8:16]) and torch.equal(rows[32:36], q[0].codes[16:])
    assert not rows[36:40].any()
