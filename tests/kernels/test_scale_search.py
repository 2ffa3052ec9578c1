"""The scale searches against brute force over every bfloat16 scale, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.ref.test_lattice import bfloat16_between
from v4quant_kernels import native
from v4quant_kernels.codec import dequantize
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import intq, mx
from v4quant_kernels.scale_search import QuantizedMatrix, search_dense, search_mxfp4
from v4quant_kernels.scheme import SCHEMES, Scheme

GROUPS = [32, 64, 128]
NAMES = ["int4-g32", "int4-g64", "int4-g128", "int3-g64", "int3-g128", "int2-g64", "int2-g128"]
ROWS, COLUMNS = 12, 256


def mxfp4(codes: Tensor, scale_bytes: Tensor) -> QTensor:
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    scale = scale_bytes.to(torch.uint8).contiguous().view(torch.float8_e8m0fnu)
    return QTensor(SCHEMES["mxfp4"], (codes.shape[0], codes.shape[1]), packed, scale)


def make(kind: str, rng: torch.Generator) -> QTensor:
    """Matrices of different nature."""
    codes = torch.randint(16, (ROWS, COLUMNS), generator=rng)
    bytes_ = torch.randint(118, 124, (ROWS, COLUMNS // 32), generator=rng)
    if kind == "sparse":
        codes[torch.rand(codes.shape, generator=rng) < 0.9] = 0
    elif kind == "trained":
        x = torch.randn(ROWS, COLUMNS, generator=rng)
        return mx.quantize(x, SCHEMES["mxfp4"])
    elif kind == "deep":
        bytes_ = torch.randint(60, 190, (ROWS, COLUMNS // 32), generator=rng)
    elif kind == "small tops":
        # The largest block holds only the smallest codes: the optimum lies low in the window.
        codes[:, 0:32] = torch.randint(3, (ROWS, 32), generator=rng)
        bytes_[:] = 120
        bytes_[:, 0] = 122
    elif kind == "zero groups":
        codes[::2] = 0
        codes[1::2, :64] = 8
    return mxfp4(codes, bytes_)


KINDS = ["random", "sparse", "trained", "deep", "small tops", "zero groups"]


def grouped_values(q: QTensor, group: int) -> np.ndarray:
    return dequantize(q).double().numpy().reshape(-1, group)


def group_units(q: QTensor, group: int) -> np.ndarray:
    """What the window counts from: the largest power of two S of any block, with the block's
    largest value at least 2 S (or as stored, where that is larger). 0 for a group of zeros."""
    assert q.scale is not None
    largest = np.abs(grouped_values(q, 32)).max(1)
    scale = np.ldexp(1.0, q.scale.view(torch.uint8).numpy().astype(int).reshape(-1) - 127)
    ratio = largest / scale
    scale = np.where(ratio >= 2, scale, np.where(ratio >= 1, scale / 2, scale / 4))
    return np.where(largest > 0, scale, 0.0).reshape(-1, group // 32).max(1)


def brute_force(q: QTensor, scheme: Scheme, weights: np.ndarray) -> np.ndarray:
    """Smallest weighted squared error of each group over all bfloat16 scales of the window."""
    group, low, high = scheme.group_size, -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    values, unit = grouped_values(q, group), group_units(q, group)
    window = bfloat16_between(0.5 if group == 32 else 0.25, 12 / high)
    best = (values * values * weights).sum(1)  # what a group of zeros has: nothing
    for t in (*window, *(-window)):
        scale = np.where(unit > 0, t * unit, 1.0)[:, None]
        error = np.clip(np.rint(values / scale), low, high) * scale - values
        best = np.minimum(best, (error * error * weights).sum(1))
    return best


def achieved(q: QTensor, found: QuantizedMatrix, weights: np.ndarray) -> np.ndarray:
    group = found.tensor.scheme.group_size
    error = dequantize(found.tensor).double().numpy().reshape(-1, group) - grouped_values(q, group)
    return (error * error * weights).sum(1)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to search: the compiled loop, and torch as on CUDA."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("Numba is not installed")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_search_is_the_optimum_over_all_bfloat16_scales(
    kind: str, name: str, generator: torch.Generator
) -> None:
    q, scheme = make(kind, generator), SCHEMES[name]
    group = scheme.group_size
    for weighted in (False, True):
        weights = np.ones((ROWS * COLUMNS // group, group))
        importance = None
        if weighted:
            importance = torch.rand(COLUMNS, generator=generator, dtype=torch.float64) ** 4 + 0.01
            weights = np.tile(importance.numpy(), ROWS).reshape(-1, group)
        found = search_mxfp4(q, scheme, importance)
        best, got = brute_force(q, scheme, weights), achieved(q, found, weights)
        energy = (grouped_values(q, group) ** 2 * weights).sum(1)
        # float32 sums decide between scales whose errors agree to a few parts in 10^7.
        assert (got <= best + 3e-6 * energy).all(), (weighted, (got - best).max())
        assert (got >= best - 1e-12 * energy).all(), "brute force missed something"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_finds_the_same_bits(name: str, generator: torch.Generator) -> None:
    for kind in KINDS:
        q = make(kind, generator)
        for importance in (None, torch.rand(COLUMNS, generator=generator)):
            here = search_mxfp4(q, SCHEMES[name], importance).tensor
            there = search_mxfp4(q.to(torch.device("cuda")), SCHEMES[name], importance).tensor
            assert here.scale is not None and there.scale is not None
            assert torch.equal(there.codes.cpu(), here.codes)
            assert torch.equal(there.scale.cpu(), here.scale)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_find_the_same_bits(
    kind: str, name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.available():
        pytest.skip("Numba is not installed")
    q, scheme = make(kind, generator), SCHEMES[name]
    for importance in (None, torch.rand(COLUMNS, generator=generator) ** 4):
        compiled = search_mxfp4(q, scheme, importance)
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            torch_way = search_mxfp4(q, scheme, importance)
        assert compiled.tensor.scale is not None and torch_way.tensor.scale is not None
        assert torch.equal(compiled.tensor.codes, torch_way.tensor.codes)
        assert torch.equal(compiled.tensor.scale, torch_way.tensor.scale)
        assert compiled.squared_error == pytest.approx(torch_way.squared_error, rel=1e-12)
        assert compiled.max_error == torch_way.max_error


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_reported_errors_are_true(kind: str, name: str, generator: torch.Generator) -> None:
    q, group = make(kind, generator), SCHEMES[name].group_size
    importance = torch.rand(COLUMNS, generator=generator)
    found = search_mxfp4(q, SCHEMES[name], importance)
    values = grouped_values(q, group)
    error = dequantize(found.tensor).double().numpy().reshape(-1, group) - values
    assert found.squared_error == pytest.approx((error**2).sum(), rel=1e-5, abs=0)
    assert found.squared_norm == pytest.approx((values**2).sum(), rel=1e-5, abs=0)
    assert found.max_error == pytest.approx(np.abs(error).max(), rel=1e-6, abs=0)
    assert found.relative_rms == pytest.approx(
        ((error**2).sum() / max((values**2).sum(), 1e-300)) ** 0.5, rel=1e-5
    )


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_absmax(kind: str, group: int, generator: torch.Generator) -> None:
    q = make(kind, generator)
    importance = torch.rand(COLUMNS, generator=generator, dtype=torch.float64) ** 2 + 0.01
    scheme = SCHEMES[f"int4-g{group}"]
    plain = intq.quantize(dequantize(q), scheme)
    for given in (None, importance):
        chosen = np.ones(COLUMNS) if given is None else given.numpy()
        weights = np.tile(chosen, ROWS).reshape(-1, group)
        usual = QuantizedMatrix(plain, 0, 0, 0)
        energy = (grouped_values(q, group) ** 2 * weights).sum(1)
        got = achieved(q, search_mxfp4(q, scheme, given), weights)
        assert (got <= achieved(q, usual, weights) + 3e-6 * energy).all()


def test_importance_moves_the_error_where_it_matters_less(generator: torch.Generator) -> None:
    q = make("random", generator)
    importance = torch.full((COLUMNS,), 1e-3)
    importance[::8] = 1.0
    scheme = SCHEMES["int4-g64"]
    weights = np.tile(importance.numpy(), ROWS).reshape(-1, 64)
    blind = achieved(q, search_mxfp4(q, scheme), weights).sum()
    aware = achieved(q, search_mxfp4(q, scheme, importance), weights).sum()
    assert aware < blind


@pytest.mark.parametrize("importance", [torch.zeros(COLUMNS), -torch.ones(COLUMNS)])
def test_useless_importance_is_no_importance(
    importance: Tensor, generator: torch.Generator
) -> None:
    q = make("random", generator)
    for group in GROUPS:
        a = search_mxfp4(q, SCHEMES[f"int4-g{group}"], importance).tensor
        b = search_mxfp4(q, SCHEMES[f"int4-g{group}"]).tensor
        assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("byte", [0, 1, 3, 252])
def test_ends_of_the_scale_range(byte: int, generator: torch.Generator) -> None:
    """bfloat16 subnormals hold fewer bits; what is reported is still what is stored."""
    codes = torch.randint(16, (4, 128), generator=generator)
    q = mxfp4(codes, torch.full((4, 4), byte))
    for group in GROUPS:
        found = search_mxfp4(q, SCHEMES[f"int4-g{group}"])
        error = dequantize(found.tensor).double() - dequantize(q).double()
        assert bool(error.isfinite().all())
        assert found.squared_error == pytest.approx(float(error.square().sum()), rel=1e-5, abs=0)
        assert found.max_error == pytest.approx(float(error.abs().max()), rel=1e-6, abs=0)
        assert found.relative_rms < 0.2


def test_result_does_not_depend_on_neighbours_or_pieces(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = make("random", generator)
    whole = search_mxfp4(q, SCHEMES["int4-g64"])
    monkeypatch.setattr("v4quant_kernels.scale_search._BLOCKS", 8)
    monkeypatch.setattr(native, "available", lambda: False)
    pieces = search_mxfp4(q, SCHEMES["int4-g64"])
    assert torch.equal(pieces.tensor.codes, whole.tensor.codes)
    assert pieces.tensor.scale is not None and whole.tensor.scale is not None
    assert torch.equal(pieces.tensor.scale, whole.tensor.scale)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "int8-g32", "int3-g64", "int2-g64"])
def test_dense_search_is_never_worse_than_absmax(name: str, generator: torch.Generator) -> None:
    scheme = SCHEMES[name]
    group = scheme.group_size
    x = torch.randn(8, 256, generator=generator)
    x *= torch.exp2(torch.randint(-20, 20, (8, 256 // group), generator=generator).float()
                    ).repeat_interleave(group, 1)  # fmt: skip
    x[0, :group] = 0
    weights = torch.rand(256, generator=generator, dtype=torch.float64) + 0.05
    for importance in (None, weights):
        found = search_dense(x, scheme, importance)
        chosen = torch.ones(256).double() if importance is None else weights
        by_group = [
            ((dequantize(t).double() - x.double()).square() * chosen).view(8, -1, group).sum(-1)
            for t in (found.tensor, intq.quantize(x, scheme))
        ]
        assert bool((by_group[0] <= by_group[1] * (1 + 1e-5)).all())
        error = dequantize(found.tensor).double() - x.double()
        assert found.squared_error == pytest.approx(float(error.square().sum()), rel=1e-6, abs=0)
        assert found.squared_norm == pytest.approx(
            float(x.double().square().sum()), rel=1e-6, abs=0
        )
        assert found.max_error == pytest.approx(float(error.abs().max()), rel=1e-6, abs=0)


def test_columns_must_be_whole_groups() -> None:
    q = mxfp4(torch.zeros(2, 96, dtype=torch.long), torch.full((2, 3), 127))
    with pytest.raises(UnsupportedScheme, match="96 columns"):
        search_mxfp4(q, SCHEMES["int4-g64"])
    with pytest.raises(UnsupportedScheme, match="96 columns"):
        search_dense(torch.zeros(2, 96), SCHEMES["int8-g128"])
