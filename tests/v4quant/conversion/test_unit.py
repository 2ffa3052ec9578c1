"""What conversion does to values: exactness counted, refusals, statistics used, FP8 sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.calibration.oracle_loader import OracleParams
from tests.support.conversion import SCHEMES, TINY, VARIANTS, convert, recipe_of
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.checks.verify import verify
from v4quant.conversion.job import run_job
from v4quant.conversion.plan import make_plan
from v4quant.conversion.records import InexactCast
from v4quant.recipe import Recipe
from v4quant_calibration.statistics.stats import StageStats, Stats
from v4quant_formats.deepseek_v4 import split_part
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.progress import SilentProgress

EXPERT = "layers.1.ffn.experts.2.w1"
EXACT = [
    "mxfp4",
    "fp8",
    "bf16",
    "nvfp4",
    "int8-g32",
    "int8-g128",
    "mxfp4/compressed-tensors",
    "mxfp8",
]
EXACT += ["mxfp8@vllm", "int8-g32@sglang", "nvfp4@sglang"]


def tensors_of(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((folder / "v4quant.json").read_text())["tensors"]
    return rows


@pytest.mark.parametrize("scheme", EXACT)
def test_exact_schemes_hold_the_source_values(
    scheme: str, converted: Callable[[str], Path]
) -> None:
    oracle = OracleParams(TINY)
    with open_checkpoint(converted(scheme)) as output:
        for module in {split_part(n)[0] for n in output.tensors}:
            assert torch.equal(read_dense(output, module), oracle(module)), module
    assert all(row["exact"] for row in tensors_of(converted(scheme)))


@pytest.mark.parametrize("scheme", (*SCHEMES, *VARIANTS))
def test_records_tell_the_truth(scheme: str, converted: Callable[[str], Path]) -> None:
    oracle = OracleParams(TINY)
    rows = tensors_of(converted(scheme))
    assert len({row["module"] for row in rows}) == len(rows)
    with open_checkpoint(converted(scheme)) as output:
        for row in rows:
            module = str(row["module"])
            want, got = oracle(module).double(), read_dense(output, module).double()
            assert row["elements"] == want.numel()
            assert row["exact"] == bool(torch.equal(want, got)), module
            if not row["exact"]:
                error = (got - want).norm() / want.norm()
                assert row["relative_rms"] == pytest.approx(float(error), rel=1e-5)
                assert row["max_error"] == pytest.approx(float((got - want).abs().max()), rel=1e-6)


def spread_out(tmp_path: Path) -> Path:
    """One row of one expert 20 octaves below the rest: too far for fp8, nvfp4 and int8-g128."""
    edited = EditableCheckpoint.read(TINY)
    scale = bytearray(edited[f"{EXPERT}.scale"].data)
    scale[4:6] = bytes(b - 20 for b in scale[4:6])
    edited[f"{EXPERT}.scale"].data = bytes(scale)
    return edited.write(tmp_path / "source")


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4", "int8-g128"])
def test_inexact_casts_are_counted_or_refused(scheme: str, tmp_path: Path) -> None:
    source = spread_out(tmp_path)
    with pytest.raises(InexactCast, match=rf"'{EXPERT}'.*values would change.*--on-inexact"):
        convert(source, tmp_path / "refused", Recipe(scheme, on_inexact="refuse"))
    assert not (tmp_path / "refused" / "model.safetensors.index.json").exists()
    result = convert(source, tmp_path / "out", scheme)
    oracle = OracleParams(source)
    with open_checkpoint(tmp_path / "out") as output:
        altered = int((read_dense(output, EXPERT) != oracle(EXPERT)).sum())
    assert 0 < altered == result.altered_elements <= 64
    (row,) = [r for r in tensors_of(tmp_path / "out") if not r["exact"]]
    assert (row["module"], row["disposition"], row["altered"]) == (EXPERT, "cast", altered)
    assert (result.lossy_tensors, result.dropped_tensors) == (1, 0)
    assert not verify(tmp_path / "out", source, SilentProgress()).findings


@pytest.mark.parametrize("scheme", ["mxfp4", "int8-g32"])
def test_casts_that_hold_anything(scheme: str, tmp_path: Path) -> None:
    source = spread_out(tmp_path)
    assert convert(source, tmp_path / "out", Recipe(scheme, on_inexact="refuse")).lossy_tensors == 0


def test_bfloat16_that_does_not_hold_a_tiny_scale(tmp_path: Path) -> None:
    """2^-127 times E4M3 lies among bfloat16's subnormals, which have fewer bits."""
    edited = EditableCheckpoint.read(TINY)
    edited["layers.0.attn.wq_a.scale"].data = b"\x00"
    source = edited.write(tmp_path / "source")
    with pytest.raises(InexactCast, match=r"wq_a.*bf16"):
        convert(source, tmp_path / "refused", Recipe("int4-g32", on_inexact="refuse"))
    result = convert(source, tmp_path / "out", "int4-g32")
    assert result.altered_elements > 0
    assert not verify(tmp_path / "out", source, SilentProgress()).findings


def fp8_source(converted: Callable[[str], Path], tmp_path: Path) -> Path:
    """The layout of the Base releases: FP8 experts, float32 scales."""
    edited = EditableCheckpoint.read(converted("fp8"))
    return edited.write(tmp_path / "base")


@pytest.mark.parametrize("scheme", ["fp8", "int4-g32", "int8-g128"])
def test_fp8_experts_as_source(
    scheme: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    source = fp8_source(converted, tmp_path)
    result = convert(source, tmp_path / "out", scheme)
    # The values still are MXFP4's, and so exact wherever MXFP4 is.
    exact = scheme in ("fp8", "int8-g128")
    assert (result.lossy_tensors == 0) == exact
    found = verify(tmp_path / "out", source, SilentProgress())
    assert not found.findings
    if not exact:
        assert 0 < result.worst_relative_rms < 0.15


def stats_for(rng: torch.Generator) -> Stats:
    def stage() -> StageStats:
        def moments() -> torch.Tensor:
            return torch.rand(4, 128, generator=rng, dtype=torch.float64) ** 4 * 1000

        tokens = torch.full((4,), 1000)
        amax = torch.rand(4, generator=rng) + 1
        return StageStats(tokens, {"w13": moments(), "w2": moments()}, {"w13": amax, "w2": amax})

    names = [f"layers.{i}" for i in range(4)]
    return Stats("digest", 10, {name: stage() for name in names})


def test_statistics_lower_the_weighted_error(
    converted: Callable[[str], Path], tmp_path: Path, generator: torch.Generator
) -> None:
    stats, oracle = stats_for(generator), OracleParams(TINY)
    convert(TINY, tmp_path / "out", "int4-g128", stats=stats)
    assert not verify(tmp_path / "out", TINY, SilentProgress()).findings
    totals = []
    for folder in (tmp_path / "out", converted("int4-g128")):
        with open_checkpoint(folder) as output:
            total = 0.0
            for expert in range(4):
                for p in ("w1", "w2", "w3"):
                    module = f"layers.1.ffn.experts.{expert}.{p}"
                    importance = stats.importance(module)
                    assert importance is not None
                    error = (read_dense(output, module) - oracle(module)).double().square()
                    total += float((error * importance).sum())
            totals.append(total)
    assert totals[0] < 0.97 * totals[1]
    with (
        open_checkpoint(tmp_path / "out") as ours,
        open_checkpoint(converted("int4-g128")) as plain,
    ):
        module = "mtp.0.ffn.experts.0.w1"  # not covered by these statistics: as without
        assert torch.equal(read_dense(ours, module), read_dense(plain, module))


def test_activation_scales_come_from_statistics_or_a_bound(
    converted: Callable[[str], Path], tmp_path: Path, generator: torch.Generator
) -> None:
    stats = stats_for(generator)
    convert(TINY, tmp_path / "out", "nvfp4", stats=stats)
    with open_checkpoint(tmp_path / "out") as output:
        name = "layers.2.ffn.experts.3.w2"
        want = float(stats.stages["layers.2"].amax["w2"][3]) / (6 * 448)
        assert output.read(f"{name}.input_scale").item() == pytest.approx(want, rel=1e-6)
    norm = OracleParams(TINY)("layers.2.ffn_norm").abs().max()
    with open_checkpoint(converted("nvfp4")) as output:
        gate = output.read("layers.2.ffn.experts.3.w1.input_scale").item() * 6 * 448
        down = output.read("layers.2.ffn.experts.3.w2.input_scale").item() * 6 * 448
    assert gate == pytest.approx(float(norm) * 128**0.5, rel=1e-5)
    assert down == pytest.approx(1.5 * 10.0**2, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8", "nvfp4", "fp8", "int8-g128", "int4-g32"])
def test_cuda_writes_the_same_shards(
    scheme: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    with open_checkpoint(TINY) as checkpoint:
        plan = make_plan(checkpoint, recipe_of(scheme))
        run_job(replace(plan, device=torch.device("cuda")), tmp_path / "out")
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.read_bytes() == (converted(scheme) / shard.name).read_bytes()


def test_draft_stages_may_be_dropped(tmp_path: Path) -> None:
    result = convert(TINY, tmp_path / "out", Recipe("int4-g32", draft="drop"))
    with open_checkpoint(TINY) as source, open_checkpoint(tmp_path / "out") as output:
        gone = {n for n in source.tensors if n.startswith("mtp.")}
        assert result.dropped_tensors == len(gone) > 0
        assert not any(n.startswith("mtp.") for n in output.tensors)
    dropped = json.loads((tmp_path / "out" / "v4quant.json").read_text())["dropped"]
    assert {d["name"] for d in dropped} == gone
    assert not verify(tmp_path / "out", TINY, SilentProgress()).findings
