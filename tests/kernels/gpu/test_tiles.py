"""The choice of tiles: the static table, and a tuned one that belongs to one device."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.kernel_tools import random_experts
from v4quant_kernels import dispatch
from v4quant_kernels.runtime import RuntimeMatrix, prepare_experts


@pytest.fixture
def tiles() -> Any:
    pytest.importorskip("triton")
    from v4quant_kernels.gpu import tiles

    return tiles


@pytest.fixture
def matrix(generator: torch.Generator) -> RuntimeMatrix:
    return prepare_experts(random_experts("mxfp4", 1, 64, 32, generator)).gate_up


def test_larger_batches_take_larger_tiles(
    tiles: Any, matrix: RuntimeMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "triton_version", lambda: "3.10.0")
    for arch in (80, 89, 90, 100, 120):
        rows = [tiles.choose_tile(arch, matrix, n).rows for n in (0.02, 16, 16.1, 64, 65, 4000)]
        assert rows == [16, 16, 64, 64, 128, 128]


def test_older_tritons_have_room_for_smaller_tiles_on_sm_100(
    tiles: Any, matrix: RuntimeMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "triton_version", lambda: "3.6.0")
    assert [tiles.choose_tile(a, matrix, 4000).rows for a in (90, 100, 120)] == [128, 64, 128]


@pytest.mark.parametrize(("arch", "like"), [(87, 80), (103, 100), (110, 100), (121, 120)])
def test_relatives_take_the_tiles_of_what_was_compiled(
    arch: int, like: int, tiles: Any, generator: torch.Generator
) -> None:
    """A DGX Spark (sm_121) has the shared memory of sm_120, not of sm_100."""
    for scheme in ("mxfp4", "int4-g32", "fp8", "bf16"):
        experts = random_experts(scheme, 1, 128, 128, generator)
        for activations in ("bf16", "e4m3"):
            assert dispatch.operand_for(arch, activations) == dispatch.operand_for(
                like, activations
            )
            prepared = prepare_experts(experts, dispatch.operand_for(arch, activations)).gate_up
            for size in tiles.SIZES:
                own, known = (tiles.static_tile(a, prepared, size) for a in (arch, like))
                assert own == known
    for shared in (False, True):
        assert tiles.index_tile(arch, shared) == tiles.index_tile(like, shared)


def test_few_tiles_are_shared(tiles: Any, generator: torch.Generator) -> None:
    """Whole steps for every program, and no sharing where there is work for all anyway."""
    matrix = prepare_experts(random_experts("mxfp4", 1, 1024, 128, generator)).gate_up
    tile = tiles.Tile(16, 128)
    longer = prepare_experts(random_experts("mxfp4", 1, 2048, 128, generator)).gate_up
    assert [tiles.choose_split(n, longer, tile) for n in (1, 150, 1000)] == [4, 2, 1]
    assert tiles.choose_split(1, matrix, tile) == 2
    odd = prepare_experts(random_experts("mxfp4", 1, 992, 128, generator)).gate_up
    assert tiles.choose_split(1, odd, tile) == 1


def test_a_tuned_table(
    tiles: Any, matrix: RuntimeMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    content = {
        "device": device,
        "triton": tiles.triton_version(),
        "tiles": {"t16/field/32 16 sums": {"rows": 16, "columns": 32}},
    }
    good, foreign, broken = (tmp_path / name for name in ("good", "foreign", "broken"))
    good.write_text(json.dumps(content))
    foreign.write_text(json.dumps(content | {"triton": "1.0"}))
    broken.write_text('{"tiles": 3')
    static = tiles.choose_tile(90, matrix, 1)
    monkeypatch.setenv(tiles.TILES_VARIABLE, str(good))
    assert tiles.choose_tile(90, matrix, 1) == tiles.Tile(16, 32)
    assert tiles.choose_tile(90, matrix, 40) == tiles.static_tile(90, matrix, 64)
    odd, pipe = tmp_path / "odd", tmp_path / "pipe"
    odd.write_text(json.dumps(content | {"tiles": {"t16 16 sums": {"rows": "16", "columns": 1}}}))
    os.mkfifo(pipe)
    cases = (
        (foreign, "was tuned for"), (broken, "cannot read"), (odd, "made of integers"),
        (pipe, "not a regular file"), (Path("/dev/zero"), "not a regular file"),
    )  # fmt: skip
    for path, message in cases:
        monkeypatch.setenv(tiles.TILES_VARIABLE, str(path))
        with pytest.warns(UserWarning, match=message):
            assert tiles.choose_tile(90, matrix, 1) == static
