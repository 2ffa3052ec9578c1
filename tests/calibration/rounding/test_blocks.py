"""Solving onto GGUF's block types: choices against brute force, errors in float64, edge cases."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from torch import Tensor

from v4quant_calibration.rounding.block_codes import BlockCodes, grids, read_codes
from v4quant_calibration.rounding.block_fit import fit
from v4quant_calibration.rounding.block_gptq import block_gptq, nested_order
from v4quant_calibration.rounding.block_refine import block_refine
from v4quant_calibration.rounding.coders import BlockCoder
from v4quant_calibration.rounding.descent import row_errors
from v4quant_calibration.rounding.gptq import feedback_factor
from v4quant_calibration.rounding.second_moments import damped, gram_sum
from v4quant_calibration.rounding.solvers import optimal, solve_batch
from v4quant_kernels import codec
from v4quant_kernels.ggml import decode
from v4quant_kernels.ggml_types import get_type
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref.ggml_blocks import SHAPES
from v4quant_kernels.ref.ggml_fields import BlockShape
from v4quant_kernels.scheme import SCHEMES, Scheme

TYPES = sorted(SHAPES)
K_TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
ROWS = 24
FEW = ("q2_k", "q3_k", "q4_0", "q2_0", "iq4_xs", "iq2_xxs", "iq3_s", "iq1_m")


def moments(rng: torch.Generator, columns: int, tokens: int, batch: int = 2) -> Tensor:
    """Damped moments [B, K, K] of correlated rows."""
    mix = torch.randn(columns, columns, generator=rng) / columns**0.5 + 0.5 * torch.eye(columns)
    rows = torch.randn(batch, tokens, columns, generator=rng) @ mix
    return torch.stack([damped(gram_sum(x, x) / tokens).float() for x in rows])


def get_scheme(name: str) -> Scheme:
    """A scheme, or what one of a GGUF type looks like that recipes cannot name yet."""
    if name in SCHEMES:
        return SCHEMES[name]
    kind = get_type(name)
    return Scheme(name, "ggml", 2, (1, kind.block), "none", block_bytes=kind.block_bytes)


def width(name: str) -> int:
    return 2 * SHAPES[name].block


@pytest.mark.parametrize("name", TYPES)
def test_never_worse_than_the_encoder_and_never_rising(
    name: str, generator: torch.Generator
) -> None:
    """Plain >= GPTQ (in sum), and each row's error falls from start to end, in float64."""
    gram = moments(generator, width(name), 3 * width(name))
    target = 0.02 * torch.randn(2, width(name), ROWS, generator=generator)
    scheme = get_scheme(name)
    plain = [
        codec.quantize(t.mT.contiguous(), scheme, importance=g.diagonal())
        for t, g in zip(target, gram, strict=True)
    ]
    before = row_errors(
        target - BlockCoder(scheme).read([[q] for q in plain], target.device).values(), gram
    )
    first = block_gptq(target, gram, name)
    once = row_errors(target - first.values(), gram)
    refined = block_refine(target, gram, first, name)
    twice = row_errors(target - refined.values(), gram)
    assert float(once.sum()) < float(before.sum())
    assert bool((twice <= once).all()) and float(twice.sum()) < 0.98 * float(once.sum())


@pytest.mark.parametrize(
    "name", [t for t in TYPES if t.upper() in GGMLQuantizationType.__members__]
)
def test_codes_decode_the_same_everywhere(name: str, generator: torch.Generator) -> None:
    """What the solver believes its codes mean is what gguf's own decoder reads from the bytes."""
    gram = moments(generator, width(name), 100, batch=1)
    target = torch.randn(1, width(name), ROWS, generator=generator)
    codes = block_refine(target, gram, block_gptq(target, gram, name), name, sweeps=2)
    coder = BlockCoder(get_scheme(name))
    top, rest = coder.write(codes, 0, [10, ROWS - 10])
    data = torch.cat([top.codes, rest.codes])
    if name == "q2_0":  # not known to the package
        decoded = decode(data, name)
    else:
        kind = GGMLQuantizationType[get_type(name).dtype]
        decoded = torch.from_numpy(gguf_dequantize(data.numpy(), kind))
    assert torch.equal(decoded, codes.values()[0].mT)
    back = coder.read([[top, rest]], target.device)
    assert torch.equal(back.values(), codes.values())


@pytest.mark.parametrize("name", K_TYPES)
def test_solved_batches_keep_what_is_exact(name: str, generator: torch.Generator) -> None:
    """FP4 sources in types that hold them come out as they went in; others are not worse."""
    gram = moments(generator, 256, 600)
    sources = [
        [codec.quantize(torch.randn(ROWS, 256, generator=generator), get_scheme("mxfp4"))]
        for _ in range(2)
    ]
    scheme = get_scheme(name)
    solved = solve_batch(sources, gram, None, scheme, sweeps=4)
    for (source,), (q,), g in zip(sources, solved, gram, strict=True):
        values = codec.dequantize(source)
        plain = codec.dequantize(optimal(source, scheme, g.diagonal()).tensor)
        error, other = (
            float(row_errors((values - v).mT.unsqueeze(0), g.unsqueeze(0)).sum())
            for v in (codec.dequantize(q), plain)
        )
        assert error <= 0.9 * other
        if name in ("q5_k", "q6_k"):
            assert error == 0


@pytest.mark.parametrize("name", FEW)
def test_few_tokens_and_dead_channels(name: str, generator: torch.Generator) -> None:
    """Three rows of input for 256 channels, some channels and weights always zero."""
    columns = width(name)
    x = torch.randn(3, columns, generator=generator)
    x[:, 5:40] = 0
    gram = damped(gram_sum(x, x) / 3).float().unsqueeze(0)
    target = torch.randn(1, columns, ROWS, generator=generator)
    target[0, :, 0] = 0
    target[0, : SHAPES[name].block, 1] = 0
    first = block_gptq(target, gram, name)
    codes = block_refine(target, gram, first, name)
    assert bool(codes.values().isfinite().all())
    assert bool((codes.values()[0, :, 0] == 0).all())
    after, before = (row_errors(target - c.values(), gram) for c in (codes, first))
    assert bool((after <= before).all())
    # Whatever the moments leave free, values stay near the weights.
    assert float((codes.values() - target).abs().max()) < 4 * float(target.abs().max())


def test_no_inputs_at_all() -> None:
    """Moments of zeros become the identity: the plain problem."""
    gram = damped(torch.zeros(256, 256)).unsqueeze(0)
    target = torch.linspace(-1, 1, 256).repeat(3, 1).mT.unsqueeze(0).contiguous()
    codes = block_refine(target, gram, block_gptq(target, gram, "q4_k"), "q4_k")
    assert float((codes.values() - target).abs().max()) < 0.1


@pytest.mark.parametrize(
    "name", ["q2_k", "q3_k", "q5_0", "q5_1", "iq4_xs", "iq4_nl", "iq1_m", "iq2_xxs", "iq3_xxs"]
)
def test_compiled_and_torch_agree(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two orders of the same sums: nearly all codes equal."""
    shape = SHAPES[name]
    gram = moments(generator, shape.block, 300)
    start = block_gptq(torch.randn(2, shape.block, ROWS, generator=generator), gram, name)
    values = torch.randn(2, shape.sub, ROWS, generator=generator)
    tried = grids(start, shape, 0, 3)
    factor = feedback_factor(gram[:, : shape.sub, : shape.sub])
    found = []
    for compiled in (True, False):
        monkeypatch.setattr("v4quant_kernels.native.available", lambda c=compiled: c)
        found.append(fit(values, factor, tried.step, tried.lowest, shape))
    mine, theirs = found
    same = mine.choice == theirs.choice
    assert float(same.float().mean()) > 0.95
    assert float((mine.integers == theirs.integers).float().mean()) > 0.95
    torch.testing.assert_close(mine.cost, theirs.cost, rtol=1e-3, atol=1e-6)


def test_fit_is_the_best_of_its_grids(generator: torch.Generator) -> None:
    """Each row's cost is the least over grids of the error e H e of rounding with feedback."""
    gram = moments(generator, 16, 200, batch=1)
    factor = feedback_factor(gram)
    values = torch.randn(1, 16, ROWS, generator=generator)
    step = torch.rand(1, 7, ROWS, generator=generator) * 0.5 + 0.1
    lowest = -torch.rand(1, 7, ROWS, generator=generator) - 1
    shape = BlockShape(16, 16, (0, 7))
    found = fit(values, factor, step, lowest, shape)
    index = found.choice.unsqueeze(1)
    chosen = found.integers * step.gather(1, index) + lowest.gather(1, index)
    error = row_errors(values - chosen, gram).float()
    torch.testing.assert_close(found.cost, error, rtol=1e-3, atol=1e-5)
    alone = [
        fit(values, factor, step[:, k : k + 1], lowest[:, k : k + 1], shape).cost for k in range(7)
    ]
    assert torch.equal(torch.stack(alone).amin(0), found.cost)


def test_present_grid_comes_first(generator: torch.Generator) -> None:
    """So that a tie changes nothing."""
    for name in TYPES:
        shape = SHAPES[name]
        x = torch.randn(ROWS, shape.block, generator=generator)
        q = codec.quantize(x, get_scheme(name))
        codes = read_codes([q], x.device)
        for sub in range(shape.subs):
            tried = grids(codes, shape, sub, 2)
            assert torch.equal(tried.step[:, 0], codes.step()[:, sub])
            assert torch.equal(tried.lowest[:, 0], codes.lowest()[:, sub])
            own = slice(sub * shape.sub, (sub + 1) * shape.sub)
            assert torch.equal(codes.sub_values(sub), codes.values()[:, own])


def test_nested_order(generator: torch.Generator) -> None:
    diagonal = torch.rand(2, 1024, generator=generator)
    order = nested_order(diagonal, (256, 32, 1))
    for row, heavy in zip(order, diagonal, strict=True):
        assert sorted(row.tolist()) == list(range(1024))
        sums = heavy[row]
        for size, outer in ((1, 32), (32, 256), (256, 1024)):
            groups = row.view(-1, size)
            assert bool((groups // size == groups[:, :1] // size).all())
            ranked = sums.double().view(-1, outer // size, size).sum(2)
            assert bool((ranked.diff(dim=1) <= 1e-6).all())


def test_batches_do_not_mix(generator: torch.Generator) -> None:
    """A matrix's codes do not depend on who shares its batch."""
    gram = moments(generator, 256, 500, batch=3)
    target = torch.randn(3, 256, ROWS, generator=generator)

    def solved(part: slice) -> BlockCodes:
        first = block_gptq(target[part], gram[part], "q2_k")
        return block_refine(target[part], gram[part], first, "q2_k")

    together, alone = solved(slice(0, 3)), solved(slice(1, 2))
    same = (together.values()[1] == alone.values()[0]).float().mean()
    assert float(same) > 0.98  # batched products may round ties apart


def test_stacked_matrices_are_cut_again(generator: torch.Generator) -> None:
    gram = moments(generator, 256, 500, batch=1)
    pair = [
        codec.quantize(torch.randn(rows, 256, generator=generator), get_scheme("mxfp4"))
        for rows in (8, 16)
    ]
    found: list[QTensor]
    (found,) = solve_batch([pair], gram, None, get_scheme("q3_k"), sweeps=1)
    assert [q.shape for q in found] == [(8, 256), (16, 256)]
    for q, source in zip(found, pair, strict=True):
        error = codec.dequantize(q) - codec.dequantize(source)
        assert float(error.square().mean().sqrt()) < 0.5
