"""Error feedback: torch, compiled loops and Triton kernels against float64 and each other."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_tools import poisoned_allocations
from v4quant_kernels import dispatch, native
from v4quant_kernels.native import feedback as loops
from v4quant_kernels.twins import feedback as plain

BATCH, LOW, HIGH = 2, -4, 3


@pytest.fixture(params=["torch", "loops", "triton"])
def way(request: pytest.FixtureRequest) -> ModuleType:
    """Each implementation."""
    if request.param == "triton":
        pytest.importorskip("triton")
        return importlib.import_module("v4quant_kernels.gpu.feedback")
    if request.param == "loops" and not native.available():
        pytest.skip("Numba is not installed")
    return plain if request.param == "torch" else loops


class Problem(NamedTuple):
    """Parts of larger tensors, as solvers have them: strides are those of the whole."""

    values: Tensor
    scale: Tensor
    factor: Tensor
    gram: Tensor
    integers: Tensor


def device_of(way: ModuleType) -> str:
    """Kernels run in Triton's interpreter on the CPU, compiled on a GPU."""
    if not way.__name__.endswith("gpu.feedback"):
        return "cpu"
    interpreter = importlib.import_module("v4quant_kernels.gpu.interpreter")
    return "cpu" if interpreter.interpreting() else "cuda"


def problem(rng: torch.Generator, group: int, rows: int, device: str) -> Problem:
    columns = 3 * group
    part = slice(group, 2 * group)
    x = torch.randn(BATCH, 4 * columns, columns, generator=rng)
    gram = x.mT @ x / (4 * columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True).float().contiguous()
    values = torch.randn(BATCH, columns, rows, generator=rng)
    scale = (0.2 + 0.4 * torch.rand(BATCH, 3, rows, generator=rng)).bfloat16().float()
    scale = torch.where(torch.rand(scale.shape, generator=rng) < 0.5, scale, -scale)
    integers = torch.randint(LOW, HIGH + 1, values.shape, generator=rng).float()
    values, scale, factor, gram, integers = (
        t.to(device) for t in (values, scale, factor, gram, integers)
    )
    return Problem(
        values[:, part], scale[:, 1], factor[:, part, part], gram[:, part, part], integers[:, part]
    )


SIZES = pytest.mark.parametrize(("group", "rows"), [(16, 7), (32, 40), (64, 33)])


@SIZES
def test_rounding_with_feedback(
    way: ModuleType,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    rows: int,
) -> None:
    """Every code is the nearest to what the errors before it have made of the weight."""
    p = problem(generator, group, rows, device_of(way))
    values, integers = p.values.double(), p.integers.fill_(torch.nan)
    with poisoned_allocations(monkeypatch):
        errors = way.round_group(p.values, p.scale, p.factor, LOW, HIGH, integers).double()
    scale, factor, q = p.scale.double(), p.factor.double(), integers.double()
    for i in range(group):
        moved = values[:, i] - torch.einsum("bj,bjn->bn", factor[:, :i, i], errors[:, :i])
        place = (moved / scale).clamp(LOW, HIGH)
        assert float((q[:, i] - place).abs().max()) <= 0.5 + 1e-4
        expected = (moved - q[:, i] * scale) / factor[:, i, i].unsqueeze(1)
        torch.testing.assert_close(errors[:, i], expected, rtol=1e-4, atol=1e-4)
    assert bool((q == q.round()).all())


@SIZES
def test_code_steps(way: ModuleType, generator: torch.Generator, group: int, rows: int) -> None:
    """Every code goes to the minimum of its parabola, given those before it."""
    p = problem(generator, group, rows, device_of(way))
    pull = torch.randn(BATCH, group, rows, generator=generator).to(device_of(way))
    present, before = pull.double(), p.integers.double()
    way.code_steps(pull, p.scale, p.gram, LOW, HIGH, p.integers)
    scale, gram, q = p.scale.double(), p.gram.double(), p.integers.double()
    for i in range(group):
        steps = (q[:, :i] - before[:, :i]) * scale.unsqueeze(1)
        left = present[:, i] - torch.einsum("bj,bjn->bn", gram[:, :i, i], steps)
        place = before[:, i] + left / (scale * gram[:, i, i].unsqueeze(1))
        assert float((q[:, i] - place.clamp(LOW, HIGH)).abs().max()) <= 0.5 + 1e-4
    assert bool((q == q.round()).all())


@SIZES
def test_best_scales(
    way: ModuleType,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    rows: int,
) -> None:
    """No candidate is better by more than float32's rounding; a zero error beats all."""
    p = problem(generator, group, rows, device_of(way))
    cost = torch.rand(BATCH, 2 * group, generator=generator).to(device_of(way))[:, :group]
    sizes = 0.05 + torch.rand(BATCH, 11, rows, generator=generator).to(device_of(way))
    integers = torch.randint(0, 4, (group,), generator=generator).to(device_of(way))
    p.values[0, :, 0] = sizes[0, 4, 0] * -integers
    p.values[0, 0, 0] = sizes[0, 4, 0] * -3
    with nullcontext() if way is plain else poisoned_allocations(monkeypatch):
        found = way.best_scale(p.values, cost, sizes, LOW, HIGH)

    def errors(scale: Tensor) -> Tensor:
        step, values = scale.double().unsqueeze(1), p.values.double()
        rounded = (values / step).round().clamp(LOW, HIGH) * step
        return ((rounded - values).square() * cost.double().unsqueeze(2)).sum(1)

    tried = torch.stack([errors(s) for one in sizes.unbind(1) for s in (one, -one)])
    assert bool((errors(found) <= tried.amin(0) * (1 + 1e-4) + 1e-9).all())
    assert bool((found.unsqueeze(1).abs() == sizes).any(1).all())
    assert float(found[0, 0].abs()) == float(sizes[0, 4, 0])


def test_the_device_chooses(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Loops on the CPU; kernels where Triton is meant, but for groups they do not take."""
    pytest.importorskip("triton")
    from v4quant_kernels.gpu import feedback as kernels

    taken = []
    for module in (plain, loops, kernels):
        monkeypatch.setattr(module, "code_steps", lambda *a, m=module: taken.append(m))
    p = problem(generator, 16, 3, "cpu")
    arguments = (p.values, p.scale, p.gram, LOW, HIGH, p.integers)
    dispatch.code_steps(*arguments)
    monkeypatch.setattr(dispatch, "uses_loops", lambda tensor: False)
    dispatch.code_steps(*arguments)
    monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: True)
    dispatch.code_steps(*arguments)
    dispatch.code_steps(p.values[:, :12], *arguments[1:])
    assert taken == [loops, plain, kernels, plain]
