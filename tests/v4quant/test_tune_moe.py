"""`bench moe --tune` where there is no GPU: the search, the file, and the refusal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from v4quant.cli import cli
from v4quant.kernel_bench import tune_moe
from v4quant.kernel_bench.cases import SHAPES, random_inputs, random_weights
from v4quant.kernel_bench.device import Timing
from v4quant_kernels import dispatch
from v4quant_kernels.gpu import tiles
from v4quant_kernels.gpu.tiles import Tile
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import get_scheme


@pytest.fixture(scope="module")
def prepared() -> Any:
    return dispatch.prepare(random_weights(SHAPES["tiny"], get_scheme("mxfp4"), "cpu"))


def test_the_search_finds_the_best_tile_and_survives_failures(prepared: Any) -> None:
    """Each property has one best value; wide tiles of four warps fail."""
    best = Tile(128, 256, 64, 8, 4, swap=True)

    def seconds(tile: Tile) -> float:
        if tile.columns == 256 and tile.warps == 4:
            return math.inf
        wrong = sum(v != asdict(best)[k] for k, v in asdict(tile).items())
        return 1.0 + 0.1 * wrong

    start = Tile(64, 128, 128, 4, 3)
    found, after, before = tune_moe.improve(start, 128, prepared.gate_up, seconds)
    assert (found, after) == (best, 1.0) and before == seconds(start)
    same = tune_moe.improve(best, 128, prepared.gate_up, lambda tile: 1.0 + 1e-3 * tile.warps)
    assert same[0] == best, "less than a hundredth is noise"
    stuck = tune_moe.improve(start, 128, prepared.gate_up, lambda tile: math.inf)
    assert stuck[0] == start


def test_variants_suit_the_format(prepared: Any) -> None:
    tile = Tile(16, 128, 128)
    assert tune_moe.variants(tile, "rows", 16, prepared.down) == []
    assert [t.rows for t in tune_moe.variants(Tile(64, 128, 64), "rows", 64, prepared.down)] == [32]
    assert tune_moe.variants(tile, "depth", 16, prepared.down) == [replace(tile, depth=64)]
    integers = dispatch.prepare(random_weights(SHAPES["tiny"], get_scheme("int4-g32"), "cpu"))
    assert tune_moe.variants(tile, "depth", 16, integers.down) == []


def test_both_tiles_of_a_size_are_found(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second search runs with the first one's tile in place, and nothing stays behind."""

    def time_calls(calls: object, device: str) -> Timing:
        assert device == "cuda"
        return Timing(sum(10.0 - t.stages for t in tiles._TRIALS.values()), 0.0)

    monkeypatch.setattr(tune_moe, "time_calls", time_calls)
    sets = [random_inputs(SHAPES["tiny"], 3, seed, "cpu") for seed in range(2)]
    found = list(tune_moe._tune_size(prepared, "bf16", 16, sets, SilentProgress()))
    assert [f.key for f in found] == ["t16/field/32 16 swiglu", "t16/field/32 16 sums"]
    assert [f.tile.stages for f in found] == [5, 5]
    assert found[1].seconds_after == 10.0 and not tiles._TRIALS


def test_results_that_stray_are_passed_over(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_moe, "time_calls", lambda *_: Timing(1.0, 0.0))
    right = torch.ones(2, 3)

    def fail() -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    tile = Tile(16, 128, 128)
    for call, expected in (
        (lambda: right, 1.0),
        (lambda: right * 1.1, math.inf),
        (lambda: right * math.nan, math.inf),
        (fail, math.inf),
    ):
        assert tune_moe._seconds([call], right, "key", tile) == expected


def test_the_file_is_read_back_and_added_to(
    tmp_path: Path, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.json"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    first, second = Tile(16, 64, 64, 8, 2), Tile(64, 256, 64)
    for key, tile in (("t16/field/32 16 sums", first), ("t16/field/32 64 sums", second)):
        finding = tune_moe.Finding(key, tile, 2.0, 1.0)
        tune_moe.write_tiles(tune_moe.Tuned(device, tiles.triton_version(), (finding,)), path)
    monkeypatch.setenv(tiles.TILES_VARIABLE, str(path))
    assert tiles.choose_tile(90, prepared.down, 1) == first
    assert tiles.choose_tile(90, prepared.down, 40) == second
    tune_moe.write_tiles(tune_moe.Tuned("another", "9.9", ()), path)
    assert json.loads(path.read_text())["tiles"] == {}, "tiles of another device are not kept"


def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    command = ["bench", "moe", "--shape", "tiny", "--device", "cpu"]
    command += ["--tune", str(tmp_path / "tiles.json")]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code != 0 and "CUDA GPU" in str(done.exception or done.output)
    assert not (tmp_path / "tiles.json").exists()
