"""V4.1's tables from other dtypes: coded as FP8 rows in pieces, the error counted and weighted."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.conversion import convert
from tests.support.second_v41 import SecondReader
from tests.support.synthetic import Request, write_checkpoint
from v4quant.checks.verify import verify
from v4quant.conversion.fp8_rows import best_rows
from v4quant.conversion.records import InexactCast
from v4quant.recipe import Recipe
from v4quant_calibration.statistics.stats import Stats
from v4quant_calibration.statistics.table_use import RowUse
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels import codec
from v4quant_kernels.progress import SilentProgress

TABLE = "layers.1.engram.embed"
Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a table are as wide as the release's, so that every block type can code them."""
    sizes = {"num_hidden_layers": 4, "n_routed_experts": 2, "dspark_n_routed_experts": 2}
    wide = {"engram_head_dim": 256, "engram_n_heads": 1}
    out = tmp_path_factory.mktemp("v41") / "source"
    write_checkpoint(out, Request("v41", overrides=tuple((sizes | wide).items())))
    return out


def with_table(source: Path, out: Path, edit: Edit) -> Path:
    """A copy whose tensors of the table's shard were edited in place."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][f"{TABLE}.weight"]
    out.mkdir()
    for file in source.iterdir():
        if file.name not in (shard, "model.safetensors.index.json"):
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / shard)
    edit(tensors)
    save_file(tensors, out / shard)
    kept = {n: f for n, f in index["weight_map"].items() if f != shard}
    index["weight_map"] = kept | dict.fromkeys(tensors, shard)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def plain(values: torch.Tensor) -> Edit:
    """Makes the table a plain tensor of these values."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{TABLE}.scale"]
        tensors[f"{TABLE}.weight"] = values

    return edit


def values_of(folder: Path) -> torch.Tensor:
    with open_checkpoint(folder) as checkpoint:
        return read_dense(checkpoint, TABLE)


def record_of(out: Path) -> dict[str, Any]:
    records = json.loads((out / "v4quant.json").read_text())["tensors"]
    found: dict[str, Any] = next(r for r in records if r["module"] == TABLE)
    return found


@pytest.fixture
def random_source(source: Path, tmp_path: Path) -> Path:
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    generator = torch.Generator().manual_seed(seed)
    shape = values_of(source).shape
    values = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
        -20, 4, (shape[0], 1), generator=generator
    )
    return with_table(source, tmp_path / "plain", plain(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_that_fp8_rows_hold_come_back_exactly(
    dtype: torch.dtype, source: Path, tmp_path: Path
) -> None:
    values = values_of(source)
    folder = with_table(source, tmp_path / "plain", plain(values.to(dtype)))
    convert(folder, tmp_path / "out", Recipe("mxfp4", on_inexact="refuse"), workers=1)
    record = record_of(tmp_path / "out")
    assert record["exact"] and record["target"] == "mxfp8"
    again = SecondReader(tmp_path / "out", "vllm").values(TABLE)
    np.testing.assert_array_equal(again, values.double().numpy())
    assert verify(tmp_path / "out", folder, SilentProgress()).findings == ()


def test_rows_under_tiles_keep_their_codes(source: Path, tmp_path: Path) -> None:
    """A table that somebody coded as the dense matrices are: each tile's scale, row by row."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        rows = tensors[f"{TABLE}.scale"].shape[0]
        scale = tensors[f"{TABLE}.scale"].view(torch.uint8)[::32].contiguous()
        assert scale.shape[0] == -(-rows // 32)
        tensors[f"{TABLE}.scale"] = scale.view(torch.float8_e8m0fnu)

    folder = with_table(source, tmp_path / "tiles", edit)
    convert(folder, tmp_path / "out", "mxfp4", workers=1)
    assert record_of(tmp_path / "out")["exact"]
    again = SecondReader(tmp_path / "out", "vllm").values(TABLE)
    np.testing.assert_array_equal(again, values_of(folder).double().numpy())


def test_other_values_are_rounded_and_counted(random_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(random_source, out, "mxfp4", workers=1)
    x, y = values_of(random_source).double(), SecondReader(out, "sglang").values(TABLE)
    record, error = record_of(out), torch.from_numpy(y) - x
    assert not record["exact"] and record["altered"] == int(error.count_nonzero())
    assert record["relative_rms"] == pytest.approx(float(error.norm() / x.norm()), rel=1e-6)
    assert record["max_error"] == pytest.approx(float(error.abs().max()))
    assert 0.005 < record["relative_rms"] < 0.03  # four significant bits
    assert verify(out, random_source, SilentProgress()).findings == ()
    with pytest.raises(InexactCast, match=r"engram\.embed' does not fit mxfp8 exactly"):
        convert(random_source, tmp_path / "no", Recipe("mxfp4", on_inexact="refuse"))


def test_no_other_power_of_two_loses_less() -> None:
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(400, 32, generator=generator).double()
    values = (wide * 2 ** (8 * torch.randn(400, 32, generator=generator).double())).float()
    # Groups whose largest value lies just above what a finer scale reaches.
    values[:200] *= 450 / values[:200].abs().amax(1, keepdim=True)
    coded = best_rows(values)
    own = (codec.dequantize(coded) - values).double().square().sum(1)
    assert coded.scale is not None
    byte = coded.scale.view(torch.uint8).int()
    improved = 0
    for shift in range(-4, 5):
        other = (byte + shift).clamp(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)
        again = codec.quantize(values, coded.scheme, scale=other)
        error = (codec.dequantize(again) - values).double().square().sum(1)
        assert bool((own <= error * (1 + 1e-12)).all()), shift
        improved += int((own < error).sum())
    default = codec.quantize(values, coded.scheme)
    assert default.scale is not None
    assert improved and bool((byte < default.scale.view(torch.uint8).int()).any())


RECIPES = {
    "fp8": Recipe("mxfp4"),
    "q8_0": Recipe("mxfp4", "gguf", engram="q8_0"),
    "iq4_nl": Recipe("mxfp4", "gguf", engram="iq4_nl"),
    "q4_k": Recipe("mxfp4", "gguf", engram="q4_k"),
    "iq3_s": Recipe("mxfp4", "gguf", engram="iq3_s"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_error_is_told_as_the_text_uses_rows(
    recipe: Recipe, random_source: Path, tmp_path: Path
) -> None:
    """A type whose blocks are as long as the release's rows, 256, is written as it is asked for."""
    x = values_of(random_source).double()
    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(len(x), generator=generator)[:40].sort()[0]
    counts = torch.randint(1, 50, (40,), generator=generator)
    stats = Stats("d", 1, {}, tables={TABLE: RowUse(rows, counts)})
    convert(random_source, tmp_path / "out", recipe, workers=1, stats=stats)
    y = values_of(tmp_path / "out").double()
    weight = torch.zeros(len(x)).double()
    weight[rows] = counts.double()
    error, norm = (((y - x) ** 2).sum(1) * weight).sum(), ((x**2).sum(1) * weight).sum()
    record = record_of(tmp_path / "out")
    assert record["relative_rms_in_use"] == pytest.approx(float((error / norm).sqrt()), rel=1e-5)
    assert record["relative_rms_in_use"] != record["relative_rms"]
    assert verify(tmp_path / "out", random_source, SilentProgress()).findings == ()
