"""on_inexact = keep: stages a cast would change stay in the source format, the others are cast."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.synthetic import Faults, make_small
from v4quant.checks.verify import verify
from v4quant.conversion.exactness import inexact_stages
from v4quant.conversion.job import run_job
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe, RecipeError
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES

SPOILT = "layers.1.ffn.experts.1.w3"


def _spoilt(folder: Path, spread: int) -> Path:
    return make_small(folder, "flash", faults=Faults(modules=(SPOILT,), spread=spread))


@pytest.mark.parametrize(("spread", "kept"), [(17, ()), (18, ("layers.1",))])
def test_only_the_stage_that_does_not_fit_is_kept(
    tmp_path: Path, spread: int, kept: tuple[str, ...]
) -> None:
    source = _spoilt(tmp_path / "in", spread)
    out = tmp_path / "out"
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint, Recipe("nvfp4", on_inexact="keep"))
        assert plan.kept == kept
        result = run_job(plan, out, workers=1)
    assert result.altered_elements == 0 and result.lossy_tensors == 0
    assert not verify(out, source, SilentProgress()).findings
    with open_checkpoint(out) as converted:
        stored = {
            stage: converted.spec(f"{stage}.ffn.experts.0.w1.weight").dtype
            for stage in ("layers.0", "layers.1", "mtp.0")
        }
        ignored = converted.config["quantization_config"]["ignore"]
    assert stored == {s: "I8" if s in kept else "U8" for s in stored}
    assert [p for p in ignored if "experts*" in p and "shared" not in p] == [
        f"*{s}.ffn.experts*" for s in kept
    ]


def test_nearest_counts_and_refuse_names_what_keep_keeps(tmp_path: Path) -> None:
    source = _spoilt(tmp_path / "in", 18)
    with open_checkpoint(source) as checkpoint:
        counted = run_job(make_plan(checkpoint, Recipe("nvfp4")), tmp_path / "near", workers=1)
        assert counted.altered_elements > 0 and counted.lossy_tensors == 1
        experts = [(f"layers.{i}", 0) for i in range(2)]
        assert inexact_stages(checkpoint, SCHEMES["nvfp4"], experts) == ()


@pytest.mark.parametrize("scheme", ["fp8", "int8-g128", "int4-g32", "mxfp4"])
def test_formats_that_cannot_say_it_refuse_keep(scheme: str) -> None:
    with pytest.raises(RecipeError, match="one scheme for all experts") as refused:
        Recipe(scheme, on_inexact="keep")
    remedy = {"fp8": "mxfp8", "int8-g128": "int8-g32"}.get(scheme)
    assert ("holds every MXFP4 value" in str(refused.value)) == (remedy is not None)
    assert remedy is None or f"or {remedy}, which" in str(refused.value)


def test_dropped_drafts_leave_no_promise_in_the_config(tmp_path: Path) -> None:
    source = make_small(tmp_path / "in", "flash-dspark")
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint, Recipe("mxfp4", draft="drop"))
    config = plan.output_config()
    assert config["num_nextn_predict_layers"] == 0
    assert not [k for k in config if k.startswith("dspark_")]
