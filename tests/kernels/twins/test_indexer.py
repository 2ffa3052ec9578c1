"""Indexer: quantization of its vectors, scores (kernel and twin), and the selection of keys."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_tools import interprets_block_scaled, moved, poisoned_allocations
from v4quant_kernels import dispatch
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.reference64 import e2m1_values, e4m3_table, e8m0_values, indexer64
from v4quant_kernels.twins import indexer
from v4quant_kernels.twins.activation import fake_quant_e2m1, hadamard

Vectors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def gpu() -> Any:
    pytest.importorskip("triton")
    from v4quant_kernels.gpu import indexer

    return indexer


def vectors(tokens: int, heads: int, keys: int, rng: torch.Generator, dim: int = 128) -> Vectors:
    """Random codes, scale bytes from 1 to 253 within reach of float32 products, any positions."""

    def scales(*shape: int) -> Tensor:
        middle = torch.randint(2, (*shape[:-1], 1), generator=rng) * 80 + 87
        spread = torch.randint(-3, 4, shape, generator=rng)
        return (middle + spread).to(torch.uint8)

    q_codes = torch.randint(256, (tokens, heads, dim // 2), generator=rng, dtype=torch.uint8)
    k_codes = torch.randint(256, (keys, dim // 2), generator=rng, dtype=torch.uint8)
    k_packed = torch.cat((k_codes, scales(keys, dim // 32)), dim=1)
    weights = torch.randn(tokens, heads, generator=rng)
    positions = torch.randint(4 * keys + 12, (tokens,), generator=rng)
    return q_codes, scales(tokens, heads, dim // 32), k_packed, weights, positions


def assert_within(actual: Tensor, value: Tensor, bound: Tensor) -> None:
    actual = actual.cpu().double()
    assert torch.equal(actual == -torch.inf, value == -torch.inf)
    error = (actual - value).abs().masked_fill(value == -torch.inf, 0.0)
    assert (error <= bound).all(), f"worst error / bound: {(error / bound).max():.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantized_vectors(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Bit-equal to the activation rounding, near the rotation by an explicit Hadamard matrix."""
    x = torch.randn(40, 3, 128, generator=generator)
    x *= torch.exp2(torch.randint(-20, 20, (40, 3, 1), generator=generator).float())
    x[0] = 0
    x = x.to(dtype)
    codes, scales = indexer.quantize_index_vectors(x)
    assert codes.dtype == torch.uint8 and codes.shape == (40, 3, 64)
    assert scales.dtype == torch.float8_e8m0fnu and scales.shape == (40, 3, 4)
    values = e2m1_values(codes) * e8m0_values(scales).repeat_interleave(32, -1)
    assert torch.equal(values.float(), fake_quant_e2m1(hadamard(x).float(), 32))
    index = torch.arange(128)
    bits = (index[:, None] & index).unsqueeze(-1) >> torch.arange(7) & 1
    rotated = x.double() @ ((-1.0) ** bits.sum(-1)).double() * 128**-0.5
    step = e8m0_values(scales).repeat_interleave(32, -1)  # E2M1 numbers are at most 2 apart
    assert ((values - rotated).abs() <= step + rotated.abs() * 2**-7).all()


@pytest.mark.parametrize("heads", [3, 16, 20])
def test_twin_keeps_the_bound(heads: int, generator: torch.Generator) -> None:
    arguments = vectors(19, heads, 37, generator)
    assert_within(indexer.indexer_logits(*arguments), *indexer64(*arguments))


OPERANDS = ("bf16", "fp8", "native")


def small_tile(**changes: int) -> Any:
    """Few keys and tokens a program, so that small inputs have edges and several programs."""
    from v4quant_kernels.gpu.tiles import IndexTile

    return IndexTile(**{"keys": 16, "tokens": 4, "step": 2, "tiles": 2, **changes})


def runs_here(operand: str, device: str) -> None:
    """Skip where a GPU lacks the tensor cores, or the interpreter the product."""
    if device != "cuda":
        if operand == "native" and not interprets_block_scaled():
            pytest.skip("this Triton's interpreter knows no block-scaled products")
        return
    from v4quant_kernels.gpu.indexer import index_operand

    arch = dispatch.architecture(torch.empty(0, device=device))
    if (
        operand != "bf16"
        and operand != index_operand(arch)
        and not (operand == "fp8" and arch > 89)
    ):
        pytest.skip(f"sm_{arch} does not multiply {operand}")


def reference(*arguments: Tensor, operand: str, device: str) -> tuple[Tensor, Tensor]:
    """The bound grants FP8 tensor cores their short sums; the interpreter has none."""
    return indexer64(*arguments, fp8_sums=operand == "fp8" and device == "cuda")


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize(("tokens", "heads", "keys"), [(5, 3, 37), (9, 20, 50)])
def test_kernel_keeps_the_bound(
    operand: Any,
    tokens: int,
    heads: int,
    keys: int,
    gpu: Any,
    device: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five tokens decode their keys themselves, nine share expanded ones; no tile is whole."""
    runs_here(operand, device)
    arguments = vectors(tokens, heads, keys, generator)
    before = [t.clone() for t in arguments]
    on_device = [t.to(device) for t in arguments]
    with poisoned_allocations(monkeypatch):
        out = gpu.indexer_logits(*on_device, operand=operand, tile=small_tile())
    assert_within(out, *reference(*arguments, operand=operand, device=device))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def small_numbers(tokens: int, heads: int, keys: int, rng: torch.Generator) -> Vectors:
    """Vectors of 0 to 2 with scales of 1 to 8 and integer weights: all sums are exact.

    The first score is 257, which bfloat16 does not hold.
    """
    nibbles = torch.tensor([0, 2, 4, 10, 12], dtype=torch.uint8)

    def codes(*shape: int) -> Tensor:
        low, high = (nibbles[torch.randint(5, shape, generator=rng)] for _ in range(2))
        return low | (high << 4)

    def scales(*shape: int) -> Tensor:
        return torch.randint(127, 131, shape, generator=rng).to(torch.uint8)

    k_packed = torch.cat((codes(keys, 64), scales(keys, 4)), dim=1)
    weights = torch.randint(-4, 5, (tokens, heads), generator=rng).float()
    positions = torch.randint(4 * keys + 12, (tokens,), generator=rng)
    positions[0] = 4 * keys
    q_codes, q_scale = codes(tokens, heads, 64), scales(tokens, heads, 4)
    q_codes[0, 0], q_scale[0, 0], k_packed[0, 64:] = 0x22, 127, 127  # ones
    k_packed[0, :64], k_packed[0, 0] = 0x44, 0x45  # twos and a three
    weights[0] = torch.eye(heads)[0]
    return q_codes, q_scale, k_packed, weights, positions


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("tokens", [3, 8])
def test_kernel_equals_twin_where_arithmetic_is_exact(
    operand: Any, tokens: int, gpu: Any, device: str, generator: torch.Generator
) -> None:
    """With and without rounding of products, which must matter for these."""
    runs_here(operand, device)
    arguments = small_numbers(tokens, 5, 29, generator)
    on_device = [t.to(device) for t in arguments]
    tile = small_tile()
    found = [
        gpu.indexer_logits(*on_device, rounding, operand=operand, tile=tile).cpu()
        for rounding in (False, True)
    ]
    for rounding, out in enumerate(found):
        assert torch.equal(out, indexer.indexer_logits(*arguments, bool(rounding)))
    assert not torch.equal(*found)


def spoil(arguments: Vectors, what: str) -> None:
    """Make one vector unfit for FP8 in place; the last two leave all of them fit."""
    _, q_scale, k_packed, weights, _ = arguments
    wide = torch.tensor([127, 110, 127, 127], dtype=torch.uint8)
    if what == "key scales":
        k_packed[21, 64:] = wide
    elif what == "query scales":
        q_scale[2, 1] = wide
    elif what == "large keys":
        k_packed[21, 64:] = 180
    elif what == "head weight":
        weights[2, 1] = 2.0**50
    elif what == "far scale of a group of zeros":
        k_packed[21, 64:], k_packed[21, 16:32] = wide, 0x80
        k_packed[22, :64] = 0x08
        k_packed[22, 64:] = 1
    else:
        assert what == "widest that fits"
        k_packed[:, 64:] = torch.tensor([120, 131, 125, 127], dtype=torch.uint8)
        q_scale[:] = torch.tensor([131, 120, 131, 131], dtype=torch.uint8)


CASES = [
    ("key scales", 8), ("query scales", 3), ("large keys", 3), ("head weight", 3),
    ("far scale of a group of zeros", 8), ("widest that fits", 8), ("widest that fits", 3),
]  # fmt: skip


@pytest.mark.parametrize(("what", "tokens"), CASES)
def test_vectors_that_do_not_fit_fp8_are_exact_too(
    what: str, tokens: int, gpu: Any, device: str, generator: torch.Generator
) -> None:
    """Their tile is scored group by group, and the tiles beside it are not disturbed."""
    runs_here("fp8", device)
    arguments = list(vectors(tokens, 3, 24, generator))
    arguments[1] = torch.randint(125, 129, arguments[1].shape, generator=generator).byte()
    arguments[2][:, 64:] = torch.randint(125, 129, (24, 4), generator=generator).byte()
    arguments[4][:] = 1000
    spoil(tuple(arguments), what)  # type: ignore[arg-type]
    on_device = [t.to(device) for t in arguments]
    out = gpu.indexer_logits(*on_device, operand="fp8", tile=small_tile(step=1, tokens=4))
    assert_within(out, *reference(*arguments, operand="fp8", device=device))


def test_factors_mark_what_does_not_fit(device: str, generator: torch.Generator) -> None:
    """Exactly the spoiled vectors have a factor of NaN; the others decode to their values."""
    from v4quant_kernels.gpu.index_vectors import expand_keys
    from v4quant_kernels.gpu.interpreter import compute_type

    arguments = vectors(3, 3, 40, generator)
    arguments[2][:, 64:] = torch.randint(122, 133, (40, 4), generator=generator).byte()
    unfit = {"key scales": {21}, "large keys": {21}, "far scale of a group of zeros": set()}
    for what, expected in unfit.items():
        packed = arguments[2].clone()
        spoil((*arguments[:2], packed, *arguments[3:]), what)
        codes, factors = expand_keys(packed.to(device).view(torch.int32), True, compute_type())
        found = factors.cpu().isnan()
        assert set(found.nonzero().squeeze(1).tolist()) == expected
        decoded = e4m3_table()[codes.view(torch.uint8).cpu().long()] * factors.cpu()[:, None]
        scales = e8m0_values(packed[:, 64:].contiguous()).repeat_interleave(32, -1)
        assert torch.equal(decoded[~found], (e2m1_values(packed[:, :64]) * scales)[~found])


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("apart", [1, 3])
def test_arguments_may_lie_anywhere(
    apart: int, operand: Any, gpu: Any, device: str, generator: torch.Generator
) -> None:
    """Bytes that begin inside a word, and numbers with others between them."""
    runs_here(operand, device)
    arguments = [t.to(device) for t in vectors(5, 3, 20, generator)]
    ragged = {"first_key": torch.randint(10, (5,), generator=generator).to(device), "num_keys": 10}
    for own in ({}, ragged):
        here, there = (
            gpu.indexer_logits(
                *(f(t) for t in arguments),
                **{k: f(v) if isinstance(v, Tensor) else v for k, v in own.items()},
                operand=operand,
                tile=small_tile(step=1),
            )
            for f in (lambda t: t, lambda t: moved(t, apart))
        )
        assert torch.equal(here, there)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("tokens", [3, 9])
def test_columns_without_keys_are_hidden(
    tokens: int, operand: Any, gpu: Any, device: str, generator: torch.Generator
) -> None:
    runs_here(operand, device)
    arguments = vectors(tokens, 3, 13, generator)
    expected = indexer.indexer_logits(*arguments, num_keys=18)
    on_device = [t.to(device) for t in arguments]
    out = gpu.indexer_logits(*on_device, num_keys=18, operand=operand, tile=small_tile())
    assert torch.equal(out.cpu() == -torch.inf, expected == -torch.inf)
    assert bool((out[:, 13:] == -torch.inf).all()) and not bool(out.isnan().any())


def test_nan_scale_stays_visible(gpu: Any, device: str, generator: torch.Generator) -> None:
    for tokens, operands in ((2, ("fp8",)), (8, ("bf16", "fp8"))):
        arguments = vectors(tokens, 3, 8, generator)
        arguments[2][3, 64] = 255
        arguments[4][:] = 100
        outs = [indexer.indexer_logits(*arguments)]
        for operand in operands if device == "cpu" else (None,):
            on_device = (t.to(device) for t in arguments)
            tile = small_tile()
            outs.append(gpu.indexer_logits(*on_device, operand=operand, tile=tile).cpu())
        for out in outs:
            assert out[:, 3].isnan().all() and not out[:, :3].isnan().any()


def test_default_positions_and_no_keys(generator: torch.Generator) -> None:
    q_codes, q_scale, k_packed, weights, _ = vectors(9, 2, 2, generator)
    out = indexer.indexer_logits(q_codes, q_scale, k_packed, weights)
    visible = (out != -torch.inf).sum(1)
    assert visible.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    for backend in ("torch", "triton"):
        none = dispatch.indexer_logits(q_codes, q_scale, k_packed[:0], weights, backend=backend)
        assert none.shape == (9, 0)


def test_wrong_shapes_are_refused(generator: torch.Generator) -> None:
    q_codes, q_scale, k_packed, weights, positions = vectors(2, 3, 4, generator)
    for wrong, message in (
        ((q_codes[..., :48], q_scale, k_packed, weights, positions), "q_scale must have shape"),
        ((q_codes, q_scale, k_packed[:, :66], weights, positions), "k_packed must have shape"),
        ((q_codes, q_scale, k_packed, weights[:1], positions), "head_weights"),
        ((q_codes, q_scale, k_packed, weights, positions[:1]), "positions"),
        ((q_codes.int(), q_scale, k_packed, weights, positions), "must hold bytes"),
    ):
        with pytest.raises(V4QuantError, match=message):
            indexer.indexer_logits(*wrong)


def test_top_k_is_exact_and_stable(generator: torch.Generator) -> None:
    logits = torch.randint(-3, 4, (30, 50), generator=generator).float() / 2  # many ties
    logits[torch.rand(30, 50, generator=generator) < 0.3] = -torch.inf
    logits[0] = -torch.inf
    logits[1, :3] = torch.tensor([0.0, -0.0, 0.0])
    for k in (1, 7, 50, 60):
        expected = []
        for row in logits.tolist():
            order = sorted((-v, i) for i, v in enumerate(row) if v != float("-inf"))
            chosen = [i for _, i in order][:k]
            expected.append(chosen + [-1] * (k - len(chosen)))
        assert indexer.top_k(logits, k).tolist() == expected


@pytest.mark.parametrize("columns", [50, 4100])
def test_top_k_kernel_equals_a_stable_sort(
    columns: int, device: str, generator: torch.Generator
) -> None:
    """Ties beyond any bin, -0, infinities, NaN, subnormals, and rows with too few numbers."""
    from v4quant_kernels.gpu import topk

    logits = torch.randn(9, columns, generator=generator)
    logits[0] = 0.0
    logits[1] = torch.randint(-2, 3, (columns,), generator=generator).float() / 4
    logits[2, ::3] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 7], logits[3, 2] = -1e-42, 1e-42
    logits[4, ::2], logits[4, 1::2] = 0.0, -0.0
    logits[5, 11], logits[5, 30] = torch.inf, torch.nan
    logits[6] = 1.0 + torch.randint(3, (columns,), generator=generator) * 2.0**-23
    logits[7] = -logits[6]
    for k in (1, 7, 40, 60):
        expected = indexer.top_k(logits, k)
        assert torch.equal(topk.top_k(logits.to(device), k).cpu(), expected)


@pytest.mark.parametrize("module", ["torch", "triton"])
def test_top_k_in_pieces(
    module: str, gpu: Any, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pieces, the same answer as all scores at once; many scores are equal."""
    arguments = list(small_numbers(11, 3, 70, generator))
    arguments[3] = arguments[3].sign() * (arguments[3] > 0)  # half the heads silent: many zeros
    arguments[2][10:40] = arguments[2][0]
    for k, workspaces in ((5, (130,)), (64, (130, 10**6))):
        expected = indexer.top_k(indexer.indexer_logits(*arguments), k)
        q, scale, keys, weights, positions = (t.to(device) for t in arguments)
        for workspace in workspaces:
            find = gpu.index_top_k if module == "triton" else indexer.index_top_k
            how = {"arch": dispatch.architecture(q), "tile": small_tile()}
            out = find(
                q, scale, keys, weights, k, positions, workspace=workspace,
                **(how if module == "triton" else {}),
            )  # fmt: skip
            assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ragged_batches(
    backend: Any, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token sees the keys of its own sequence, and none of its neighbours'."""
    q_codes, q_scale, packed, weights, _ = vectors(4, 3, 60, generator)
    first = torch.tensor([0, 25, 25, 41])
    positions = torch.tensor([99, 3, 63, 75])
    lengths = [25, 1, 16, 19]
    with poisoned_allocations(monkeypatch) if backend == "triton" else nullcontext():
        out = dispatch.indexer_logits(
            *(t.to(device) for t in (q_codes, q_scale, packed, weights, positions)),
            first_key=first.to(device), num_keys=30, backend=backend,
        ).cpu()  # fmt: skip
    assert out.shape == (4, 30)
    for t, (begin, length) in enumerate(zip(first.tolist(), lengths, strict=True)):
        one = slice(t, t + 1)
        value, bound = indexer64(
            q_codes[one], q_scale[one], packed[begin : begin + length], weights[one],
            torch.tensor([10**6]),
        )  # fmt: skip
        assert_within(out[one, :length], value, bound)
        assert (out[t, length:] == -torch.inf).all()
    top = dispatch.index_top_k(
        *(t.to(device) for t in (q_codes, q_scale, packed, weights)), 8,
        positions.to(device), first_key=first.to(device), num_keys=30, backend=backend,
    ).cpu()  # fmt: skip
    assert torch.equal(top, indexer.top_k(out, 8))


def test_no_piece_holds_more_than_the_workspace() -> None:
    for tokens, columns, room in ((16384, 262144, 2**26), (3, 7, 4), (1, 262144, 2**26), (5, 0, 9)):
        rows, keys = indexer.pieces(tokens, columns, room)
        assert max(r.stop - r.start for r in rows) * max(s.stop - s.start for s in keys) <= room
        for cut, size in ((rows, tokens), (keys, columns)):
            assert [s.start for s in cut[1:]] == [s.stop for s in cut[:-1]]
            assert (cut[0].start, cut[-1].stop) == (0, size)
