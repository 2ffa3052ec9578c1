"""Who multiplies on the CPU: the probes' conclusions, what is kept, and both libraries' numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.kernel_tools import random_experts, random_qtensor
from tests.kernels.twins.test_bf16_product import assert_sums_are_float32
from v4quant_kernels import cpu_products, dispatch
from v4quant_kernels.twins.bf16_product import Way, rounded
from v4quant_kernels.twins.onednn_product import onednn_product

needs_onednn = pytest.mark.skipif(not cpu_products.available(), reason="this torch has no oneDNN")
PROBES: tuple[Any, ...] = (
    cpu_products.float32_library,
    cpu_products.takes_bf16,
    cpu_products.has_bf16_units,
    cpu_products._units_pay,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing probed, nothing kept, nothing said; and nothing of this test stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cpu_products.VARIABLE, raising=False)
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget() -> None:
    for probe in PROBES:
        probe.cache_clear()


def clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[int]:
    """Let products take these times, turn by turn; counts them."""
    times, taken = cycle(seconds), []

    def tell(work: Any, rows: int) -> float:
        work(rows)
        taken.append(rows)
        return next(times)

    monkeypatch.setattr(cpu_products, "_seconds", tell)
    return taken


@needs_onednn
@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 64), (64, 9)), ((3, 7, 32), (32, 6)), ((2, 9, 48), (2, 48, 8)), ((300, 512), (512, 200))],
)
def test_both_libraries_sum_in_float32(
    left: tuple[int, ...], right: tuple[int, ...], generator: torch.Generator
) -> None:
    a, b = (torch.randn(shape, generator=generator) for shape in (left, right))
    assert_sums_are_float32(onednn_product(a, b), a, b)
    turned = b.mT.contiguous().mT
    assert_sums_are_float32(onednn_product(a, turned), a, b)


@needs_onednn
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("seconds", "expected"), [((0.5, 1.0), "onednn"), ((1.0, 1.0), "default")])
def test_the_faster_library_is_taken_and_remembered(
    seconds: tuple[float, float],
    expected: str,
    many: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    taken = clock(monkeypatch, *seconds)
    assert cpu_products.float32_library(many) == expected
    assert set(taken) == {cpu_products.MANY if many else cpu_products.FEW}
    (kept,) = json.loads((tmp_path / "v4quant" / "float32.json").read_text()).values()
    assert kept == expected
    cpu_products.float32_library.cache_clear()
    again = clock(monkeypatch, *seconds[::-1])
    assert cpu_products.float32_library(many) == expected and not again


@needs_onednn
@pytest.mark.parametrize("name", cpu_products.LIMITS)
def test_other_instructions_are_tried_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found with all of the processor's is no answer for fewer."""
    monkeypatch.delenv(name, raising=False)
    clock(monkeypatch, 0.5, 1.0)
    assert cpu_products.float32_library(True) == "onednn"
    monkeypatch.setenv(name, "less")
    cpu_products.float32_library.cache_clear()
    clock(monkeypatch, 1.0, 0.5)
    assert cpu_products.float32_library(True) == "default"


@needs_onednn
def test_few_rows_and_many_may_differ(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    assert cpu_products.decided() is None
    monkeypatch.setattr(
        cpu_products, "_probe_library", lambda many: "default" if many else "onednn"
    )
    asked: list[int] = []
    monkeypatch.setattr(
        cpu_products, "onednn_product", lambda a, b: asked.append(len(a)) or onednn_product(a, b)
    )
    a, b = (torch.randn(shape, generator=generator) for shape in ((128, 2048), (2048, 2048)))
    for rows in (1, 3, 4, 67, 68, 128):
        assert_sums_are_float32(dispatch.float32_product(a[:rows], b.T), a[:rows], b.T)
    assert asked == [4, 67]
    assert cpu_products.decided() == "onednn, from 68 rows on default"


@needs_onednn
def test_a_library_that_rounds_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 0.1, 1.0)

    def rounding(a: Tensor, b: Tensor) -> Tensor:
        return rounded(a) @ rounded(b)

    monkeypatch.setattr(cpu_products, "onednn_product", rounding)
    assert cpu_products.float32_library(True) == "default"


@needs_onednn
@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"a": 1}', "[" * 100_000, '{"a": "default"}', '{"a": []}']
)
def test_what_is_kept_may_be_anything(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "v4quant" / "float32.json"
    file.parent.mkdir()
    file.write_text(content)
    clock(monkeypatch, 0.1, 1.0)
    assert cpu_products.float32_library(True) == "onednn"
    assert "onednn" in json.loads(file.read_text()).values()


@needs_onednn
def test_a_cache_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "v4quant").write_text("a file where the folder should be")
    clock(monkeypatch, 0.1, 1.0)
    assert cpu_products.float32_library(True) == "onednn"


def test_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = clock(monkeypatch, 1.0)
    for said in ("default", "onednn"):
        monkeypatch.setenv(cpu_products.VARIABLE, said)
        cpu_products.float32_library.cache_clear()
        assert cpu_products.float32_library(True) == (
            said if cpu_products.available() else "default"
        )
    assert not taken


@needs_onednn
def test_large_products_go_to_the_library_and_small_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setenv(cpu_products.VARIABLE, "onednn")
    asked: list[torch.Size] = []
    monkeypatch.setattr(
        cpu_products, "onednn_product", lambda a, b: asked.append(a.shape) or onednn_product(a, b)
    )
    a, b = (torch.randn(shape, generator=generator) for shape in ((64, 512), (512, 1024)))
    assert_sums_are_float32(dispatch.float32_product(a, b), a, b)
    assert asked == [a.shape]
    for left, right in ((a[:3], b), (a[:, :8], b[:8]), (a.double(), b.double()), (a[0], b)):
        assert torch.equal(dispatch.float32_product(left, right), left @ right)
    grown = b.clone().requires_grad_()
    dispatch.float32_product(a, grown).sum().backward()  # type: ignore[no-untyped-call]
    assert grown.grad is not None and len(asked) == 1


@pytest.mark.parametrize("takes", [False, True])
def test_permission_alone_is_not_a_unit(takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe looks at the numbers: a library that ignores the permission has no units."""

    def library(a: Tensor, b: Tensor, way: Way) -> Tensor:
        taken = way == "units" and takes
        return rounded(a) @ rounded(b) if taken else a @ b

    monkeypatch.setattr(cpu_products, "product_of_bf16", library)
    assert cpu_products.takes_bf16() == takes


def test_units_are_used_only_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "takes_bf16", lambda: True)
    for seconds, expected in ((0.5, True), (1.0, False), (3.0, False)):
        cpu_products.has_bf16_units.cache_clear()
        clock(monkeypatch, seconds, 1.0)
        assert cpu_products.has_bf16_units() == expected


@pytest.mark.parametrize("scheme", ["int4-g128", "mxfp4"])
@pytest.mark.parametrize("rows", [cpu_products.FEW, cpu_products.MANY])
def test_auto_takes_units_only_where_they_were_faster(
    scheme: str, rows: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setenv(cpu_products.VARIABLE, "default")
    weight, x = random_qtensor(scheme, 32, 128, generator), torch.ones(rows, 128)
    monkeypatch.setattr(cpu_products, "takes_bf16", lambda: True)
    for seconds, expected in (((0.2, 1.0), "units"), ((2.0, 1.0), "f32"), ((1.0, 1.0), "f32")):
        cpu_products._units_pay.cache_clear()
        taken = clock(monkeypatch, *seconds)
        assert cpu_products.fastest_way(x, weight) == expected
        assert set(taken) == {rows}, "tried with about as many rows"
    monkeypatch.setattr(cpu_products, "takes_bf16", lambda: False)
    assert cpu_products.fastest_way(x, weight) == "f32"


def test_the_twin_asks_for_each_product(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    asked: list[tuple[str, int]] = []

    def choose(x: Tensor, weight: Any) -> Way:
        asked.append((weight.scheme.name, x.shape[0]))
        return "f32"

    monkeypatch.setattr(dispatch, "fastest_way", choose)
    experts = random_experts("int4-g32", 1, 64, 32, generator)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    ids, routing = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    dispatch.moe(x, ids, routing, experts, 10.0)
    assert asked == [("int4-g32", 3)] * 3


class _Weights(TorchDispatchMode):
    """Notes whether oneDNN was given the weights in one piece, either way around."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_linear_pointwise" in str(func):
            self.whole.append(args[1].is_contiguous() or args[1].mT.is_contiguous())
        return func(*args, **(kwargs or {}))


@needs_onednn
@pytest.mark.parametrize("turned", [False, True])
def test_a_part_of_a_matrix_is_copied_first(turned: bool, generator: torch.Generator) -> None:
    """oneDNN multiplies it a thousand times slower where it lies."""
    a, wide = (torch.randn(64, 200, generator=generator) for _ in range(2))
    left, right = (a[:, 3:67], wide[:, 90:]) if not turned else (a[:, :60], wide.mT[7:67])
    with _Weights() as seen:
        found = onednn_product(left, right)
    assert seen.whole == [True]
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=0, atol=1e-4)
