"""What goes wrong while kernels are measured: rows that say so, and the rest goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click import Context

from v4quant.bench.kernels import cells as module
from v4quant.bench.kernels import indexer, moe
from v4quant.bench.kernels.cells import Cells, told
from v4quant.bench.kernels.device import Machine
from v4quant.bench.kernels.session import STEPS, Step, run_session
from v4quant_formats.errors import OutputError
from v4quant_kernels import dispatch
from v4quant_kernels.progress import SilentProgress

HERE = Machine("cpu", "a processor", "none", "2", "3", 1e9, 1e9, 0.0)


@dataclass(frozen=True)
class Row:
    value: int


def test_a_failing_cell_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    file = tmp_path / "not there yet" / "rows.jsonl"
    cells = Cells("moe", HERE, SilentProgress(), file)
    assert file.exists(), "a place that cannot be written to fails first"

    def fail() -> Row:
        raise RuntimeError("ptxas: too many registers\n\n  in line 3\nand so on\nand on")

    assert cells.run("first", "row", lambda: Row(1)) == Row(1)
    assert cells.run("second", "row", fail) is None
    assert len(file.read_text().splitlines()) == 2, "rows are there before the bench ends"
    assert cells.run("third", "row", lambda: Row(3)) == Row(3)
    cells.skip("fourth", "not here")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line.get("row") for line in lines] == [{"value": 1}, None, {"value": 3}, None]
    assert lines[1]["missing"] == {
        "cell": "second",
        "reason": "RuntimeError: ptxas: too many registers in line 3 and so on",
    }
    assert lines[3]["missing"]["reason"] == "not here"
    assert all(line["machine"]["name"] == "a processor" for line in lines)
    assert [m.cell for m in cells.missing] == ["second", "fourth"]


@pytest.mark.parametrize("content", [b"notes", b"\0" * 40, b'{"model": 1}\n', b" " * 2**20])
def test_rows_are_not_written_behind_other_things(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(OutputError, match="holds no rows"):
        Cells("moe", HERE, SilentProgress(), file)
    assert file.read_bytes() == content
    file.write_bytes(b"")
    Cells("moe", HERE, SilentProgress(), file).skip("one", "x")
    Cells("moe", HERE, SilentProgress(), file).skip("two", "x")
    assert len(file.read_bytes().splitlines()) == 2


def test_nothing_begins_when_the_time_is_up() -> None:
    cells = Cells("moe", HERE, SilentProgress(), minutes=0)
    ran: list[int] = []
    assert cells.run("late", "row", lambda: ran.append(1)) is None
    assert not ran and cells.missing[0].reason == "the time was up"


def test_a_gpu_that_failed_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(module.torch.cuda, "synchronize", broken)
    cells = Cells("moe", Machine("cuda", "g", "", "", "", 1.0, 1.0, 0.0), SilentProgress())
    ran: list[int] = []
    cells.run("first", "row", broken)
    cells.run("second", "row", lambda: ran.append(1))
    assert not ran
    assert "the GPU failed before: RuntimeError: CUDA error" in cells.missing[1].reason


def test_a_kernel_that_strays_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = dispatch.moe

    def wrong(*arguments: Any, backend: str = "auto", **options: Any) -> torch.Tensor:
        out = genuine(*arguments, backend=backend, **options)  # type: ignore[arg-type]
        return out if backend == "torch" or out.shape[0] < 5 else out * 1.1

    monkeypatch.setattr(moe.dispatch, "moe", wrong)
    found = moe.bench_moe(["tiny"], ["mxfp4"], ["bf16"], [3, 5], SilentProgress(), "cpu")
    assert [row.tokens for row in found.rows] == [3] and found.rows[0].deviation < 1e-6
    assert found.missing[0].cell == "tiny mxfp4 bf16 5"
    assert "away from the twin's" in found.missing[0].reason


def test_an_indexer_that_strays_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = dispatch.top_k

    def wrong(logits: torch.Tensor, k: int, *, backend: str = "auto") -> torch.Tensor:
        out = genuine(logits, k, backend=backend)  # type: ignore[arg-type]
        return out if backend == "torch" else out.flip(1)

    monkeypatch.setattr(indexer.dispatch, "top_k", wrong)
    found = indexer.bench_indexer([256], ["one"], 5, SilentProgress(), "cpu")
    assert not found.rows and "is not the twin's" in found.missing[0].reason


def test_what_cannot_be_made_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that do not fit fail once, not once a number of tokens."""
    asked: list[int] = []

    def fail(*_: object) -> Any:
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(moe.dispatch, "prepare", fail)
    found = moe.bench_moe(["tiny"], ["mxfp4"], ["bf16"], [1, 2, 3], SilentProgress(), "cpu")
    assert not found.rows and len(asked) == 1
    assert [m.reason for m in found.missing] == [
        "OutOfMemoryError: CUDA out of memory",
        *["V4QuantError: as before: OutOfMemoryError: CUDA out of memory"] * 2,
    ]


def test_an_error_becomes_one_line() -> None:
    assert told(ValueError("a\n b ")) == "ValueError: a b"
    assert len(told(ValueError("x" * 5000))) == 300


SCRIPT = """
import sys, time
at = sys.argv.index("--append")
if "hang" in sys.argv: time.sleep(60)
if "crash" in sys.argv: raise SystemExit(9)
open(sys.argv[at + 1], "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


def test_a_session_survives_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v4quant.bench.kernels.session._GRACE", 1.0)
    monkeypatch.setattr("v4quant.bench.kernels.session._LEAST", 0.5)
    steps = [
        Step("fails", ("crash",), 1), Step("never ends", ("hang",), 0.02),
        Step("works", ("moe",), 1), Step("no time", ("moe",), 0.001),
    ]  # fmt: skip
    told_: list[str] = []
    file = tmp_path / "rows"
    program = (sys.executable, "-c", SCRIPT)
    found = run_session(steps, file, 2.0, told_.append, program)
    assert [r.outcome for r in found] == [
        "failed with exit code 9", "killed after 2 s", "done", "not begun: the time was up",
    ]  # fmt: skip
    assert told_ == ["fails", "never ends", "works"]
    (line,) = file.read_text().splitlines()
    assert line.startswith(f"moe --append {file} --minutes 1.000")
    (missing,) = run_session(steps[2:3], file, 1.0, told_.append, ("/no/such/program",))
    assert missing.outcome.startswith("could not be started")


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.name)
def test_the_steps_are_commands(step: Step) -> None:
    from v4quant.cli import cli
    from v4quant.cli.bench import bench

    name, *arguments = step.arguments
    parent = Context(cli, **cli.context_settings)  # a command keeps the help option it first had
    context = bench.commands[name].make_context(
        name, [*arguments, "--append", "x", "--minutes", "1"], parent
    )
    assert context.params["append"] == Path("x")
