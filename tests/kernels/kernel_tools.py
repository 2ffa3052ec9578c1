"""Shared by the kernel tests: random weights, poisoned allocations, the interpreter's bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from v4quant_kernels.experts import ExpertQTensors, ExpertWeights, stack_experts
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES

GUARD = 64
KERNEL_SCHEMES = sorted(s.name for s in SCHEMES.values() if s.element != "ggml")
"""What the expert kernels multiply; GGML blocks are for other people's kernels."""


def random_qtensor(scheme_name: str, rows: int, columns: int, rng: torch.Generator) -> QTensor:
    """Random codes of every value (no NaN) with random scales, weights of about unit size."""
    scheme = SCHEMES[scheme_name]
    if scheme.element == "bf16":
        return QTensor(
            scheme, (rows, columns), torch.randn(rows, columns, generator=rng).bfloat16()
        )
    row_bytes = columns * scheme.bits // 8
    codes = torch.randint(256, (rows, row_bytes), generator=rng, dtype=torch.uint8)
    shape = (-(-rows // scheme.block[0]), -(-columns // scheme.block[1]))
    exponent = torch.randint(-3, 2, shape, generator=rng)
    if scheme.element == "e4m3":
        codes[(codes & 127) == 127] = 0x3A
        codes = codes.view(torch.float8_e4m3fn)
        exponent -= 5
    if scheme.element == "int":
        exponent -= scheme.bits - 1
    if scheme.scale == "e8m0":
        scale = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scale = torch.exp2(exponent.float()) * (1 + torch.rand(shape, generator=rng))
        scale = scale.to({"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}[scheme.scale])
    global_scale = torch.tensor(0.37) if scheme.has_global_scale else None
    return QTensor(scheme, (rows, columns), codes, scale, global_scale)


def random_experts(
    scheme: str, count: int, hidden: int, width: int, rng: torch.Generator
) -> ExpertWeights:
    def expert() -> ExpertQTensors:
        w1, w3 = (random_qtensor(scheme, width, hidden, rng) for _ in range(2))
        return w1, w3, random_qtensor(scheme, hidden, width, rng)

    return stack_experts([expert() for _ in range(count)])


def moved(x: Tensor, apart: int) -> Tensor:
    """The same numbers from the second place of a buffer on, `apart` places from one to another."""
    buffer = torch.zeros(1 + x.numel() * apart, dtype=x.dtype, device=x.device)
    view = buffer[1:].view(*x.shape, apart)[..., 0]
    return view.copy_(x)


@contextmanager
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything `torch.empty` returns starts as NaN (0x7F bytes) between guard bands."""
    guarded: list[tuple[Tensor, int]] = []

    def allocate(*shape: Any, dtype: Any = None, device: Any = None) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        flat = torch.full((size.numel() + 2 * GUARD,), 0, dtype=dtype, device=device)
        flat.view(torch.uint8).fill_(0x7F)
        if flat.is_floating_point():
            flat.fill_(torch.nan)
        guarded.append((flat, size.numel()))
        return flat[GUARD : GUARD + size.numel()].view(size)

    def allocate_like(other: Tensor, **_: Any) -> Tensor:
        return allocate(other.shape, dtype=other.dtype, device=other.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", allocate)
        patch.setattr(torch, "empty_like", allocate_like)
        yield
    assert guarded
    for flat, size in guarded:
        for band in (flat[:GUARD], flat[GUARD + size :]):
            clean = torch.isnan(band) if band.is_floating_point() else band == flat[0]
            assert clean.all(), "a kernel wrote outside its output"


def bfloat16_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreted dot, widened so that bfloat16 operands are multiplied as numbers.

    The interpreter keeps bfloat16 as its bit pattern in uint16 and multiplies the patterns.
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, widen(a), widen(b), d, *rest)

    return create_dot


def interprets_block_scaled() -> bool:
    """Whether this Triton's interpreter knows block-scaled products; that of 3.6 does not."""
    from triton.runtime.interpreter import InterpreterBuilder

    return hasattr(InterpreterBuilder, "create_dot_scaled")
