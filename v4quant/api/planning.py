"""plan: which conversions a machine can serve."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant.api.arguments import PathLike, SourceLike, output_of, source_of
from v4quant.builtin import PREFIX
from v4quant.existing import refuse_existing, signed
from v4quant.existing import run_file as existing_run_file
from v4quant.hub.refs import is_hub
from v4quant.planner.candidates import PlanError, Request
from v4quant.planner.choices import DEFAULT_EFFORT, ENGINE_NAMES, Effort, EngineName
from v4quant.planner.choose import Answer, choose
from v4quant.planner.commands import Commands, commands_for
from v4quant.planner.detect import this_machine
from v4quant.planner.footprint import (
    HUB_NAMES,
    Outline,
    outline_checkpoint,
    outline_release,
    release_named,
)
from v4quant.planner.loss import read_measured
from v4quant.planner.machines import (
    Machine,
    parse_cards,
    parse_machine,
    with_generation,
    with_memory,
)
from v4quant.planner.run_file import run_file
from v4quant.shell import Shell, own_shell
from v4quant.source import open_source
from v4quant_formats.errors import FormatError
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.small_files import read_small
from v4quant_kernels.errors import OptionError
from v4quant_kernels.near_names import did_you_mean

_LOGGER = logging.getLogger(__name__)
_MEMORY = "8GB"


@dataclass(frozen=True)
class PlanResult:
    """answer: the files that fit, best first, and what would where none does. commands: how to
    make, check and serve each."""

    machine: Machine
    answer: Answer
    commands: tuple[Commands, ...]

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "machine": self.machine.title,
            "assumptions": list(self.machine.assumptions),
            "candidates": [
                {**candidate.as_dict(), "commands": vars(typed)}
                for candidate, typed in zip(self.answer.candidates, self.commands, strict=True)
            ],
            "remedies": list(self.answer.remedies),
        }


def plan(
    source: SourceLike,
    *,
    machine: str | None = None,
    cards: str | None = None,
    ram: str | None = None,
    ram_bandwidth: float | None = None,
    gpu: str | None = None,
    engines: Sequence[EngineName] = (),
    context: int = 32768,
    effort: Effort = DEFAULT_EFFORT,
    cores: int | None = None,
    measured: Sequence[PathLike] = (),
    write: PathLike | None = None,
    choice: int = 1,
    shell: Shell | None = None,
    overwrite: bool = False,
) -> PlanResult:
    """The conversions of `source` that a machine can serve, from headers alone.

    source: a checkpoint, or a release by name ("flash", "pro", "v41", ...). machine: by name, or
    cards and ram by size; this machine without either. context: tokens of one sequence that must
    fit. cores: of the machine that converts. measured: what `evaluate` wrote of conversions of this
    model. write: a run file to write, for the candidate number `choice`.
    shell: that the commands are for; None: this system's, but `sh` for a Mac or a DGX Spark.
    overwrite: it may replace one that `plan` wrote and nobody changed.

    Raises PlanError for machines and choices that do not exist, and what opening the source raises.
    """
    if machine is not None and cards is not None:
        raise OptionError("give one of --machine and --cards")
    asked = _machine(machine, cards, ram, ram_bandwidth, gpu)
    outline = _outline(source)
    rows = tuple(row for path in measured for row in read_measured(Path(path)))
    request = Request(
        asked, context, effort, cores or os.cpu_count() or 1, tuple(engines) or ENGINE_NAMES, rows
    )
    answer = choose(outline, request)
    if write is not None:
        if not 1 <= choice <= len(answer.candidates):
            raise PlanError(f"--choice {choice}: the plan has {len(answer.candidates)} files")
        _write(output_of(write), run_file(answer.candidates[choice - 1], outline.label), overwrite)
    reader = shell or _shell_of(asked)
    commands = (
        commands_for(c, asked, outline.label, _MEMORY, outline.name, reader)
        for c in answer.candidates
    )
    return PlanResult(asked, answer, tuple(commands))


def _write(path: Path, text: str, overwrite: bool) -> None:
    """Write a run file, or find that the same request wrote it before. Raises OutputError."""
    data = signed(text, ".toml").encode()
    with suppress(FormatError):
        if read_small(path, len(data)) == data:
            _LOGGER.info("%s: done already, by the same request", path)
            return
    refuse_existing([existing_run_file(path)], overwrite)
    write_file_atomically(path, data)


def _shell_of(machine: Machine) -> Shell:
    """The shell of a machine: `sh` where its kind runs no Windows, else this system's."""
    return "sh" if machine.unified in ("metal", "cuda") else own_shell()


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


def _outline(source: SourceLike) -> Outline:
    text = str(source)
    name = release_named(text)
    if name is not None and not Path(text).exists():
        return outline_release(name)
    is_word = "/" not in text and not text.startswith(PREFIX)
    if is_word and not is_hub(text) and not Path(text).exists():
        repos = (repo.rpartition("/")[2] for repo in HUB_NAMES.values())
        meant = did_you_mean(text, (*HUB_NAMES, *repos))
        raise PlanError(
            f"'{text}' is neither a folder nor a release; {meant}releases are "
            f"{', '.join(HUB_NAMES)}"
        )
    with open_source(source_of(source), headers_only=True) as checkpoint:
        return outline_checkpoint(checkpoint)
