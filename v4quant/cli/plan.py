"""`v4quant plan`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from v4quant.cli import _output
from v4quant.planner.candidates import ENGINE_NAMES, EngineName, PlanError, Request
from v4quant.planner.choose import Answer, choose
from v4quant.planner.commands import Commands, commands_for
from v4quant.planner.detect import this_machine
from v4quant.planner.effort import DEFAULT_EFFORT, EFFORTS, Effort
from v4quant.planner.footprint import Outline, outline_checkpoint, outline_release, release_named
from v4quant.planner.loss import read_measured
from v4quant.planner.machines import (
    Machine,
    parse_cards,
    parse_machine,
    with_generation,
    with_memory,
)
from v4quant.planner.run_file import run_file
from v4quant.planner.text import answer_text
from v4quant.source import open_source, resolve_source
from v4quant_formats.engines.engine import GPUS
from v4quant_formats.shards import write_file_atomically

_MEMORY = "8GB"


@click.command(epilog="Example: v4quant plan flash --machine 2x3090 --ram 128GB")
@click.argument("source")
@click.option("--machine", help="A machine by name, like 2x3090, rtx-pro-6000, dgx-spark, "
              "m3-ultra-512 or 8xh100; auto looks at this one (the default).")  # fmt: skip
@click.option("--cards", help="The same by number and size or name: 2x24GB, 4x3090; none for a "
              "processor alone. Sizes as sold.")  # fmt: skip
@click.option("--ram", help="System memory, as sold, like 128GB.")
@click.option("--ram-bandwidth", type=click.FloatRange(1), help="Of that memory, in GB/s (60 for a "
              "desktop, 300 for a server unless said).")  # fmt: skip
@click.option("--gpu", type=click.Choice(list(GPUS)), help="Generation of the cards, where their "
              "size says too little.")  # fmt: skip
@click.option("--engine", "engines", type=click.Choice(ENGINE_NAMES), multiple=True,
              help="Consider only this engine; may be repeated.")  # fmt: skip
@click.option("--context", type=click.IntRange(1, 2**24), default=32768, show_default=True,
              help="Tokens of one sequence that must fit.")  # fmt: skip
@click.option("--effort", type=click.Choice(EFFORTS), default=DEFAULT_EFFORT, show_default=True,
              help="How long choosing the codes may take.")  # fmt: skip
@click.option("--cores", type=click.IntRange(1, 4096), help="Cores of the machine that converts "
              "(default: this one's).")  # fmt: skip
@click.option("--measured", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              multiple=True, help="What `evaluate --json` said of conversions of this model; may "
              "be repeated.")  # fmt: skip
@click.option("--write", "run_path", type=click.Path(path_type=Path), help="Write a run file for "
              "`v4quant run` that makes the choice.")  # fmt: skip
@click.option("--choice", type=click.IntRange(1), default=1, show_default=True,
              help="Which of the files --write is for, by its number.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    source: str,
    machine: str | None,
    cards: str | None,
    ram: str | None,
    ram_bandwidth: float | None,
    gpu: str | None,
    engines: tuple[EngineName, ...],
    context: int,
    effort: Effort,
    cores: int | None,
    measured: tuple[Path, ...],
    run_path: Path | None,
    choice: int,
    as_json: bool,
) -> None:
    """Say which conversions of SOURCE a machine can serve, and how to make and serve them.

    SOURCE is a folder, hf://owner/name, or a release by name: flash, pro, flash-base, pro-base,
    flash-dspark, pro-dspark, vision or v41, whose inventories are built in. Headers are all that is
    read, and nothing is written but what --write asks for.
    """
    if machine is not None and cards is not None:
        raise click.UsageError("give one of --machine and --cards")
    asked = _machine(machine, cards, ram, ram_bandwidth, gpu)
    outline = _outline(source)
    rows = tuple(row for path in measured for row in read_measured(path))
    request = Request(
        asked, context, effort, cores or os.cpu_count() or 1, engines or ENGINE_NAMES, rows
    )
    answer = choose(outline, request)
    typed = [commands_for(c, asked, outline.label, _MEMORY) for c in answer.candidates]
    if run_path is not None:
        write_file_atomically(run_path, _run_text(answer, outline, choice).encode())
        _output.note(f"run file in {run_path}: v4quant run {run_path}")
    if as_json:
        _output.emit(_facts(answer, asked, typed))
    else:
        _output.data(answer_text(answer, asked, typed))


def _machine(
    name: str | None,
    cards: str | None,
    ram: str | None,
    bandwidth: float | None,
    gpu: str | None,
) -> Machine:
    if cards is not None:
        found = parse_cards(cards)
    elif name is None or name.lower() == "auto":
        found = this_machine()
    else:
        found = parse_machine(name)
    found = with_memory(found, ram, bandwidth)
    return found if gpu is None else with_generation(found, gpu)


def _outline(source: str) -> Outline:
    name = release_named(source)
    if name is not None and not Path(source).exists():
        return outline_release(name)
    with open_source(resolve_source(source), headers_only=True) as checkpoint:
        return outline_checkpoint(checkpoint)


def _run_text(answer: Answer, outline: Outline, choice: int) -> str:
    if choice > len(answer.candidates):
        raise PlanError(f"--choice {choice}: the plan has {len(answer.candidates)} files")
    return run_file(answer.candidates[choice - 1], outline.label)


def _facts(answer: Answer, machine: Machine, typed: list[Commands]) -> dict[str, object]:
    return {
        "machine": machine.title,
        "assumptions": list(machine.assumptions),
        "candidates": [
            {**c.as_dict(), "commands": vars(t)}
            for c, t in zip(answer.candidates, typed, strict=True)
        ],
        "remedies": list(answer.remedies),
    }
