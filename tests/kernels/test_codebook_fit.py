"""Codebook vectors with error feedback: twins agree, costs are true, codes exist, brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from v4quant_kernels import codebook_fit
from v4quant_kernels.ref import codebook_fit as ref
from v4quant_kernels.ref import ggml_codebooks
from v4quant_kernels.ref.ggml_fields import BlockShape, Codebook

VECTORS = {n: s for n, s in ggml_codebooks.SHAPES.items() if s.codebook}
EACH = pytest.mark.parametrize("name", list(VECTORS))
ROWS = 48


def problem(name: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Values [2, sub, ROWS], upper factors of inverse moments, and three steps either sign."""
    size = VECTORS[name].sub
    x = torch.randn(2, 2 * size, size, generator=generator)
    gram = x.mT @ x / (2 * size) + 0.02 * torch.eye(size)
    lower = torch.linalg.cholesky(gram.double().flip((1, 2)))
    factor = torch.linalg.inv(lower).flip((1, 2)).float().contiguous()
    values = torch.randn(2, size, ROWS, generator=generator)
    largest = float(values.abs().max()) / VECTORS[name].q[1]
    steps = largest * torch.tensor([0.7, 0.5, -0.6]).view(1, 3, 1).expand(2, 3, ROWS)
    return values, factor, steps.contiguous()


def book_of(name: str) -> Codebook:
    book = VECTORS[name].codebook
    assert book is not None
    return book


@EACH
def test_twins_agree(name: str, generator: torch.Generator) -> None:
    values, factor, steps = problem(name, generator)
    ours = codebook_fit.fit(values, factor, steps, book_of(name))
    twin = ref.fit(values, ref.weigh(factor, book_of(name)), steps)
    same = (ours[1] == twin[1]).all(1)
    assert float(same.float().mean()) > 0.97  # costs may be as good as equal
    torch.testing.assert_close(ours[2].mT[same], twin[2].mT[same], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours[3][same], twin[3][same], rtol=1e-4, atol=1e-5)
    # Where a tie fell the other way, all that comes after it in the row differs.
    torch.testing.assert_close(ours[3].sum(), twin[3].sum(), rtol=1e-2, atol=0)


@EACH
def test_costs_are_true_and_codes_exist(name: str, generator: torch.Generator) -> None:
    """The cost of a row is e H e in float64, and its vectors are in the codebook."""
    values, factor, steps = problem(name, generator)
    choice, q, errors, cost = codebook_fit.fit(values, factor, steps, book_of(name))
    missed = (values - q * steps.gather(1, choice.unsqueeze(1))).double()
    upper = factor.double()
    gram = torch.linalg.inv(upper.mT @ upper)
    true = (gram @ missed).mul_(missed).sum(1)
    torch.testing.assert_close(cost.double(), true, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(errors.double(), torch.linalg.solve(upper.mT, missed), rtol=1e-3,
                               atol=1e-4)  # fmt: skip
    shape = VECTORS[name]
    assert_known(q.mT.reshape(-1, 256).to(torch.int8), shape)


def assert_known(q: Tensor, shape: BlockShape) -> None:
    book = shape.codebook
    assert book is not None
    if book.shift:
        down = (q & 7) == 7
        ggml_codebooks.find(book, (q + 2 * down.to(torch.int8) - 1) >> 3)
        shared = down.view(-1, book.shift)
        assert bool((shared == shared[:, :1]).all())
        return
    ggml_codebooks.find(book, q.abs())
    if book.signs == "even":
        assert bool(((q < 0).view(-1, 8).sum(1) % 2 == 0).all())


@pytest.mark.parametrize("name", ["iq2_xxs", "iq2_s", "iq1_m"])
def test_near_the_best_of_all_vectors(name: str, generator: torch.Generator) -> None:
    """One group of eight against every point under every pattern of signs."""
    book = book_of(name)
    values, factor, steps = (t[:1] for t in problem(name, generator))
    values, factor, steps = values[:, :8], factor[:, :8, :8].contiguous(), steps[:, :1]
    *_, cost = codebook_fit.fit(values.contiguous(), factor, steps.contiguous(), book)
    grid = ref.grid_of(book, values.device).mT
    if book.shift:
        known = torch.cat([grid + 1, grid - 1])
    else:
        signs = torch.tensor(list(product([1.0, -1.0], repeat=8)))
        if book.signs == "even":
            signs = signs[(signs < 0).sum(1) % 2 == 0]
        known = (grid.unsqueeze(0) * signs.unsqueeze(1)).reshape(-1, 8)
    inverse = torch.linalg.inv(factor[0])
    best = []
    for row in range(12):
        missed = values[0, :, row] - known * steps[0, 0, row]
        best.append((missed @ inverse).square().sum(1).amin())
    found = cost[0, :12]
    assert bool((found >= torch.stack(best) * (1 - 1e-3)).all())
    assert float(found.sum()) <= 1.15 * float(torch.stack(best).sum())


@EACH
def test_the_best_step_wins(name: str, generator: torch.Generator) -> None:
    values, factor, steps = problem(name, generator)
    *_, cost = codebook_fit.fit(values, factor, steps, book_of(name))
    alone = [
        codebook_fit.fit(values, factor, steps[:, k : k + 1].contiguous(), book_of(name))[3]
        for k in range(3)
    ]
    assert torch.equal(torch.stack(alone).amin(0), cost)


@EACH
def test_a_bound_leaves_what_costs_less_as_it_is(name: str, generator: torch.Generator) -> None:
    values, factor, steps = problem(name, generator)
    weighing = ref.weigh(factor, book_of(name))
    for free, fit in (
        (ref.fit(values, weighing, steps), lambda b: ref.fit(values, weighing, steps, b)),
        (codebook_fit.fit(values, factor, steps, book_of(name)),
         lambda b: codebook_fit.fit(values, factor, steps, book_of(name), b)),
    ):  # fmt: skip
        bound = free[3] * torch.tensor([1.01, 1.0]).repeat(ROWS // 2)
        wanted = free[3] < bound
        bound_before = bound.clone()
        choice, q, errors, cost = fit(bound)
        assert torch.equal(bound, bound_before)
        assert torch.equal(cost, free[3].masked_fill(~wanted, torch.inf))
        assert torch.equal(choice, free[0] * wanted)
        for ours, known in ((q, free[1]), (errors, free[2])):
            assert torch.equal(ours, known * wanted.unsqueeze(1))


@EACH
def test_a_step_of_zero_costs_the_weights(name: str, generator: torch.Generator) -> None:
    """What a block of zeros has; the codes are some that exist."""
    values, factor, steps = problem(name, generator)
    choice, q, _, cost = codebook_fit.fit(values, factor, 0 * steps, book_of(name))
    inverse = torch.linalg.inv(factor)
    torch.testing.assert_close(cost, (inverse.mT @ values).square().sum(1), rtol=1e-3, atol=1e-4)
    assert bool((choice == 0).all()) and bool((q != 0).all())
