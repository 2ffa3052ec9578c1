"""`bench moe --tune` where there is no GPU: the search, the file, and the refusal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from v4quant.bench.choices import INDEX_CASES, SHAPES
from v4quant.bench.kernels import tune, tune_indexer, tune_moe
from v4quant.bench.kernels.cases import random_inputs, random_weights
from v4quant.bench.kernels.device import Timing
from v4quant.cli import cli
from v4quant_formats.errors import OutputError
from v4quant_kernels import dispatch
from v4quant_kernels.gpu import tiles
from v4quant_kernels.gpu.tiles import Tile
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import get_scheme


@pytest.fixture(scope="module")
def prepared() -> Any:
    return dispatch.prepare(random_weights(SHAPES["tiny"], get_scheme("mxfp4"), "cpu"))


def test_the_search_finds_the_best_tile_and_survives_failures() -> None:
    """Each property has one best value; wide tiles of four warps fail."""
    best = Tile(128, 256, 8, 4, swap=True)

    def seconds(tile: Tile) -> float:
        if tile.columns == 256 and tile.warps == 4:
            return math.inf
        wrong = sum(v != asdict(best)[k] for k, v in asdict(tile).items())
        return 1.0 + 0.1 * wrong

    start = Tile(64, 128, 4, 3)
    suited = partial(tune_moe.variants, size=128)
    found, after, before = tune.improve(start, tune_moe.VALUES, suited, seconds)
    assert (found, after) == (best, 1.0) and before == seconds(start)
    same = tune.improve(best, tune_moe.VALUES, suited, lambda tile: 1.0 + 1e-3 * tile.warps)
    assert same[0] == best, "less than a hundredth is noise"
    stuck = tune.improve(start, tune_moe.VALUES, suited, lambda tile: math.inf)
    assert stuck[0] == start


def test_variants_suit_the_size() -> None:
    assert tune_moe.variants(Tile(16, 128), "rows", 16) == []
    assert [t.rows for t in tune_moe.variants(Tile(64, 128), "rows", 64)] == [32]
    assert tune_moe.variants(Tile(16, 128), "swap", 16) == [Tile(16, 128, swap=True)]


def test_both_tiles_of_a_size_are_found(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second search runs with the first one's tile in place, and nothing stays behind."""

    def time_calls(calls: object, device: str) -> Timing:
        assert device == "cuda"
        return Timing(sum(10.0 - t.stages for t in tiles._TRIALS.values()), 0.0)

    monkeypatch.setattr(tune, "time_calls", time_calls)
    sets = [random_inputs(SHAPES["tiny"], 3, seed, "cpu") for seed in range(2)]
    found = list(tune_moe._tune_size(prepared, "bf16", 16, sets, SilentProgress()))
    assert [f.key for f in found] == ["t16/field/32 16 swiglu", "t16/field/32 16 sums"]
    assert [f.tile.stages for f in found] == [5, 5]
    assert found[1].seconds_after == 10.0 and not tiles._TRIALS


def test_results_that_stray_are_passed_over(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "time_calls", lambda *_: Timing(1.0, 0.0))
    right = torch.ones(2, 3)

    def fail() -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    tile = Tile(16, 128)
    for call, expected in (
        (lambda: right, 1.0),
        (lambda: right * 1.1, math.inf),
        (lambda: right * math.nan, math.inf),
        (fail, math.inf),
    ):
        assert tune.seconds_with(tile, "key", [call], right, 2.0**-6) == expected


def test_the_file_is_read_back_and_added_to(
    tmp_path: Path, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.json"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    first, second = Tile(16, 64, 8, 2), Tile(64, 256)
    for key, tile in (("t16/field/32 16 sums", first), ("t16/field/32 64 sums", second)):
        finding = tune.Finding(key, tile, 2.0, 1.0)
        tune.write_tiles(tune.Tuned(device, tiles.triton_version(), (finding,)), path)
    monkeypatch.setenv(tiles.TILES_VARIABLE, str(path))
    assert tiles.choose_tile(90, prepared.down, 1) == first
    assert tiles.choose_tile(90, prepared.down, 40) == second
    tune.write_tiles(tune.Tuned("another", "9.9", ()), path)
    assert json.loads(path.read_text())["tiles"] == {}, "tiles of another device are not kept"
    for other in (
        "my notes",
        '{"device": "x"}',
        '{"device": 1, "triton": 2, "tiles": 3}',
        "[" * 9999,
    ):
        path.write_text(other)
        with pytest.raises(OutputError, match="no table of tiles"):
            tune.write_tiles(tune.Tuned("another", "9.9", ()), path)
        assert path.read_text() == other


@pytest.mark.parametrize("which", [["moe", "--shape", "tiny"], ["indexer"]])
def test_without_a_gpu_it_is_refused(which: list[str], tmp_path: Path) -> None:
    command = ["bench", *which, "--device", "cpu", "--tune", str(tmp_path / "tiles.json")]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code != 0 and "CUDA GPU" in str(done.exception or done.output)
    assert not (tmp_path / "tiles.json").exists()


def test_tiles_of_the_indexer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels run in the interpreter with every tile that is tried, and must not stray."""
    monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: backend != "torch")
    monkeypatch.setitem(INDEX_CASES, "prefill", (1, 9))
    monkeypatch.setitem(INDEX_CASES, "requests", (2, 1))
    monkeypatch.setattr(tune_indexer, "VALUES", {"step": (1, 2), "tiles": (1, 4)})
    tried: list[tiles.IndexTile] = []

    def time_calls(calls: object, device: str) -> Timing:
        (tile,) = tiles._TRIALS.values()
        tried.append(tile)
        return Timing(10.0 + tile.tiles - tile.step, 0.0)

    monkeypatch.setattr(tune, "time_calls", time_calls)
    for shared, key, best in (
        (True, "index bf16 shared", tiles.IndexTile(step=2)),
        (False, "index bf16 own", tiles.IndexTile(tiles=1, stages=2)),
    ):
        found = tune_indexer.tune_case(shared, 64, "cpu", SilentProgress())
        assert (found.key, found.tile) == (key, best)
        assert found.seconds_after < found.seconds_before
    assert len(tried) == 4 and not tiles._TRIALS


def test_a_kernel_with_a_wrong_tile_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite where both are, so only numbers decide."""
    monkeypatch.setattr(tune, "time_calls", lambda *_: Timing(1.0, 0.0))
    right = torch.tensor([1.0, -math.inf, 3.0])
    for made, expected in (
        (right, 1.0),
        (torch.tensor([1.0, 0.0, 3.0]), math.inf),
        (torch.tensor([-math.inf, -math.inf, 3.0]), math.inf),
        (torch.tensor([math.nan, -math.inf, 3.0]), math.inf),
    ):
        tile = tiles.IndexTile()
        assert tune.seconds_with(tile, "k", [lambda m=made: m], right, 2.0**-9) == expected


def test_the_file_holds_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, device = tmp_path / "tiles.json", "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    own = tiles.IndexTile(keys=32, tiles=2)
    key = tiles.index_key("fp8", shared=False)
    found = tune.Finding(key, own, 2.0, 1.0)
    tune.write_tiles(tune.Tuned(device, tiles.triton_version(), (found,)), path)
    monkeypatch.setenv(tiles.TILES_VARIABLE, str(path))
    assert tiles.choose_index_tile(90, "fp8", False) == own
    assert tiles.choose_index_tile(90, "fp8", True) == tiles.index_tile(90, True)
    assert tiles.choose_index_tile(80, "bf16", False) == tiles.index_tile(80, False)
