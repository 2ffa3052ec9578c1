"""The benchmark of the forward pass runs and counts the products it compares with."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_forward")


def test_products_are_those_of_the_layer(bench: ModuleType) -> None:
    found = bench.beside_products("flash", 16, 2, 1, tiny=True)
    assert found["layer_seconds"] > 0 < found["products_bf16_seconds"]
    for kind in ("f32", "bf16"):
        alone = found[f"products_{kind}_seconds"]
        assert found[f"times_{kind}"] == pytest.approx(found["layer_seconds"] / alone)
    # 16 tokens through two experts and a shared one of 3 matrices, and attention's.
    assert found["products_gflop"] > 16 * 3 * 3 * 2 * 128 * 128 / 1e9


def test_both_forwards_are_timed(bench: ModuleType) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = bench.beside_transformers(64, 1)
    assert found["ours_tokens_per_second"] > 0 < found["transformers_tokens_per_second"]
