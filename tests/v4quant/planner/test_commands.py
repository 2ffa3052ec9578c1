"""The commands of a plan parse, run as they stand, and say the same in every shell."""

from __future__ import annotations

import json
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest
from click import Context
from click.testing import CliRunner

from tests.support.shells import words_of
from v4quant.builtin import TINY_V4, resolve_source
from v4quant.cli import cli
from v4quant.pipeline.recipe_file import load_pipeline
from v4quant.planner.candidates import Request
from v4quant.planner.choices import ENGINE_NAMES
from v4quant.planner.choose import choose
from v4quant.planner.commands import commands_for
from v4quant.planner.footprint import Outline, outline_release
from v4quant.planner.machines import parse_machine, with_memory
from v4quant.shell import Shell
from v4quant_kernels.scheme import get_scheme


@cache
def outline_of(release: str) -> Outline:
    return outline_release(release)


OWNERS = (
    "2x3090 64GB", "2x3090 128GB", "rtx-pro-6000 192GB", "dgx-spark", "m3-ultra-512", "m4-max-64",
    "strix-halo", "8xh100", "4x4090 256GB", "4090 64GB", "8xmi300x", "2xdgx-spark",
)  # fmt: skip
SERVER_OPTIONS = {
    "llama-server": {
        "-m", "--n-gpu-layers", "--fit", "--n-cpu-moe", "--tensor-split", "--override-tensor",
        "--ctx-size", "--jinja", "--no-mmap", "--rpc",
    },
    "vllm": {
        "--tensor-parallel-size", "--max-model-len", "--max-num-seqs", "--max-num-batched-tokens",
        "--gpu-memory-utilization", "--kv-cache-dtype", "--enable-expert-parallel",
        "--engram-config", "--tokenizer-mode", "--reasoning-parser", "--tool-call-parser",
        "--enable-auto-tool-choice",
    },
    "python": {
        "-m", "--model-path", "--tp", "--context-length", "--max-running-requests",
        "--chunked-prefill-size", "--mem-fraction-static", "--ep-size", "--nnodes", "--node-rank",
        "--dist-init-addr", "--reasoning-parser", "--tool-call-parser",
    },
}  # fmt: skip


@pytest.mark.parametrize("owner", OWNERS)
def test_every_printed_command_parses(owner: str) -> None:
    """Ours by our own parser, servers' by the options that they have."""
    name, _, ram = owner.partition(" ")
    machine = with_memory(parse_machine(name), ram or None, None)
    # A command keeps the help option of its first context, so that must have its parent's settings.
    parent = Context(cli, **cli.context_settings)
    for release in ("flash", "pro", "v41"):
        answers = [choose(outline_of(release), Request(machine, 32768, "auto", 8, engines))
                   for engines in (ENGINE_NAMES, ("sglang",))]  # fmt: skip
        answer = answers[0]
        assert answer.candidates or answer.remedies
        plain = [c for c in answer.candidates if c.recipe is not None and not c.where.disk]
        bits = [get_scheme(c.scheme).bits_per_weight for c in plain]
        assert min(bits, default=2) >= 2 or max(bits) < 2  # one bit only where nothing else fits
        for candidate in (c for a in answers for c in a.candidates):
            typed = commands_for(candidate, machine, "hf://maker/Model", "8GB")
            for line in (*typed.make, *typed.check):
                _, command, *arguments = shlex.split(line)
                cli.get_command(parent, command).make_context(command, arguments, parent)
            for served in (typed.serve[-1], *typed.sglang):
                words = shlex.split(served)
                server, *words = [w for w in words if not w.startswith("SGLANG_")]
                known = SERVER_OPTIONS[server.rpartition("/")[2]]
                assert {w for w in words if w.startswith("-")} <= known
                assert (".gguf" in served) == (candidate.engine == "llama.cpp")


@pytest.mark.parametrize("owner", ["2x3090 64GB", "rtx-pro-6000 64GB"])
@pytest.mark.parametrize("shell", ["cmd", "powershell"])
def test_commands_for_windows_say_the_same(owner: str, shell: Shell) -> None:
    """In its shells' form: programs where Visual Studio puts them, no pattern left to the shell."""
    name, _, ram = owner.partition(" ")
    machine = with_memory(parse_machine(name), ram, None)
    source, seen = "C:\\My Models\\Flash 50%", 0
    for candidate in choose(outline_of("flash"), Request(machine, 32768, "auto", 8)).candidates:
        here, there = (
            commands_for(candidate, machine, source, "8GB", "", s) for s in ("sh", shell)
        )
        for ours, theirs in zip(
            (*here.make, *here.check), (*there.make, *there.check), strict=True
        ):
            assert words_of(ours, "sh") == words_of(theirs, shell)
        assert here.sglang == there.sglang
        if candidate.engine == "vllm":
            assert "WSL" in there.serve[-2] and here.serve[-1] == there.serve[-1]
        elif candidate.recipe is not None:
            ours, theirs = words_of(here.serve[-1], "sh"), words_of(there.serve[-1], shell)
            assert theirs[0] == "llama.cpp\\build\\bin\\Release\\llama-server.exe"
            assert theirs[2] == ours[2].replace("/", "\\") and theirs[3:] == ours[3:]
        else:
            opening = "for %f in (" if shell == "cmd" else "llama.cpp\\build"
            assert there.serve[-1].startswith(opening) and here.serve[-1].count("*") >= 2
            seen += "Resolve-Path" in there.serve[-1] or "%f" in there.serve[-1]
    assert seen or name != "2x3090"


def test_the_commands_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny model, on a machine with a card; fetching and serving apart."""
    monkeypatch.chdir(tmp_path)
    source, runner = str(resolve_source(TINY_V4)), CliRunner()
    options = ["--cards", "1x24GB", "--ram", "32GB", "--engine", "llama.cpp", "--context", "4096"]
    done = runner.invoke(cli, ["plan", source, *options, "--write", "run.toml", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    commands = found["candidates"][0]["commands"]
    for line in (*commands["make"], *commands["check"]):
        program, *arguments = shlex.split(line)
        assert program == "v4quant"
        assert runner.invoke(cli, arguments).exit_code == 0, line
    made = next((tmp_path / "tiny-v4-mxfp4").glob("*.gguf"))
    assert abs(made.stat().st_size - found["candidates"][0]["bytes"]) < 1_000_000
    pipeline = load_pipeline("run.toml")
    assert pipeline.recipe.scheme == "mxfp4" and pipeline.recipe.format == "gguf"
    assert tomllib.loads(Path("run.toml").read_text())["source"] == source
