"""Several conversions from one run file: one calibration, one evaluation, siblings that know."""

from __future__ import annotations

import importlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import v4quant
from tests.support import fake_hub
from tests.support.conversion import TINY, convert, folder_bytes
from tests.support.fake_hub import FakeHub
from v4quant.cli import cli
from v4quant.conversion import shard_writing
from v4quant.conversion.plan import Plan
from v4quant.hub import shard_cache
from v4quant.pipeline.costs import expected_costs, with_effort
from v4quant.pipeline.recipe_file import load_pipeline
from v4quant.planner.footprint import outline_release
from v4quant.recipe import Recipe, RecipeError

CHECKING = importlib.import_module("v4quant.pipeline.checking")
LADDER = """
source = "SOURCE"
[calibrate]
corpus = ["FOLDER/calibration.safetensors"]
[[quantize]]
scheme = "int4-g128"
solver = "optimal"
[[quantize]]
name = "small"
scheme = "int2-g128"
solver = "optimal"
[evaluate]
corpus = ["FOLDER/heldout.safetensors"]
"""


def write(folder: Path, text: str = LADDER) -> Path:
    """A run file on the tiny random model with its own ids."""
    stored = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    rows = stored[: len(stored) // 4 * 4].reshape(4, -1)
    save_file({"input_ids": rows[:2].contiguous()}, folder / "calibration.safetensors")
    save_file({"input_ids": rows[2:].contiguous()}, folder / "heldout.safetensors")
    file = folder / "ladder.toml"
    file.write_text(text.replace("SOURCE", str(TINY)).replace("FOLDER", str(folder)))
    return file


def run(file: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(cli, ["run", str(file), "--out", str(out), "--json", *more])


def test_an_interrupted_ladder_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write(tmp_path), tmp_path / "my models"
    whole = run(file, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    convert, calls = shard_writing.convert_unit, list[str]()

    def stop_in_the_middle(plan: Plan, *rest: Any) -> Any:
        calls.append(plan.recipe.scheme)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return convert(plan, *rest)

    stop = random.randrange(1, 320)
    print("units begun before the interrupt", stop)
    monkeypatch.setattr(shard_writing, "convert_unit", stop_in_the_middle)
    assert run(file, out).exit_code != 0
    assert set(calls[: stop - 1]) == {"int4-g128", "int2-g128"} or stop < 3
    monkeypatch.setattr(shard_writing, "convert_unit", convert)
    calibrated = (out / "stats.v4q").stat().st_mtime_ns
    again = run(file, out)
    assert again.exit_code == 0 and (out / "stats.v4q").stat().st_mtime_ns == calibrated
    for name in ("int4-g128", "small"):
        assert folder_bytes(out / name) == folder_bytes(tmp_path / "whole" / name)
    found = json.loads(again.stdout)
    assert [one["name"] for one in found["ladder"]] == ["int4-g128", "small"]
    assert found["ladder"][1]["serve"] == f"vllm serve '{out / 'small'}'"
    (other,) = found["evaluation"]["others"]
    assert other["candidate"]["scheme"] == "int2-g128"
    assert other["kl_mean"] > found["evaluation"]["kl_mean"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Where small diverges most" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "small"', 'name = "int4-g128"'), "two conversions are called 'int4-g128'"),
        (('name = "small"', 'name = "../up"'), "cannot name a folder"),
        (('name = "small"', 'name = "source"'), "cannot name a folder"),
        (('name = "small"', 'name = "Report.html"'), "cannot name a folder"),
        (('name = "small"', 'name = "solution-mxfp4"'), "cannot name a folder"),
        (('name = "small"', 'name = "aux.1"'), "cannot name a folder"),
        (('name = "small"', 'name = "small."'), "cannot name a folder"),
        (('scheme = "int2-g128"', 'scheme = "int2-g128"\ndraught = "drop"'), "unknown key"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = write(tmp_path, LADDER.replace(*change))
    with pytest.raises(RecipeError, match=message):
        load_pipeline(str(file))


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path)
    done = run(file, tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and not (tmp_path / "out").exists()
    found = json.loads(done.stdout)
    assert [one["name"] for one in found["conversions"]] == ["int4-g128", "small"]
    assert any("all 2 conversions" in step for step in found["steps"])
    recipe = v4quant.make_recipe(scheme="int4-g128")
    planned = v4quant.plan_quantize(TINY, tmp_path / "out", recipe=recipe)
    headers = planned.bytes_out - found["conversions"][0]["bytes"]
    assert 0 < headers < 200 * planned.tensors


def test_effort_chooses_the_solver_by_the_hours_it_takes(tmp_path: Path) -> None:
    pipeline, flash = load_pipeline(str(write(tmp_path))), outline_release("flash")
    solvers = {
        (effort, cores): {
            r.recipe.solver for r in with_effort(pipeline, flash, effort, cores).rungs
        }
        for effort in ("minutes", "hours", "best")
        for cores in (2, 64)
    }
    assert solvers["minutes", 64] == {"optimal"}
    assert solvers["hours", 64] == {"gptq"} and solvers["hours", 2] == {"optimal"}
    assert solvers["best", 2] == {"gptq"}
    assert with_effort(pipeline, flash, None, 64) == pipeline, "the file names its solver"
    open_file = write(tmp_path, LADDER.replace('solver = "optimal"\n', ""))
    undecided = load_pipeline(str(open_file))
    for cores, solver in ((2, "optimal"), (64, "gptq")):
        chosen = with_effort(undecided, flash, None, cores)
        assert {r.recipe.solver for r in chosen.rungs} == {solver}
        lines = expected_costs(chosen, flash, cores)
        other = "minutes" if solver == "gptq" else "best"
        assert all(f"--effort {other} takes" in line and "times the KL" in line for line in lines)
    best = with_effort(pipeline, flash, "best", 2).calibrate
    quick = with_effort(pipeline, flash, "hours", 64).calibrate
    assert best is not None and quick is not None
    assert best.propagate and not quick.propagate and (best.tokens or 0) > (quick.tokens or 0)


FROM_A_HUB = """
source = "hf://maker/V4-Tiny"
[[quantize]]
scheme = "int4-g32"
solver = "rtn"
[[quantize]]
scheme = "int8-g32"
solver = "rtn"
[[quantize]]
scheme = "mxfp4"
[verify]
kernels = false
"""


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_ladder_fetches_its_source_once(
    plain_hub: FakeHub,
    model_files: dict[str, bytes],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted twice and resumed; two passes over seven shards, of which three usually stay."""
    plain_hub.add_repo("maker/V4-Tiny", model_files, license="mit")
    (tmp_path / "ladder.toml").write_text(FROM_A_HUB)
    fetched, download = Counter[str](), shard_cache.download

    def counted(remote: Any, file: Any, path: Path, *rest: Any) -> None:
        fetched[path.name.partition("-")[2]] += not path.exists()
        download(remote, file, path, *rest)

    monkeypatch.setattr(shard_cache, "download", counted)
    convert_unit, calls = shard_writing.convert_unit, list[int]()

    def stop(*given: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 200:
            raise KeyboardInterrupt
        return convert_unit(*given)

    monkeypatch.setattr(shard_writing, "convert_unit", stop)
    done = [run(tmp_path / "ladder.toml", tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(CHECKING, "verify_all", _interrupt)
        done.append(run(tmp_path / "ladder.toml", tmp_path / "out"))
    done.append(run(tmp_path / "ladder.toml", tmp_path / "out"))
    assert [one.exit_code for one in done] == [1, 1, 0], done[-1].output
    assert "are fetched once" in done[0].stderr
    shards = [name for name in model_files if name.endswith(".safetensors")]
    assert len(shards) > 3 and fetched == dict.fromkeys(shards, 1)
    for scheme in ("int4-g32", "int8-g32", "mxfp4"):
        convert(model_folder, tmp_path / scheme, Recipe(scheme, solver="rtn"))
        made, expected = folder_bytes(tmp_path / "out" / scheme), folder_bytes(tmp_path / scheme)
        assert {n: d for n, d in made.items() if n != "v4quant.json"} == {
            n: d for n, d in expected.items() if n != "v4quant.json"
        }
    assert not (tmp_path / "out" / ".v4quant").exists()


SIBLINGS = """
source = "hf://maker/V4-Tiny"
target = "hf://USER/V4-Tiny"
[[quantize]]
scheme = "mxfp4"
format = "gguf"
name = "gguf"
[[quantize]]
scheme = "mxfp4"
[evaluate]
corpus = ["FOLDER/heldout.safetensors"]
"""


def test_siblings_of_one_large_file_and_many_small_ones_are_evaluated(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    """A third of what small shards need does not hold the large file, which is read beside them."""
    files = {name: data for name, data in model_files.items() if name != "tokenizer.json"}
    plain_hub.add_repo("maker/V4-Tiny", files, license="mit")
    file = write(tmp_path, SIBLINGS.replace("USER", fake_hub.USER))
    done = run(file, tmp_path / "out")
    assert done.exit_code == 0, (done.output, done.exception)
    names = [f"{fake_hub.USER}/V4-Tiny-{name}" for name in ("gguf", "mxfp4")]
    for name, sibling in zip(names, reversed(names), strict=True):
        card = plain_hub.files(name)["README.md"].decode()
        assert sibling in card
        facts = yaml.safe_load(card.split("---\n")[1])
        assert facts["base_model"] and all(
            value not in (None, "", [], {}) for value in facts.values()
        )


TO_A_HUB = """
source = "SOURCE"
target = "hf://USER/V4-Tiny"
[[quantize]]
scheme = "nvfp4"
[[quantize]]
scheme = "mxfp4"
"""


@pytest.mark.parametrize("cap", [None, "6MB", "3MB"])
def test_targets_share_the_disk_or_take_turns(
    cap: str | None, plain_hub: FakeHub, tmp_path: Path
) -> None:
    """A cap that holds a shard of one target only makes them one after the other."""
    text = TO_A_HUB.replace("SOURCE", str(TINY)).replace("USER", fake_hub.USER)
    (tmp_path / "ladder.toml").write_text(text)
    options = [] if cap is None else ["--disk-cap", cap]
    done = run(tmp_path / "ladder.toml", tmp_path / "out", *options)
    assert done.exit_code == 0, (done.output, done.exception)
    assert ("side by side from one read" in done.stderr) == (cap != "3MB")
    for scheme in ("nvfp4", "mxfp4"):
        convert(TINY, tmp_path / scheme, scheme)
        found = plain_hub.files(f"{fake_hub.USER}/V4-Tiny-{scheme}")
        for name, data in folder_bytes(tmp_path / scheme).items():
            assert found[name] == data or name == "v4quant.json", name
    assert not list((tmp_path / "out").rglob("*.safetensors"))
