"""Run files, and `v4quant run` from a source to a report: twice, changed, and with damage."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from tests.support.conversion import TINY, convert, folder_bytes
from v4quant.cli import cli
from v4quant.evaluation.evaluate import Resources
from v4quant.pipeline.recipe_file import PRESETS, CorpusStep, VerifyStep, load_pipeline
from v4quant.pipeline.step_cache import FinishedSteps
from v4quant.recipe import RecipeError
from v4quant_formats.errors import UnsupportedPair
from v4quant_kernels.errors import UnsupportedScheme, V4QuantError

# The name `run` in v4quant.pipeline.run is the function.
RUN = importlib.import_module("v4quant.pipeline.run")
CHECKING = importlib.import_module("v4quant.pipeline.checking")
CONVERTING = importlib.import_module("v4quant.pipeline.converting")
CALIBRATING = importlib.import_module("v4quant.pipeline.calibrating")

FULL = """
source = "here"
[calibrate]
corpus = ["a.txt", "builtin:calibration"]
tokens = 100
seq_len = 64
min_tokens = 5
[quantize]
scheme = "int8-g32"
draft = "drop"
[verify]
kernels = false
[evaluate]
corpus = ["b.jsonl"]
activations = "official"
mode = "think-max"
"""
SHORT = 'source = "here"\n[quantize]\nscheme = "fp8"\n'


def load(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "run.toml"
    file.write_text(text)
    return load_pipeline(str(file))


def test_every_key_arrives(tmp_path: Path) -> None:
    found = load(tmp_path, FULL)
    assert found.source == "here"
    assert found.calibrate == CorpusStep(("a.txt", "builtin:calibration"), 100, 64, "plain", 5)
    assert (found.recipe.scheme, found.recipe.format) == ("int8-g32", "compressed-tensors")
    assert found.recipe.draft == "drop"
    assert found.verify == VerifyStep(source=True, kernels=False)
    assert found.evaluate == CorpusStep(("b.jsonl",), activations="official", mode="think-max")


def test_absent_steps_are_left_out(tmp_path: Path) -> None:
    found = load(tmp_path, SHORT)
    assert found.calibrate is found.verify is found.evaluate is None


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.toml")))
def test_presets_load(preset: str) -> None:
    assert load_pipeline(preset).source


def test_a_preset_does_not_hide_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    assert load_pipeline("./demo").source == "here"
    assert load_pipeline("demo").source == "builtin:tiny-v4"
    assert load_pipeline("demo", "v41").source == "builtin:tiny-v41"
    with pytest.raises(RecipeError, match="names its own source"):
        load_pipeline("./demo", "v41")
    with pytest.raises(RecipeError, match="no model 'v5' to demonstrate"):
        load_pipeline("demo", "v5")


@pytest.mark.parametrize("name", ["", "no-such", "no/such.toml", "../presets/demo", "."])
def test_absent_run_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no such run file; presets are: demo"):
        load_pipeline(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme =", "cannot be read as TOML"),
        ("[quantize]\nscheme = 'fp8'", "'source'.*missing"),
        ("source = 3\n[quantize]\nscheme = 'fp8'", "'source'"),
        ("source = 'x'", r"\[quantize\] table is missing"),
        ("source = 'x'\nquantize = 'fp8'", r"\[quantize\] table is missing"),
        ("source = 'x'\n[quantize]\n", r"\[quantize\]: 'scheme' is missing"),
        (
            SHORT + "[calibrat]\n",
            r"unknown key 'calibrat'; did you mean calibrate\? known are calibrate, ",
        ),
        (SHORT + "scheem = 'fp8'", r"\[quantize\]: unknown key 'scheem'"),
        (SHORT + "draft = true", r"\[quantize\]: 'draft' must be a string"),
        (SHORT + "draft = 'maybe'", "draft = 'maybe' is not one of convert, drop"),
        (SHORT + "[verify]\nsources = true", r"\[verify\]: unknown key 'sources'"),
        (SHORT + "[verify]\nsource = 'yes'", r"\[verify\]: 'source' is 'yes', expected bool"),
        (SHORT + "[verify]\ncorpus = ['a']", r"\[verify\]: unknown key 'corpus'"),
        (SHORT + "[evaluate]\n", r"\[evaluate\]: 'corpus' is missing"),
        (SHORT + "[evaluate]\ncorpus = []", r"\[evaluate\]: 'corpus' is missing"),
        (SHORT + "[evaluate]\ncorpus = 'a.txt'", "'corpus' must be a list"),
        (SHORT + "[evaluate]\ncorpus = [1]", "'corpus' must be a list"),
        (SHORT + "[evaluate]\ncorpus = ['a']\ntokens = '9'", "'tokens' is '9', expected int"),
        (SHORT + "[evaluate]\ncorpus = ['a']\ntokens = true", "'tokens' is True, expected int"),
        (SHORT + "[evaluate]\ncorpus = ['a']\ntokens = 0", "'tokens' is 0, expected a positive"),
        (
            SHORT + "[calibrate]\ncorpus = ['a']\nmin_tokens = -1",
            "'min_tokens' is -1, expected a positive",
        ),
        (
            SHORT + "[evaluate]\ncorpus = ['a']\nactivations = 'offical'",
            "one of plain, kv, official",
        ),
        (SHORT + "[evaluate]\ncorpus = ['a']\nmode = 'think'", "one of non-think, think-low"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, text)


def test_schemes_are_checked_before_work(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedScheme, match="int5"):
        load(tmp_path, 'source = "x"\n[quantize]\nscheme = "int5"')
    with pytest.raises(UnsupportedPair, match="modelopt"):
        load(tmp_path, SHORT + 'format = "modelopt"')


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b'{"a": []}', b'{"a": {}}', b"\xff", b"[" * 10**5]
)
def test_a_damaged_record_means_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "steps.json").write_bytes(content)
    (tmp_path / "a").write_text("result")
    steps = FinishedSteps(tmp_path)
    assert not steps.has("key", tmp_path / "a")
    steps.add("key", tmp_path / "a")
    assert FinishedSteps(tmp_path).has("key", tmp_path / "a")
    (tmp_path / "a").write_text("another")
    assert not FinishedSteps(tmp_path).has("key", tmp_path / "a")


def write_run(folder: Path, scheme: str = "int4-g128", floor: int = 32, extra: str = "") -> Path:
    """A run file on the tiny random model with its own ids."""
    folder.mkdir(exist_ok=True)
    stored = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    rows = stored[: len(stored) // 4 * 4].reshape(4, -1)
    save_file({"input_ids": rows[:2].contiguous()}, folder / "calibration.safetensors")
    save_file({"input_ids": rows[2:].contiguous()}, folder / "heldout.safetensors")
    file = folder / "tiny.toml"
    file.write_text(
        f'source = "{TINY}"\n'
        f'[calibrate]\ncorpus = ["{folder}/calibration.safetensors"]\nmin_tokens = {floor}\n'
        f'[quantize]\nscheme = "{scheme}"\nsolver = "optimal"\n'
        f"[verify]\nkernels = false\n"
        f'[evaluate]\ncorpus = ["{folder}/heldout.safetensors"]\n{extra}'
    )
    return file


def run(file: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, ["run", str(file), "--out", str(out), *options])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """A run file, the folder it filled, and what was said."""
    folder = tmp_path_factory.mktemp("pipeline")
    file = write_run(folder / "in")
    result = run(file, folder / "out", "--json")
    assert result.exit_code == 0, result.output
    return file, folder / "out", result


def test_a_run_leaves_checkpoint_and_report(first: tuple[Path, Path, Result]) -> None:
    _, out, result = first
    said = json.loads(result.stdout)
    assert said.keys() == {"conversion", "evaluation", "seconds"}
    assert said["conversion"]["lossy_tensors"] == 60
    files = folder_bytes(out)
    assert {"stats.v4q", "evaluation.json", "report.html", "report.md"} <= files.keys()
    assert "checkpoint/model.safetensors.index.json" in files
    assert not [name for name in files if name.endswith(".part")]
    evaluation = json.loads(files["evaluation.json"])
    assert evaluation == said["evaluation"]
    assert evaluation["coverage"]["measured_on"] == "calibration"
    page = files["report.html"].decode()
    assert page.startswith("<!doctype html>") and "checkpoint" in page
    assert f"{evaluation['tokens']:,}" in page
    assert "kl\\_mean" in files["report.md"].decode()
    for step in ("Calibrate", "Quantize to int4-g128", "Verify", "Evaluate"):
        assert f"== {step}" in result.stderr


def test_statistics_reach_the_conversion(first: tuple[Path, Path, Result], tmp_path: Path) -> None:
    """Scales chosen with statistics are others than those chosen without."""
    _, out, _ = first
    convert(TINY, tmp_path / "plain", "int4-g128")
    name = "model-00001-of-00002.safetensors"
    assert (out / "checkpoint" / name).read_bytes() != (tmp_path / "plain" / name).read_bytes()
    manifest = json.loads((out / "checkpoint" / "v4quant.json").read_bytes())
    assert manifest["stats"]


def test_a_run_solves(tmp_path: Path) -> None:
    """Solver gptq: calibration leaves a solution, the conversion packs it, a rerun reuses it."""
    file = write_run(tmp_path / "in", "int3-g128")
    text = file.read_text().replace('"optimal"', '"gptq"')
    file.write_text(text.partition("[verify]")[0] + "[verify]\nkernels = false\n")
    out = tmp_path / "out"
    result = run(file, out)
    assert result.exit_code == 0, (result.output, result.exception)
    manifest = json.loads((out / "checkpoint" / "v4quant.json").read_bytes())
    assert manifest["recipe"]["solver"] == "gptq" and manifest["stats"]
    assert (out / "solution" / "layers.0.safetensors").exists()
    again = run(file, out)
    assert again.exit_code == 0 and again.stderr.count("reused") == 1
    asked = file.read_text()
    file.write_text(asked.replace("min_tokens = 32", "min_tokens = 31"))
    assert "--overwrite" in str(run(file, out).exception)
    again = run(file, out, "--overwrite")
    assert again.exit_code == 0, (again.output, again.exception)
    assert json.loads((out / "solution" / "solution.json").read_bytes())["floor"] == 31
    assert not list(out.glob("*.v4quant-*"))
    file.write_text(
        text.partition("[calibrate]")[0] + "[quantize]" + text.partition("[quantize]")[2]
    )
    error = run(file, tmp_path / "other")
    assert error.exit_code == 1 and "needs a solution" in str(error.exception)


def test_the_second_run_repeats_nothing(
    first: tuple[Path, Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, _ = first
    before = folder_bytes(out)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(CALIBRATING, "calibrate_to", forbidden)
    monkeypatch.setattr(RUN, "evaluate_checkpoint", forbidden)
    monkeypatch.setattr("v4quant.conversion.shard_writing.convert_unit", forbidden)
    result = run(file, out)
    assert result.exit_code == 0, (result.output, result.exception)
    assert folder_bytes(out) == before
    assert result.stderr.count("reused") == 2
    for told in ("perplexity", "serve with:", "report.html"):
        assert told in result.stdout


def test_cap_and_device_reach_every_step(
    first: tuple[Path, Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _, _ = first
    seen: dict[str, Any] = {}
    calibrate, evaluate, convert = (
        CALIBRATING.calibrate_to,
        RUN.evaluate_checkpoint,
        CONVERTING.run_jobs,
    )
    monkeypatch.setattr(
        CALIBRATING,
        "calibrate_to",
        lambda *a, **k: seen.update(calibrate=a[-2:]) or calibrate(*a, **k),
    )
    monkeypatch.setattr(
        RUN,
        "evaluate_checkpoint",
        lambda *a, **k: seen.update(evaluate=k["resources"]) or evaluate(*a, **k),
    )
    monkeypatch.setattr(
        CONVERTING,
        "run_jobs",
        lambda jobs, *a: seen.update(job=jobs[0].plan.device) or convert(jobs, *a),
    )
    result = run(file, tmp_path / "out", "--max-memory", "3GB", "--device", "cpu")
    assert result.exit_code == 0, (result.output, result.exception)
    cpu = torch.device("cpu")
    kept = Resources(3 * 10**9, kept=tmp_path / "out")
    assert seen == {"calibrate": (3 * 10**9, cpu), "evaluate": kept, "job": cpu}
    refused = run(file, tmp_path / "none", "--device", "cuda:7")
    assert refused.exit_code == 1 and "use cpu" in str(refused.exception)
    assert not (tmp_path / "none").exists()


def test_an_interrupted_run_ends_in_the_same_bytes(
    first: tuple[Path, Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, _ = first
    with monkeypatch.context() as patch:
        patch.setattr(RUN, "evaluate_checkpoint", _interrupt)
        assert run(file, tmp_path / "again").exit_code == 1
    assert not (tmp_path / "again" / "report.html").exists()
    assert run(file, tmp_path / "again").exit_code == 0
    before, after = folder_bytes(out), folder_bytes(tmp_path / "again")
    assert before.keys() == after.keys()
    for name in before:
        if name.startswith("checkpoint/") or name == "stats.v4q":
            assert after[name] == before[name], name


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_changed_run_file_is_noticed(first: tuple[Path, Path, Result], tmp_path: Path) -> None:
    """Other calibration settings: new statistics, and no mixing with the old checkpoint."""
    _, out, _ = first
    shutil.copytree(out, tmp_path / "out")
    changed = write_run(tmp_path / "in", floor=39)
    result = run(changed, tmp_path / "out")
    assert "of this checkpoint, corpus and settings" not in result.stderr
    assert isinstance(result.exception, V4QuantError)
    assert "not empty" in str(result.exception) and "--overwrite" in str(result.exception)
    notes = tmp_path / "out" / "checkpoint" / "notes.txt"
    notes.write_text("mine")
    result = run(changed, tmp_path / "out", "--overwrite")
    assert "'notes.txt'" in str(result.exception)
    notes.unlink()
    earlier = folder_bytes(tmp_path / "out" / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHECKING, "verify_all", _interrupt)
        patch.setattr("v4quant.conversion.overwrite._rename", _interrupt)
        result = run(changed, tmp_path / "out", "--overwrite")
    assert result.exit_code == 1 and folder_bytes(tmp_path / "out" / "checkpoint") == earlier
    result = run(changed, tmp_path / "out", "--overwrite")
    assert result.exit_code == 0, result.output
    made = folder_bytes(tmp_path / "out" / "checkpoint")
    assert made != earlier and not list((tmp_path / "out").glob("*.v4quant-*"))
    again = run(changed, tmp_path / "out", "--overwrite")  # nothing is replaced by itself
    assert again.exit_code == 0 and again.stderr.count("reused") == 2
    assert folder_bytes(tmp_path / "out" / "checkpoint") == made


def test_results_of_others_stay(tmp_path: Path) -> None:
    file = write_run(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("my report")
    for options in ((), ("--overwrite",)):
        result = run(file, tmp_path / "out", *options)
        assert "not a report that v4quant wrote" in str(result.exception)
    assert (tmp_path / "out" / "report.md").read_text() == "my report"


def test_other_evaluation_text_is_evaluated_anew(
    first: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    file, out, _ = first
    shutil.copytree(out, tmp_path / "out")
    text = file.read_text() + "seq_len = 40\n"
    (tmp_path / "other.toml").write_text(text)
    result = run(tmp_path / "other.toml", tmp_path / "out")
    assert result.exit_code == 0 and result.stderr.count("reused") == 1
    old, new = (json.loads((f / "evaluation.json").read_bytes()) for f in (out, tmp_path / "out"))
    assert new["seq_len"] == 40 != old["seq_len"]
    assert folder_bytes(tmp_path / "out" / "checkpoint") == folder_bytes(out / "checkpoint")


def test_damage_ends_with_exit_code_3(first: tuple[Path, Path, Result], tmp_path: Path) -> None:
    file, out, _ = first
    shutil.copytree(out, tmp_path / "out")
    shard = tmp_path / "out" / "checkpoint" / "model-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = run(file, tmp_path / "out")
    assert result.exit_code == 3
    assert f"{shard.name}: bytes differ" in result.stderr


def test_what_cannot_be_planned_is_not_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TINY, tmp_path / "broken")
    config = json.loads((TINY / "config.json").read_text())
    config["moe_intermediate_size"] = 256
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    file = write_run(tmp_path / "in")
    file.write_text(file.read_text().replace(str(TINY), str(tmp_path / "broken")))
    monkeypatch.setattr(CALIBRATING, "calibrate_to", _interrupt)
    result = run(file, tmp_path / "out")
    assert isinstance(result.exception, V4QuantError)
    assert "config.json implies" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["source", "candidate", ".v4quant/source", ".v4quant/candidate"])
def test_a_source_inside_the_output_folder_stays(place: str, tmp_path: Path) -> None:
    """The user's checkpoint may lie where the run keeps, or once kept, what it fetches."""
    out = tmp_path / "out"
    shutil.copytree(TINY, out / place)
    before = folder_bytes(out / place)
    file = tmp_path / "run.toml"
    file.write_text(f'source = "{out / place}"\n[quantize]\nscheme = "mxfp4"\n')
    done = run(file, out)
    assert done.exit_code == 0, done.output
    assert folder_bytes(out / place) == before
    assert (out / "checkpoint" / "model.safetensors.index.json").exists()


def test_kernels_run_on_the_result(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'source = "{TINY}"\n[quantize]\nscheme = "mxfp4"\n[verify]\nsource = true\n')
    result = run(file, tmp_path / "out")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "kernel " in result.stderr and "DIFFERS" not in result.stderr
    assert "203 hold exactly the source's values" in result.stderr
    # Without an evaluation there is no report to point at.
    assert "report" not in result.stdout and "serve with:" in result.stdout


def test_builtin_names(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('source = "builtin:huge-v4"\n[quantize]\nscheme = "fp8"\n')
    result = run(file, tmp_path / "out")
    assert isinstance(result.exception, V4QuantError) and "builtin:tiny-v4" in str(result.exception)
    file.write_text(
        'source = "builtin:tiny-v4"\n[quantize]\nscheme = "fp8"\n'
        '[calibrate]\ncorpus = ["builtin:news"]\n'
    )
    result = run(file, tmp_path / "out")
    assert isinstance(result.exception, V4QuantError) and "builtin:heldout" in str(result.exception)
