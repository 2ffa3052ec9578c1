"""`v4quant plan`."""

from __future__ import annotations

from pathlib import Path

import click

import v4quant
from v4quant.cli import _output
from v4quant.cli._options import overwrite_option
from v4quant.cli._types import SOURCE, Choice, FiniteRange
from v4quant.planner.choices import DEFAULT_EFFORT, EFFORTS, ENGINE_NAMES, Effort, EngineName
from v4quant.shell import SHELLS, Shell, command_line
from v4quant_formats.engines.engine import GPUS


@click.command(epilog="Example: v4quant plan flash --machine 2x3090 --ram 128GB")
@click.argument("source", type=SOURCE)
@click.option("--machine", help="A machine by name, like 2x3090, rtx-pro-6000, dgx-spark, "
              "m3-ultra-512 or 8xh100; auto looks at this one (the default).")  # fmt: skip
@click.option("--cards", help="The same by number and size or name: 2x24GB, 4x3090; none for a "
              "processor alone. Sizes as sold.")  # fmt: skip
@click.option("--ram", help="System memory, as sold, like 128GB.")
@click.option("--ram-bandwidth", type=FiniteRange(1), help="Its bandwidth in GB/s (default: "
              "60 for a desktop, 300 for a server).")  # fmt: skip
@click.option("--gpu", type=Choice(list(GPUS)), help="Generation of the cards, where their "
              "size says too little.")  # fmt: skip
@click.option("--engine", "engines", type=Choice(ENGINE_NAMES), multiple=True,
              help="Consider only this engine; may be repeated.")  # fmt: skip
@click.option("--context", type=click.IntRange(1, 2**24), default=32768, show_default=True,
              help="Tokens of one sequence that must fit.")  # fmt: skip
@click.option("--effort", type=Choice(EFFORTS), default=DEFAULT_EFFORT, show_default=True,
              help="How long choosing the codes may take.")  # fmt: skip
@click.option("--cores", type=click.IntRange(1, 4096), help="Cores of the machine that converts "
              "(default: this one's).")  # fmt: skip
@click.option("--measured", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              multiple=True, help="What `evaluate --json` said of conversions of this model; may "
              "be repeated.")  # fmt: skip
@click.option("--write", "run_path", type=click.Path(path_type=Path), help="Write a run file for "
              "`v4quant run` that makes the choice.")  # fmt: skip
@click.option("--choice", type=click.IntRange(1), default=1, show_default=True,
              help="Number of the file that --write is for.")  # fmt: skip
@click.option("--shell", type=Choice(SHELLS), help="Shell that the commands are quoted for "
              "(default: this system's).")  # fmt: skip
@overwrite_option("a run file")
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
    shell: Shell | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show which conversions of SOURCE a machine can serve, and how to make and serve them.

    SOURCE is a folder, hf://owner/name, or a release by name: flash, pro, flash-base, pro-base,
    flash-dspark, pro-dspark, vision or v41, whose inventories are built in. Only headers are
    read, and only what --write asks for is written.
    """
    found = v4quant.plan(
        source,
        machine=machine,
        cards=cards,
        ram=ram,
        ram_bandwidth=ram_bandwidth,
        gpu=gpu,
        engines=engines,
        context=context,
        effort=effort,
        cores=cores,
        measured=measured,
        write=run_path,
        choice=choice,
        shell=shell,
        overwrite=overwrite,
    )
    if run_path is not None:
        _output.note(f"run file in {run_path}: {command_line(['v4quant', 'run', str(run_path)])}")
    if as_json:
        _output.emit(found.as_dict())
    else:
        from v4quant.planner.text import answer_text  # torch, which --help can wait for

        _output.data(answer_text(found.answer, found.machine, list(found.commands), context))
