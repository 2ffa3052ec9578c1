"""Casts, rounding and the interpreter's faults, against tables written from the definitions."""

from __future__ import annotations

import pytest
import torch

from v4quant_kernels.reference64 import e4m3_table, e8m0_values
from v4quant_kernels.twins.activation import fake_quant_e4m3

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tests.kernels import kernel_tools  # noqa: E402
from v4quant_kernels.gpu import activation, decode  # noqa: E402
from v4quant_kernels.gpu.interpreter import interpreting  # noqa: E402

DEVICE = "cpu" if interpreting() else "cuda"


@triton.jit
def round_kernel(x_ptr, out_ptr, wide_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, decode.cast_to_bf16(x))
    tl.store(wide_ptr + index, decode.round_to_bf16(x))


@triton.jit
def widen_kernel(x_ptr, out_ptr):
    index = tl.arange(0, 65536)
    tl.store(out_ptr + index, decode.load_bf16(x_ptr + index, index < 65536, tl.float32))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 16)
    square = i[:, None] * 16 + i[None, :]
    a, b = tl.load(a_ptr + square), tl.load(b_ptr + square)
    tl.store(out_ptr + square, tl.dot(a, b))


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal including signs of zero; NaN equals NaN."""
    both_nan = actual.isnan() & expected.isnan()
    equal = (actual == expected) & (actual.signbit() == expected.signbit())
    return bool((both_nan | equal).all())


def test_bfloat16_rounding(generator: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=generator).int()
    special = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF])
    ties = (torch.arange(2048) << 21 | 0x8000) - 2**31
    bits[:8], bits[8:2056] = special.int(), ties.int()
    x = bits.view(torch.float32)
    out = torch.full((4096,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    wide = torch.full((4096,), torch.nan, device=DEVICE)
    round_kernel[(1,)](x.to(DEVICE), out, wide, 4096)
    assert same_bits(out.cpu(), x.bfloat16())
    assert same_bits(wide.cpu(), x.bfloat16().float())


def test_every_bfloat16_widens_exactly() -> None:
    x = torch.arange(-32768, 32768, dtype=torch.int32).short().view(torch.bfloat16)
    out = torch.full((65536,), torch.nan, device=DEVICE)
    widen_kernel[(1,)](x.to(DEVICE), out)
    assert same_bits(out.cpu(), x.float())


@pytest.mark.parametrize("columns", [128, 200])
def test_activation_rounding_equals_its_twin(
    columns: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = torch.exp2(torch.randint(-24, 20, (9, 1), generator=generator).float())
    x = (torch.randn(9, columns, generator=generator) * size).bfloat16()
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, ::2] = -0.0
    before = x.clone()
    with kernel_tools.poisoned_allocations(monkeypatch):
        out = activation.fake_quant_e4m3(x.to(DEVICE)).cpu()
        as_bytes = activation.quantize_e4m3(x.to(DEVICE))
    values = e4m3_table()[as_bytes.codes.cpu().long()]
    values *= e8m0_values(as_bytes.scale.cpu()).repeat_interleave(128, 1)[:, :columns]
    assert same_bits(values.bfloat16()[2:], out[2:]) and values[1, 3].isnan()
    expected = fake_quant_e4m3(x, 128)
    rows = [r for r in range(9) if r != 1]  # a NaN block may take any finite scale
    assert torch.equal(out[rows], expected[rows])
    assert out[1, 3].isnan()
    assert same_bits(x, before)


@pytest.mark.skipif(not interpreting(), reason="about Triton's interpreter")
def test_the_interpreter_still_needs_the_bfloat16_shim(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    expected = a.float() @ b.float()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out)
    assert not torch.allclose(out, expected, atol=1e-4), (
        "Triton's interpreter now multiplies bfloat16: remove kernel_tools.bfloat16_dot and its "
        "uses, and let gpu.interpreter.compute_type return bfloat16"
    )
    shim = kernel_tools.bfloat16_dot(InterpreterBuilder.create_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", shim)
    dot_kernel[(1,)](a, b, out)
    assert torch.allclose(out, expected, atol=1e-4)
