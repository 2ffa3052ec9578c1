"""GPTQ and refinement against their definitions, computed densely in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from v4quant_calibration.rounding.descent import _never_worse, rough_errors, row_errors
from v4quant_calibration.rounding.fieldwise import choose
from v4quant_calibration.rounding.gptq import (
    Codes,
    Grid,
    activation_order,
    best_scale,
    feedback_factor,
    gptq,
)
from v4quant_calibration.rounding.refine import refine
from v4quant_calibration.rounding.second_moments import correction, damped, gram_sum, pooled, shrunk
from v4quant_calibration.rounding.solvers import optimal, solve_batch
from v4quant_kernels import dispatch
from v4quant_kernels.codec import dequantize, quantize
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES

BATCH, ROWS, COLUMNS = 3, 5, 64


def problem(rng: torch.Generator, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Weights [B, K, N] and damped moments [B, K, K] of correlated rows."""
    mix = torch.randn(BATCH, COLUMNS, COLUMNS, generator=rng) / 8 + torch.eye(COLUMNS)
    rows = torch.randn(BATCH, tokens, COLUMNS, generator=rng) @ mix
    grams = [damped(gram_sum(x, x) / tokens).float() for x in rows]
    return torch.randn(BATCH, COLUMNS, ROWS, generator=rng), torch.stack(grams)


def gram_error(target: Tensor, gram: Tensor, codes: Codes, grid: Grid) -> Tensor:
    """Every row's error under the moments, float64 [B, N]."""
    return row_errors(target - codes.values(grid.group), gram)


def textbook(weights: Tensor, gram: Tensor, order: list[int], scale: Tensor, grid: Grid) -> Tensor:
    """Integers [K] of one row by optimal brain surgery: solve for the free channels each time."""
    weights, gram = weights.double(), gram.double()
    values, integers = weights.clone(), torch.zeros(len(weights), dtype=torch.float64)
    for step, channel in enumerate(order):
        s = float(scale[channel // grid.group])
        integers[channel] = torch.round(values[channel] / s).clamp(grid.low, grid.high)
        fixed, free = order[: step + 1], order[step + 1 :]
        error = torch.zeros_like(weights)
        error[fixed] = (
            weights[fixed] - integers[fixed] * scale.double()[torch.tensor(fixed) // grid.group]
        )
        # Minimise e H e over the free channels: H_ff e_f = -H_fx e_x.
        if free:
            right = gram[free][:, fixed] @ error[fixed]
            values[free] = weights[free] + torch.linalg.solve(gram[free][:, free], right)
    return integers


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_is_optimal_brain_surgery(bits: int, generator: torch.Generator) -> None:
    weights, gram = problem(generator)
    grid = Grid(bits, 16)
    codes = gptq(weights, gram, grid)
    order = activation_order(gram.diagonal(dim1=1, dim2=2), grid.group)
    agreed = total = 0
    for b in range(BATCH):
        for n in range(ROWS):
            scale = codes.scale[b, :, n]
            expected = textbook(weights[b, :, n], gram[b], order[b].tolist(), scale, grid)
            agreed += int((expected == codes.integers[b, :, n]).sum())
            total += COLUMNS
    # A tie broken the other way in float32 changes what follows it in that row.
    assert agreed / total > 0.9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compiled_and_torch_agree(
    bits: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two orders of the same sums: nearly all codes equal, and errors equal to 1 %."""
    weights, gram = problem(generator)
    weights[1, :16] = 0  # a group of zeros
    grid = Grid(bits, 16)
    found = []
    for compiled in (True, False):
        monkeypatch.setattr("v4quant_kernels.native.available", lambda c=compiled: c)
        first = gptq(weights, gram, grid)
        found.append((first, refine(weights, gram, first, grid)))
    (a, fine_a), (b, fine_b) = found
    assert float((a.integers == b.integers).float().mean()) > 0.9
    assert float((a.scale == b.scale).float().mean()) > 0.9
    for one, other in ((a, b), (fine_a, fine_b)):
        mine, theirs = (gram_error(weights, gram, c, grid) for c in (one, other))
        assert float(mine.sum()) == pytest.approx(float(theirs.sum()), rel=0.02)


def test_factor(generator: torch.Generator) -> None:
    _, gram = problem(generator)
    factor = feedback_factor(gram).double()
    assert torch.equal(factor, factor.triu())
    product = factor.mT @ factor @ gram.double()
    torch.testing.assert_close(
        product, torch.eye(COLUMNS).double().expand_as(product), atol=1e-3, rtol=0
    )


def test_factor_of_many_channels(generator: torch.Generator) -> None:
    """Above 256 channels the inverse is made by halves; here of moments as bad as they come."""
    rows = torch.randn(150, 600, generator=generator) * torch.logspace(0, -2, 600)
    gram = damped(gram_sum(rows, rows) / 150).float().unsqueeze(0)
    factor = feedback_factor(gram)[0].double()
    assert torch.equal(factor, factor.triu())
    product = factor.mT @ factor @ gram[0].double()
    assert float((product - torch.eye(600).double()).abs().max()) < 2e-3


def test_rough_errors(generator: torch.Generator) -> None:
    weights, gram = problem(generator)
    exact = row_errors(weights, gram)
    torch.testing.assert_close(rough_errors(weights, gram).double(), exact, rtol=1e-4, atol=0)


def test_order_keeps_groups_whole(generator: torch.Generator) -> None:
    diagonal = torch.rand(BATCH, COLUMNS, generator=generator)
    order = activation_order(diagonal, 16)
    for row, heavy in zip(order, diagonal, strict=True):
        assert sorted(row.tolist()) == list(range(COLUMNS))
        groups = row.view(-1, 16)
        assert bool((groups // 16 == groups[:, :1] // 16).all())
        weights = heavy[groups]
        assert bool((weights.diff(dim=1) <= 0).all())
        assert bool((weights.double().sum(1).diff() <= 1e-6).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scale_uses_the_longer_side(bits: int) -> None:
    """A group with one large positive value fits exactly under a negative scale."""
    grid = Grid(bits, 16)
    values = torch.zeros(1, 16, 2)
    values[0, :, 0] = torch.arange(16) % (1 << (bits - 1))
    values[0, 3] = 1 << (bits - 1)
    scale = best_scale(values, torch.ones(1, 16), grid)
    assert scale[0, 0] == -1
    rounded = torch.round(values[0] / scale[0]).clamp_(grid.low, grid.high) * scale[0]
    assert torch.equal(rounded[:, 0], values[0, :, 0])
    zeros = best_scale(torch.zeros(1, 16, 2), torch.ones(1, 16), grid)
    assert bool((zeros == 1).all())


def test_scales_are_bfloat16_and_in_place(generator: torch.Generator) -> None:
    weights, gram = problem(generator)
    weights[:, 16:32] *= 100  # a group whose scale cannot be mistaken
    codes = refine(weights, gram, gptq(weights, gram, Grid(4, 16)), Grid(4, 16))
    assert torch.equal(codes.scale, codes.scale.bfloat16().float())
    sizes = codes.scale.abs().mean((0, 2))
    assert int(sizes.argmax()) == 1 and float(sizes[1]) > 5 * float(sizes[0])
    assert bool((codes.scale != 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refinement_never_raises_the_error(bits: int, generator: torch.Generator) -> None:
    weights, gram = problem(generator, tokens=40)  # fewer rows than channels
    grid = Grid(bits, 32)
    start = gptq(weights, gram, grid)
    first = gram_error(weights, gram, start, grid)
    before = start.integers.clone(), start.scale.clone()
    errors = [first]
    for sweeps in (1, 2, 4, 8):
        errors.append(gram_error(weights, gram, refine(weights, gram, start, grid, sweeps), grid))
        assert bool((errors[-1] <= first).all())
    assert float(errors[-1].sum()) < float(first.sum())
    assert torch.equal(start.integers, before[0]) and torch.equal(start.scale, before[1])
    end = refine(weights, gram, start, grid)
    again = refine(weights, gram, end, grid)
    assert bool(
        (gram_error(weights, gram, again, grid) <= gram_error(weights, gram, end, grid)).all()
    )


def test_refinement_does_not_depend_on_company(generator: torch.Generator) -> None:
    """Members of a batch stop at different times, rows of a member too; each as if alone."""
    weights, gram = problem(generator)
    weights = torch.randn(BATCH, COLUMNS, 100, generator=generator)
    grid = Grid(3, 16)
    start = gptq(weights, gram, grid)
    together = refine(weights, gram, start, grid)
    for b in range(BATCH):
        one = slice(b, b + 1)
        own = Codes(start.integers[one], start.scale[one])
        alone = refine(weights[one], gram[one], own, grid)
        assert torch.equal(alone.integers, together.integers[one])
        assert torch.equal(alone.scale, together.scale[one])


def test_rows_that_stopped_may_be_left_out(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, gram = problem(generator)
    weights = torch.randn(BATCH, COLUMNS, 100, generator=generator)
    grid = Grid(3, 16)
    start = gptq(weights, gram, grid)
    errors = []
    for parts, span in ((1, 16), (100, 64)):
        monkeypatch.setattr("v4quant_calibration.rounding.descent._PARTS", parts)
        monkeypatch.setattr("v4quant_calibration.rounding.descent._SPAN", span)
        codes = refine(weights, gram, start, grid)
        errors.append(gram_error(weights, gram, codes, grid))
    every, few = errors
    # Left out were rows that had next to nothing left to gain; a few find another optimum.
    assert float((few <= every * 1.02).float().mean()) > 0.97
    assert float(few.sum()) == pytest.approx(float(every.sum()), rel=0.01)


def test_a_doubtful_gain_is_settled_in_float64(generator: torch.Generator) -> None:
    """Codes refined in float32 under another target's error are never kept where they lose."""
    weights, gram = problem(generator)
    grid = Grid(4, 16)
    start = refine(weights, gram, gptq(weights, gram, grid), grid, 50)
    worse = Codes(start.integers.clone(), start.scale.clone())
    worse.integers[:, 3] = (worse.integers[:, 3] + 1).clamp(grid.low, grid.high)
    nothing = torch.zeros(BATCH, ROWS, dtype=torch.bool)
    kept = _never_worse(
        weights, gram, worse, start, lambda codes: codes.values(grid.group), nothing
    )
    first, after = (gram_error(weights, gram, c, grid) for c in (start, kept))
    assert bool((after <= first).all())
    assert float((gram_error(weights, gram, worse, grid) > first).float().mean()) > 0.5


def test_refined_codes_cannot_be_bettered_alone(generator: torch.Generator) -> None:
    """After many sweeps no single code step lowers the error (brute force in float64)."""
    weights, gram = problem(generator)
    grid = Grid(3, 32)
    codes = refine(weights, gram, gptq(weights, gram, grid), grid, 200)
    best = gram_error(weights, gram, codes, grid)
    gained = 0
    for channel in range(COLUMNS):
        for step in (-1, 1):
            changed = codes.integers.clone()
            changed[:, channel] = (changed[:, channel] + step).clamp(grid.low, grid.high)
            error = gram_error(weights, gram, Codes(changed, codes.scale), grid)
            gained += int((error < best * (1 - 5e-3)).sum())
    # The last sweep may have stopped early where next to nothing was left to gain.
    assert gained <= BATCH * ROWS * COLUMNS // 100


def test_feedback_beats_rounding(generator: torch.Generator) -> None:
    weights, gram = problem(generator)
    grid = Grid(3, 32)
    codes = gptq(weights, gram, grid)
    scale = codes.scale.repeat_interleave(grid.group, 1)
    nearest = Codes(torch.round(weights / scale).clamp_(grid.low, grid.high), codes.scale)
    with_feedback = gram_error(weights, gram, codes, grid).sum()
    assert float(with_feedback) < 0.9 * float(gram_error(weights, gram, nearest, grid).sum())
    refined = gram_error(weights, gram, refine(weights, gram, codes, grid), grid).sum()
    assert float(refined) < float(with_feedback)


def test_choose(generator: torch.Generator) -> None:
    weights, gram = problem(generator)
    a, b = gptq(weights, gram, Grid(4, 32)), gptq(weights, gram, Grid(2, 32))
    mask = torch.rand(BATCH, ROWS, generator=generator) < 0.5
    mixed = choose(mask, a, b)
    for i in range(BATCH):
        for n in range(ROWS):
            source = a if mask[i, n] else b
            assert torch.equal(mixed.integers[i, :, n], source.integers[i, :, n])
            assert torch.equal(mixed.scale[i, :, n], source.scale[i, :, n])


def test_gram_sum_loses_nothing(generator: torch.Generator) -> None:
    """A million rows' worth of sums, in any split, like float64."""
    rows = torch.randn(5000, 8, generator=generator) + 100
    weights = torch.rand(5000, generator=generator)
    exact = (rows.double() * weights.double()[:, None]).mT @ rows.double()
    # 60 seeds of float32 alone are off by 1.7e-6 to 3.8e-6, 400 seeds of this by 0.8e-6 at most.
    torch.testing.assert_close(gram_sum(rows, rows, weights), exact, rtol=1.5e-6, atol=0)
    parts = gram_sum(rows[:1777], rows[:1777]) + gram_sum(rows[1777:], rows[1777:])
    torch.testing.assert_close(parts, gram_sum(rows, rows), rtol=3e-6, atol=0)


def test_moments_are_symmetric(generator: torch.Generator) -> None:
    """Only the upper half is computed, in bands of channels."""
    rows = torch.randn(1500, 1100, generator=generator)
    weights = torch.rand(1500, generator=generator)
    found = gram_sum(rows, rows, weights)
    torch.testing.assert_close(found, found.mT, rtol=1e-5, atol=1e-4)
    exact = (rows.double() * weights.double()[:, None]).mT @ rows.double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


def test_an_expert_without_rows_gets_the_pool(generator: torch.Generator) -> None:
    x = torch.randn(100, 16, generator=generator)
    pool = gram_sum(x, x) / 100
    none = gram_sum(x[:0], x[:0])
    assert torch.equal(shrunk(none, 0, pool), pool)
    many = 1e6 * torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(shrunk(many, 1e6, pool), many / 1e6, atol=1e-4, rtol=0)
    assert torch.equal(damped(torch.zeros(4, 4).double()), torch.eye(4).double())


def test_a_pool_of_few_rows_is_mixed_with_no_direction(generator: torch.Generator) -> None:
    x = torch.randn(3, 4, 16, generator=generator)
    total = torch.stack([gram_sum(rows, rows) for rows in x])
    found = pooled(total, 4, 8)
    for one, rows in zip(found, x.double(), strict=True):
        level = rows.square().mean() * torch.eye(16)
        torch.testing.assert_close(one, (rows.mT @ rows + 8 * level) / 12, check_dtype=False)
    assert not bool(pooled(total * 0, 0, 8).any())


@pytest.mark.parametrize("tokens", [8, 64, 128])
def test_few_tokens_are_no_worse_than_none(tokens: int, generator: torch.Generator) -> None:
    """Error on the inputs' true moments, where 128 channels saw few rows: codes solved on them are
    not worse than uncalibrated ones, as they are on the bare moments."""
    columns, scheme = 128, SCHEMES["int3-g64"]
    spectrum = torch.linspace(0, -3, columns).exp()
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    true = ((turn * spectrum) @ turn.mT).double()
    rows = torch.randn(tokens, columns, generator=generator) * spectrum.sqrt() @ turn.mT
    source = quantize(torch.randn(64, columns, generator=generator), SCHEMES["mxfp4"])

    def error(q: QTensor) -> float:
        lost = (dequantize(q) - dequantize(source)).double()
        return float(((lost @ true) * lost).sum())

    def solved(moments: Tensor) -> float:
        gram = damped(moments).float().unsqueeze(0)
        return error(solve_batch([[source]], gram, None, scheme)[0][0])

    total, plain = gram_sum(rows, rows), error(optimal(source, scheme).tensor)
    found = solved(pooled(total, tokens, columns / 2)) / plain
    print(f"{tokens} tokens: {found:.3f}, bare moments {solved(total / tokens) / plain:.3f}")
    assert found < 1.05
    if tokens == 64:
        assert solved(total / tokens) > 1.3 * plain


def test_rank_deficient_moments_are_safe(generator: torch.Generator) -> None:
    """One token in 64 channels: finite codes, and an error no worse than rounding's on the pool."""
    weights, _ = problem(generator)
    row = torch.randn(1, COLUMNS, generator=generator)
    gram = damped(gram_sum(row, row)).float().expand(BATCH, -1, -1)
    grid = Grid(4, 32)
    codes = refine(weights, gram, gptq(weights, gram, grid), grid)
    assert bool(torch.isfinite(codes.scale).all()) and bool(torch.isfinite(codes.integers).all())
    assert bool((codes.integers >= grid.low).all() and (codes.integers <= grid.high).all())


def test_correction_minimises_the_asymmetric_error(generator: torch.Generator) -> None:
    """W + W M is the least-squares answer on the converted rows, up to shrinkage."""
    original = torch.randn(4000, 16, generator=generator)
    converted = original + 0.3 * torch.randn(4000, 16, generator=generator) @ torch.randn(
        16, 16, generator=generator
    )
    weights = torch.randn(5, 16, generator=generator)
    count = len(original)
    gram = gram_sum(converted, converted) / count
    target = weights + weights @ correction(original - converted, converted, gram)
    wanted = original.double() @ weights.double().mT
    best = torch.linalg.lstsq(converted.double(), wanted).solution.mT
    torch.testing.assert_close(target.double(), best, atol=0.01, rtol=0.01)


def test_correction_does_not_learn_noise(generator: torch.Generator) -> None:
    rows = torch.randn(64, 32, generator=generator)
    noise = torch.randn(64, 32, generator=generator)
    gram = damped(gram_sum(rows, rows) / 64)
    signal = rows @ (torch.eye(32) * 0.1)
    assert float(correction(noise, rows, gram).abs().max()) < 0.2
    learned = correction(signal, rows, gram)
    assert float(learned.diagonal().mean()) > 0.05
    none = torch.zeros(0, 32)
    assert not bool(correction(none, none, gram).any())
    assert not bool(correction(rows * 0, rows, gram).any())


def test_kernels_solve_as_well(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of GPTQ and refinement with Triton's kernels in its interpreter."""
    pytest.importorskip("triton")
    weights, gram = problem(generator)
    grid = Grid(3, 32)

    def solved() -> tuple[Tensor, Tensor]:
        first = gptq(weights, gram, grid)
        both = first, refine(weights, gram, first, grid, 2)
        one, two = (gram_error(weights, gram, codes, grid) for codes in both)
        assert bool((two <= one).all())
        return one, two

    here = solved()
    monkeypatch.setattr(dispatch, "uses_loops", lambda tensor: False)
    monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: True)
    for kernels, expected in zip(solved(), here, strict=True):
        # Ties aside these are the same codes.
        assert float((kernels - expected).abs().median()) <= 1e-4 * float(expected.mean())
        assert float(kernels.sum()) == pytest.approx(float(expected.sum()), rel=0.02)
