"""The command line as its callers see it: exit codes, streams, one-line errors, signals.

Most tests call `main`, the outermost frame, in this process; what only a process shows (signals,
a real traceback) is started as one.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.conversion import TINY, convert, folder_bytes
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.cli import _output, cli, main
from v4quant.sizes import human_bytes
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.shards import TEMPORARY_SUFFIX

TINY_V4 = Path(__file__).parents[2] / "v4quant" / "data" / "tiny-v4"
SHARD = "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; asserts that it is one, and that nothing is on stdout."""
        lines = told(self.err)
        assert len(lines) == 1 and lines[0].startswith("Error: "), self.err
        assert "Traceback" not in self.err and self.out == ""
        return lines[0]


def told(stderr: str) -> list[str]:
    """Lines of stderr besides those on progress and warnings."""
    lines = [line for line in stderr.splitlines() if line and not line.endswith("...")]
    return [line for line in lines if not line.startswith("Warning: ")]


Command = Callable[..., Ran]


@pytest.fixture
def v4quant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run `v4quant ARGS` through its outermost frame in this process."""
    before = signal.getsignal(signal.SIGTERM)
    # It ends the process seconds after a SIGTERM: here the tests that come next.
    monkeypatch.setattr("v4quant.cli.watch_signals", lambda *_: None)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["v4quant", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        streams = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Ran(exit_.value.code, streams.out, streams.err)

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows of ids for the tiny random model, which has no tokenizer."""
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    stored = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    np.save(file, stored[:160].reshape(2, 80).numpy())
    return file


def commands() -> list[tuple[str, ...]]:
    """Every command, subcommands of groups included."""
    found: list[tuple[str, ...]] = []

    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        found.append(path)
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*path, name))

    walk(cli, ())
    return found


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_has_an_example(v4quant: Command, path: tuple[str, ...]) -> None:
    ran = v4quant(*path, "--help")
    assert ran.code == 0 and ran.err == ""
    assert "Usage: " in ran.out
    assert f"v4quant {' '.join(path[:1]) or 'run demo'}" in ran.out.split("Options:")[1]
    assert v4quant(*path, "-h").out == ran.out
    command: Any = cli
    for name in path:
        command = command.commands[name]
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.envvar == environment_name(path, option) or not path


def environment_name(path: tuple[str, ...], option: click.Option) -> str:
    words = ["v4quant", *path, option.opts[0].removeprefix("--")]
    return "_".join(words).replace("-", "_").upper()


def test_version(v4quant: Command) -> None:
    from v4quant import __version__

    assert v4quant("--version").out.strip() == f"v4quant, version {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["quantize", TINY], "Missing argument 'OUT'"),
        (["quantize", TINY, "out", "--shceme", "fp8"], "No such option"),
        (["quantize", TINY, "out", "--draft", "maybe"], "--draft"),
        (["quantize", TINY, "out", "--workers", "0"], "--workers"),
        (["quantize", TINY, "out", "--workers", "many"], "--workers"),
        (["calibrate", TINY], "--out"),
        (["calibrate", TINY, "--out", "s", "--min-tokens", "0"], "--min-tokens"),
        (["evaluate", TINY, "--activations", "some"], "--activations"),
        (["evaluate", TINY, "--tokens", "1.5"], "--tokens"),
        (["plan", "flash", "--ram-bandwidth", "nan"], "nan is not a finite number"),
        (["bench", "gpu", "--append", "x", "--minutes", "inf"], "inf is not a finite number"),
        (["run"], "Missing argument 'RECIPE'"),
    ],
)
def test_wrong_usage_exits_with_2(v4quant: Command, arguments: list[Any], message: str) -> None:
    ran = v4quant(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert "Error: " in ran.err and message in ran.err
    assert "Traceback" not in ran.err


def one_json(ran: Ran) -> dict[str, Any]:
    """The one JSON value on stdout."""
    value = json.loads(ran.out)
    assert isinstance(value, dict)
    return value


def test_inspect_json(v4quant: Command) -> None:
    ran = v4quant("inspect", TINY, "--deep", "--json")
    assert ran.code == 0
    found = one_json(ran)
    assert found["experts"] == 4 and found["defects"] == []
    text = v4quant("inspect", TINY).out
    assert "No defects found." in text and "routed experts" in text


def test_quantize_json(v4quant: Command, tmp_path: Path) -> None:
    ran = v4quant("quantize", TINY, tmp_path / "out", "--scheme", "int4-g32", "--json")
    assert ran.code == 0
    found = one_json(ran)
    assert found.keys() >= {
        "output", "format", "scheme", "tensors", "bytes_in", "bytes_out", "exact_tensors",
        "lossy_tensors", "copied_tensors", "worst_relative_rms", "mean_relative_rms", "seconds",
        "peak_rss_bytes",
    }  # fmt: skip
    assert found["output"] == str(tmp_path / "out")
    assert (found["format"], found["scheme"]) == ("compressed-tensors", "int4-g32")
    assert (found["exact_tensors"], found["lossy_tensors"], found["copied_tensors"]) == (44, 60, 99)
    assert 0 < found["mean_relative_rms"] <= found["worst_relative_rms"] < 0.2
    assert found["seconds"] > 0 and found["peak_rss_bytes"] > 50e6
    shards = (tmp_path / "out").glob("*.safetensors")
    assert found["bytes_out"] == sum(s.stat().st_size for s in shards)
    again = v4quant("quantize", TINY, tmp_path / "out", "--scheme", "int4-g32")
    assert again.code == 0 and "60 lossy" in again.out


def test_solve_quantize_verify(v4quant: Command, tmp_path: Path, ids: Path) -> None:
    solved, out = tmp_path / "solved", tmp_path / "out"
    command = ("calibrate", TINY, "--out", solved, "--corpus", ids, "--solve", "int4-g64")
    ran = v4quant(*command)
    assert ran.code == 0 and "mtp.0" in ran.out and f"solution in {solved}" in ran.out
    assert v4quant(*command).code == 0  # again: nothing left to solve
    ran = v4quant("quantize", TINY, out, "--scheme", "int4-g64", "--stats", solved)
    assert ran.code == 0
    manifest = json.loads((out / "v4quant.json").read_bytes())
    assert manifest["recipe"]["solver"] == "gptq" and manifest["stats"]
    plain = tmp_path / "plain"
    assert v4quant("quantize", TINY, plain, "--scheme", "int4-g64").code == 0
    assert json.loads((plain / "v4quant.json").read_bytes())["recipe"]["solver"] == "optimal"
    name = "model-00001-of-00002.safetensors"
    assert (out / name).read_bytes() != (plain / name).read_bytes()
    assert v4quant("verify", out, "--source", TINY).code == 0
    error = v4quant("quantize", TINY, tmp_path / "x", "--scheme", "int4-g32", "--stats", solved)
    assert "was solved for int4-g64, not for int4-g32" in error.error
    without = ("quantize", TINY, tmp_path / "x", "--scheme", "int4-g32", "--solver", "gptq")
    assert "--solve int4-g32" in v4quant(*without).error
    cast = ("quantize", TINY, tmp_path / "x", "--scheme", "fp8", "--solver", "gptq")
    assert "is for integers and GGUF's block types" in v4quant(*cast).error


def test_calibrate_quantize_with_statistics(v4quant: Command, tmp_path: Path, ids: Path) -> None:
    stats = tmp_path / "deep" / "stats.v4q"
    ran = v4quant("calibrate", TINY, "--out", stats, "--corpus", ids, "--min-tokens", 80, "--json")
    found = one_json(ran)
    assert ran.code == 0 and found["tokens"] == 160 and found["floor"] == 80
    assert 5 <= len(found["starved"]) < 5 * 4 and len(found["layers"]) == 5
    again = ("calibrate", TINY, "--out", stats, "--corpus", ids)
    assert "exists already (statistics)" in v4quant(*again).error
    error = v4quant(*again, "--min-tokens", 81, "--overwrite").error
    assert "80 for each of 4 experts" in error and "lower --min-tokens" in error
    text = v4quant(*again, "--overwrite").out
    assert "mtp.0" in text and str(stats) in text
    out = tmp_path / "out"
    ran = v4quant("quantize", TINY, out, "--scheme", "int4-g32", "--stats", stats)
    assert ran.code == 0
    assert json.loads((out / "v4quant.json").read_bytes())["stats"]
    other = convert(TINY, tmp_path / "other", "fp8").output
    error = v4quant("evaluate", other, "--corpus", tmp_path / "none.npy").error
    assert "none.npy: no such corpus file" in error
    foreign = v4quant("quantize", other, tmp_path / "x", "--scheme", "mxfp4", "--stats", stats)
    assert foreign.code == 1 and "another checkpoint" in foreign.error
    assert not (tmp_path / "x").exists()


def test_evaluate_json(
    v4quant: Command, tmp_path: Path, ids: Path, converted: Callable[[str], Path]
) -> None:
    alone = v4quant("evaluate", TINY, "--corpus", ids, "--json")
    assert alone.code == 0
    keys = {"tokens", "nll", "perplexity", "perplexity_stderr"}
    assert one_json(alone).keys() >= keys and "kl_mean" not in one_json(alone)
    arguments = ["evaluate", converted("int4-g128"), "--reference", TINY, "--corpus", ids]
    beside = v4quant(*arguments, "--json", "--report", tmp_path / "r.json")
    keys |= {"kl_mean", "kl_p99", "top1_agreement", "reference_perplexity"}
    found = one_json(beside)
    assert found.keys() >= keys | {"noise_floor"} and found["noise_floor"].keys() >= keys
    assert found["tokens"] == 158
    assert json.loads((tmp_path / "r.json").read_text()) == found
    for name, begin in (("r.html", "<!doctype html>"), ("r.md", "**")):
        ran = v4quant(*arguments, "--report", tmp_path / name)
        assert ran.code == 0 and f"report in {tmp_path / name}" in ran.out
        assert (tmp_path / name).read_text().startswith(begin)
        assert "noise floor" in ran.out


def test_evaluate_several_candidates(
    v4quant: Command, tmp_path: Path, ids: Path, converted: Callable[[str], Path]
) -> None:
    damaged = tmp_path / "damaged"
    edited = EditableCheckpoint.read(converted("int4-g128"))
    scale = edited["layers.2.ffn.experts.1.w2.weight_scale"]
    scale.data = bytes(len(scale.data))
    edited.write(damaged)
    arguments = ["evaluate", converted("int4-g128"), "--reference", TINY, "--corpus", ids]
    arguments += ["--candidate", damaged, "--floors", 2, "--draft"]
    ran = v4quant(*arguments, "--json", "--report", tmp_path / "r.html")
    found = one_json(ran)
    assert ran.code == 3 and found["findings"] == []
    (other,) = found["others"]
    assert [f["where"] for f in other["findings"]] == ["layers.2.ffn.experts.1.w2"]
    assert "all zero" in other["findings"][0]["problem"]
    assert len(found["noise_floor"]["runs"]) == 2 and 0 <= found["draft"]["change"] + 1 <= 2
    told = v4quant(*arguments)
    assert "FOUND in damaged: layers.2.ffn.experts.1.w2" in told.out
    assert "draft accepted" in told.out and "ppl ratio" in told.out
    assert "Suspected defects (1)" in (tmp_path / "r.html").read_text()
    assert told.code == 3
    ran = v4quant(*arguments[:6], "--no-weights", "--json")
    quick = one_json(ran)
    assert ran.code == 0
    assert "findings" not in quick and "draft" not in quick


def test_candidates_are_refused_where_they_make_no_sense(
    v4quant: Command, tmp_path: Path, ids: Path
) -> None:
    alone = v4quant("evaluate", TINY, "--candidate", TINY, "--corpus", ids)
    assert alone.code == 2 and "give --reference" in alone.err
    arguments = ["evaluate", TINY, "--candidate", TINY, "--reference", TINY, "--corpus", ids]
    saving = v4quant(*arguments, "--save-logits", tmp_path / "x")
    assert saving.code == 2 and "--save-logits" in saving.err
    draft = v4quant("evaluate", TINY, "--corpus", ids, "--draft")
    assert draft.code == 0 and "draft accepted" in draft.out


def test_verify_exits_with_3_on_a_difference(
    v4quant: Command, tmp_path: Path, converted: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted("int8-g32"), out)
    good = v4quant("verify", out, "--source", TINY, "--json")
    assert good.code == 0 and one_json(good)["ok"] is True
    assert one_json(good)["exact"] == one_json(good)["compared"] == 203
    assert "All checks passed." in v4quant("verify", out).out
    data = bytearray((out / SHARD).read_bytes())
    data[-1] ^= 1
    (out / SHARD).write_bytes(data)
    bad = v4quant("verify", out, "--json")
    assert bad.code == 3 and one_json(bad)["ok"] is False
    assert one_json(bad)["findings"][0]["where"] == SHARD
    told = v4quant("verify", out)
    assert told.code == 3 and "FAILED" in told.out and SHARD in told.out
    assert v4quant("verify", TINY).code == 1


def test_dry_run_writes_nothing(v4quant: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = v4quant("quantize", TINY, out, "--scheme", "int4-g32", "--dry-run", "--json")
    planned = one_json(ran)
    assert ran.code == 0 and planned["tensors"] > 200 and planned["shards"] == 2
    assert "int4-g32" in v4quant("quantize", TINY, out, "--scheme", "int4-g32", "--dry-run").out
    assert list(tmp_path.iterdir()) == []
    done = one_json(v4quant("quantize", TINY, out, "--scheme", "int4-g32", "--json"))
    assert done["bytes_out"] == planned["bytes_out"] and done["tensors"] == planned["tensors"]


def test_options_from_the_environment(
    v4quant: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Path
) -> None:
    monkeypatch.setenv("V4QUANT_QUANTIZE_SCHEME", "fp8")
    monkeypatch.setenv("V4QUANT_QUANTIZE_JSON", "1")
    assert one_json(v4quant("quantize", TINY, tmp_path / "a"))["scheme"] == "fp8"
    ran = v4quant("quantize", TINY, tmp_path / "b", "--scheme", "mxfp4")
    assert one_json(ran)["scheme"] == "mxfp4"
    monkeypatch.setenv("V4QUANT_QUANTIZE_DRY_RUN", "1")
    assert "workers" in one_json(v4quant("quantize", TINY, tmp_path / "c"))
    monkeypatch.setenv("V4QUANT_EVALUATE_CORPUS", str(ids))
    assert "158 in 2 windows" in v4quant("evaluate", TINY).out


def test_recipe_file_and_options_meet(v4quant: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('scheme = "fp8"\ndraft = "drop"\n')
    ran = v4quant("quantize", TINY, tmp_path / "a", "--recipe", recipe, "--json")
    assert one_json(ran)["dropped_tensors"] > 0
    more = ["--recipe", recipe, "--scheme", "mxfp4", "--draft", "convert", "--json"]
    assert one_json(v4quant("quantize", TINY, tmp_path / "b", *more))["dropped_tensors"] == 0
    error = v4quant("quantize", TINY, tmp_path / "c").error
    assert "no scheme given" in error and "--scheme" in error


# Bad input: the thing and the remedy in one line, and nothing that looks like a checkpoint.


def missing_shard(folder: Path) -> Path:
    shutil.copytree(TINY, folder)
    (folder / SHARD).unlink()
    return folder


def truncated_file(folder: Path) -> Path:
    shutil.copytree(TINY, folder)
    os.truncate(folder / SHARD, 100_000)
    return folder


def edited(change: Callable[[EditableCheckpoint], None]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        checkpoint = EditableCheckpoint.read(TINY)
        change(checkpoint)
        return checkpoint.write(folder)

    return write


def _wrong_dtype(checkpoint: EditableCheckpoint) -> None:
    tensor = checkpoint["layers.3.attn.wkv.weight"]
    tensor.dtype, tensor.data = "I64", tensor.data * 8


def _missing_scale(checkpoint: EditableCheckpoint) -> None:
    checkpoint.remove("layers.2.ffn.experts.3.w2.scale")


def _unknown_tensor(checkpoint: EditableCheckpoint) -> None:
    checkpoint.add("layers.3.attn.rotor.weight", "BF16", (2,), bytes(4))


def _not_finite(checkpoint: EditableCheckpoint) -> None:
    tensor = checkpoint["layers.3.ffn.experts.1.w3.scale"]
    tensor.data = tensor.data[:-1] + b"\xff"


def _no_config_field(checkpoint: EditableCheckpoint) -> None:
    del checkpoint.config["n_routed_experts"]


BAD_SOURCES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "missing shard": (missing_shard, SHARD, "download"),
    "truncated file": (truncated_file, SHARD, "download it again"),
    "wrong dtype": (edited(_wrong_dtype), "layers.3.attn.wkv.weight", "I64"),
    "missing scale": (edited(_missing_scale), "layers.2.ffn.experts.3.w2.scale", "cannot be"),
    "unknown tensor": (edited(_unknown_tensor), "layers.3.attn.rotor.weight", "--unknown copy"),
    "not finite": (edited(_not_finite), "layers.3.ffn.experts.1.w3.scale", "download it again"),
    "config": (edited(_no_config_field), "n_routed_experts", "config.json"),
    "no folder": (lambda folder: folder, "no such folder", "config.json"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
@pytest.mark.parametrize("scheme", ["int4-g32", "fp8"])
def test_bad_sources(v4quant: Command, tmp_path: Path, kind: str, scheme: str) -> None:
    make, thing, remedy = BAD_SOURCES[kind]
    source, out = make(tmp_path / "source"), tmp_path / "out"
    ran = v4quant("quantize", source, out, "--scheme", scheme)
    assert ran.code == 1
    assert thing in ran.error and remedy in ran.error, ran.error
    assert str(source) in ran.error or SHARD in ran.error, ran.error
    assert_no_checkpoint(out)


def assert_no_checkpoint(out: Path) -> None:
    """Nothing a loader would take for a checkpoint, and no half-written file."""
    names = {p.name for p in out.rglob("*")} if out.exists() else set()
    assert not names & {"config.json", INDEX_NAME, "v4quant.json"}, names
    assert not [name for name in names if name.endswith(TEMPORARY_SUFFIX)], names


def test_output_folder_not_empty(v4quant: Command, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    ran = v4quant("quantize", TINY, tmp_path, "--scheme", "fp8")
    assert ran.code == 1
    assert "not empty (photo.jpg" in ran.error and "choose a new folder" in ran.error
    assert folder_bytes(tmp_path) == {"photo.jpg": b"precious"}


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--scheme", "int5-g32"], ["unknown scheme 'int5-g32'", "int4-g32"]),
        (["--scheme", "fp8", "--format", "gguf9"], ["unknown format 'gguf9'", "deepseek"]),
        (["--scheme", "fp8", "--format", "modelopt"], ["pairs that work"]),
        (["--scheme", "fp8", "--max-memory", "lots"], ["'lots' is not a size", "6GB"]),
        (["--scheme", "fp8", "--max-memory", "1MB"], ["too little", "GB"]),
        (["--recipe", "absent.toml"], ["absent.toml", "No such file"]),
        (["--scheme", "fp8", "--stats", "absent.v4q"], ["absent.v4q"]),
    ],
)
def test_bad_options(
    v4quant: Command, tmp_path: Path, arguments: list[str], messages: list[str]
) -> None:
    ran = v4quant("quantize", TINY, tmp_path / "out", *arguments)
    assert ran.code == 1
    for message in messages:
        assert message in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", TINY, "o", "--scheme", "q4_k_m"], "did you mean q4_k?"),
        (["quantize", TINY, "o", "--scheme", "fp8", "--format", "DeepSeek"], "mean deepseek?"),
        (["quantize", TINY, "o", "--scheme", "q4_k", "--dense", "Q6_K"], "did you mean q6_k?"),
        (["quantize", "some-owner/model", "o", "--scheme", "fp8"], "hf://some-owner/model"),
        (["quantize", "tiny-v4", "o", "--scheme", "fp8"], "did you mean builtin:tiny-v4"),
        (["quantize", "builtin:tinyv4", "o", "--scheme", "fp8"], "did you mean builtin:tiny-v4"),
        (["quantize", TINY, "o", "--scheme", "fp8", "--max-memory", "8"], "write it like 8GB"),
        (["run", "dem0"], "did you mean demo?"),
        (["plan", "flsh"], "did you mean flash"),
        (["plan", "flash", "--cards", "2x24"], "write 2x24GB"),
        (["plan", "flash", "--cards", "none", "--ram", "64"], "write 64GB"),
        (["plan", "flash", "--machine", "rtx-pro6000x"], "did you mean rtx-pro-6000"),
    ],
)
def test_near_misses_are_told(v4quant: Command, arguments: list[Any], message: str) -> None:
    assert message in v4quant(*arguments).error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", TINY, "o", "--scheme", "fp8", "--engine", "vLLM"], "did you mean vllm?"),
        (["evaluate", TINY, "--mode", "think-hgh"], "did you mean think-high"),
        (["verify", TINY, "--engine", "llamacpp"], "did you mean llama.cpp?"),
    ],
)
def test_near_misses_of_choices_are_told(
    v4quant: Command, arguments: list[Any], message: str
) -> None:
    ran = v4quant(*arguments)
    assert ran.code == 2 and message in ran.err


def test_corpus_too_short(v4quant: Command, tmp_path: Path, ids: Path) -> None:
    for command in (["evaluate", TINY], ["calibrate", TINY, "--out", tmp_path / "s"]):
        ran = v4quant(*command, "--corpus", ids, "--tokens", 161)
        assert ran.code == 1
        assert f"{ids}: is too short" in ran.error and "fewer --tokens" in ran.error
    assert list(tmp_path.iterdir()) == []
    np.save(tmp_path / "few.npy", np.arange(3, 15).reshape(1, 12))
    short = v4quant("evaluate", TINY, "--corpus", tmp_path / "few.npy")
    assert short.code == 1 and "at least two windows" in short.err


def test_corpus_without_tokenizer(v4quant: Command, tmp_path: Path) -> None:
    error = v4quant("evaluate", TINY).error
    assert "tokenizer.json: missing" in error and ".npy" in error


def test_full_disk_and_other_os_errors_are_one_line(
    v4quant: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("v4quant_formats.shards.write_at", fail)
    ran = v4quant("quantize", TINY, tmp_path / "out", "--scheme", "fp8")
    assert ran.code == 1 and "the disk is full; free space" in ran.error
    assert_no_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error\nsecond line")])
def test_unforeseen_errors_of_the_system_are_one_line(
    v4quant: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("v4quant.api.checks.open_source", fail)
    ran = v4quant("inspect", TINY)
    assert ran.code == 1
    assert type(error).__name__ in ran.error or "Input/output error" in ran.error


def test_traceback_only_on_request(
    v4quant: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "v4quant", "inspect", str(tmp_path / "none")]
    environment = {**os.environ, "V4QUANT_DEBUG": "1"}
    shown = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert shown.returncode == 1 and shown.stdout == ""
    assert "Traceback" in shown.stderr and "FormatError" in shown.stderr
    assert "no such folder" in v4quant("inspect", tmp_path / "none").error
    monkeypatch.setenv("V4QUANT_DEBUG", "0")
    assert "no such folder" in v4quant("inspect", tmp_path / "none").error


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "1"):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        if value is None:
            monkeypatch.delenv("NO_COLOR", raising=False)
        else:
            monkeypatch.setenv("NO_COLOR", value)
        _output.heading("Step")
        # no-color.org: set and not empty.
        assert ("\x1b[" in terminal.getvalue()) == (not value)


def test_bars_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", stream := kind())
        progress = _output.TerminalProgress()
        progress.start("Working", 2000, "B")
        progress.advance(500)
        progress.finish()
        said[kind] = stream.getvalue()
    assert "\r" in said[Terminal] and "Working" in said[Terminal]
    assert said[io.StringIO] == "Working (2.0 kB) ...\n"


def test_off_a_terminal_a_line_a_minute_with_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = _output.TerminalProgress()
    progress.start("Scoring", 1000, "tok")
    for _ in range(40):  # 25 tokens in ten seconds
        now += 10
        progress.advance(25)
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Scoring (1,000 tok) ..."
    assert len(lines) == 1 + 6
    assert lines[1] == "Scoring: 150 tok of 1,000 tok (15%), about 6 min left"  # 340 s


def test_after_an_interruption_no_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = _output.TerminalProgress()
    progress.start("Working", 100, "layer")
    progress.advance(10)
    _output.stop_bars()
    before = terminal.getvalue()
    try:
        progress.advance(1)  # workers end what they had begun
        progress.finish()
        progress.start("Next", 5, "layer")
        progress.finish()
        del progress
    finally:
        _output.reset()
    assert terminal.getvalue().removeprefix(before).replace("Next (5 layer) ...", "").strip() == ""


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["inspect", "/no/such/folder"], "FormatError", 1),
        (["inspect", "--nope"], "NoSuchOption", 2),
        (["quantize", str(TINY), "o", "--scheme", "fp8", "--engine", "x"], "BadParameter", 2),
        (["evaluate", str(TINY), "--candidate", "x"], "OptionError", 2),
    ],
)
def test_with_json_an_error_is_an_object_too(
    v4quant: Command, arguments: list[str], kind: str, code: int
) -> None:
    ran = v4quant(*arguments, "--json")
    error = json.loads(ran.out)["error"]
    assert ran.code == error["exit_code"] == code and error["kind"] == kind
    assert f"Error: {error['message']}" == ran.err.splitlines()[-1]


def test_quiet_verbose_and_log(v4quant: Command, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "v4quant.log"
    quiet = ("--quiet", "--log-file", log)
    first = v4quant("quantize", TINY, tmp_path / "a", "--scheme", "fp8", *quiet)
    assert first.code == 0 and first.err == ""
    kept = log.read_text()
    assert kept.startswith("# v4quant log\n") and "Converting (" in kept and "took " in kept
    assert f"v4quant quantize {TINY}" in kept
    loud = v4quant("quantize", TINY, tmp_path / "b", "--scheme", "fp8", "--verbose")
    assert "CPU-seconds" in loud.err and "Converting (" in loud.err
    failed = v4quant("inspect", tmp_path / "none", *quiet)
    assert failed.error.startswith("Error: ") and "Traceback" in log.read_text()
    assert log.read_text().startswith(kept)
    assert "Traceback" in v4quant("inspect", tmp_path / "none", "--verbose").err
    both = v4quant("inspect", TINY, "--quiet", "--verbose")
    assert both.code == 2 and "contradict" in both.err


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str, tmp_path: Path) -> None:
    """Files that are opened must not get their numbers, for libraries print there."""
    code = (
        "import os\n"
        "from v4quant_formats import shards\n"
        "real = shards.ShardWriter.add_piece\n"
        "def add(*given):\n"
        "    os.write(1, b'printed'), os.write(2, b'printed')\n"
        "    return real(*given)\n"
        "shards.ShardWriter.add_piece = add\n"
        "from v4quant.__main__ import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", code, "quantize", str(TINY), str(tmp_path / "out")]
    line = f"{shlex.join([*words, '--scheme', 'mxfp4'])} {closed}"
    assert subprocess.run(["sh", "-c", line], check=False, stdout=subprocess.PIPE).returncode == 0
    convert(TINY, tmp_path / "same", "mxfp4")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "same")


def test_a_log_on_a_full_disk(v4quant: Command, tmp_path: Path) -> None:
    log = tmp_path / "v4quant.log"
    assert v4quant("inspect", TINY, "--log-file", log).code == 0
    size = log.stat().st_size
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, was[1]))
    try:
        done = v4quant("inspect", TINY, "--log-file", log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, ignored)
    assert done.code == 0 and "v4quant.log: cannot be written any more (File too" in done.err
    assert log.stat().st_size == size


def test_a_log_never_replaces_another_file(v4quant: Command, tmp_path: Path) -> None:
    other = tmp_path / "shard.safetensors"
    other.write_bytes(b"0123")
    assert "not a log of v4quant" in v4quant("inspect", TINY, "--log-file", other).error
    assert other.read_bytes() == b"0123"
    assert "not a log of v4quant" in v4quant("inspect", TINY, "--log-file", tmp_path).error


def test_an_output_larger_than_its_source_is_told(v4quant: Command, tmp_path: Path) -> None:
    command = ("quantize", TINY_V4, tmp_path / "o", "--dry-run", "--scheme")
    larger = v4quant(*command, "q8_0")
    assert "will be larger than the source" in larger.err and "routed experts" in larger.err
    assert "Warning" not in v4quant(*command, "q2_k", "--dense", "q8_0").err
    assert "without a text" in v4quant(*command, "iq2_xxs", "--dense", "q8_0").err


def test_tables_and_sizes() -> None:
    rows = [("a", "1", "x"), ("bcd", "22", "yy")]
    assert _output.table(rows) == "a     1  x\nbcd  22  yy"
    assert _output.table(rows, ("n", "m", "k")).splitlines()[:2] == ["n     m  k", "---  --  --"]
    sizes = [human_bytes(n) for n in (0, 999, 1000, 20_717_676, 160e9, 1.6e12)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "20.7 MB", "160.0 GB", "1.60 TB"]


# Signals, in a process whose units take long enough to be interrupted.

SLOW = """
import signal, sys, time
import v4quant.conversion.shard_writing
from v4quant.cli import main
# Shells start background jobs, perhaps this test run, with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
convert = v4quant.conversion.shard_writing.convert_unit
def slow(*arguments):
    time.sleep(0.01)
    return convert(*arguments)
v4quant.conversion.shard_writing.convert_unit = slow
main()
"""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
)
def test_signals(v4quant: Command, tmp_path: Path, number: int, code: int, word: str) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(TINY_V4), str(out), "--scheme", "fp8", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: len(list(out.glob("*.safetensors"))) >= 2, process)
        process.send_signal(number)
        said, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, stderr
    assert said == ""
    assert told(stderr) == [f"{word}; finished shards are kept: the same command resumes."]
    assert_no_checkpoint(out)
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert 2 <= len(kept) < 9
    assert v4quant(*arguments).code == 0
    assert v4quant("verify", out).code == 0
    journaled = [p for p, at in kept.items() if p.stat().st_mtime_ns == at]
    # The shard that was renamed but perhaps not yet journaled may have been made again.
    assert len(journaled) >= len(kept) - 1
    convert(TINY_V4, tmp_path / "whole", "fp8")
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_interruption_inside_the_process(v4quant: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C outside of a job, for instance while reading headers."""

    def interrupt(*_: object, **__: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGINT)

    def terminate(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    for action, code in ((interrupt, 130), (terminate, 143)):
        monkeypatch.setattr("v4quant.api.checks.open_source", action)
        ran = v4quant("inspect", TINY)
        assert ran.code == code and ran.out == ""
        assert (
            "nothing is kept: the same command begins again" in ran.err
            and "Traceback" not in ran.err
        )


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "v4quant", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("v4quant, version ") and done.stderr == ""


def test_output_is_utf8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or pipe gets UTF-8; a terminal that cannot show a letter gets its number."""
    for shown, expected in ((False, "x→y 模".encode()), (True, b"x\\u2192y \\u6a21")):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="cp1252")
        monkeypatch.setattr(stream, "isatty", lambda shown=shown: shown)
        monkeypatch.setattr(sys, "stdout", stream)
        _output.speak_utf8()
        _output.data("x→y 模")
        stream.flush()
        assert raw.getvalue().rstrip() == expected
