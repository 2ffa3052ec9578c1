"""`v4quant bench`."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from v4quant.bench.choices import BENCHED, SOLVER_WIDTHS, WIDTHS
from v4quant.bench.threads import SETTINGS, Run, ThreadTiming, bench_threads
from v4quant.cli import _output
from v4quant.cli._types import Choice, FiniteRange
from v4quant.cli.bench_kernels import gpu, indexer, moe
from v4quant.sizes import human_bytes

if TYPE_CHECKING:
    from v4quant.bench.convert import ConvertBench

SCHEMES = ("mxfp4", "nvfp4", "mxfp8", "fp8", "int8-g32", "int4-g32", "int4-g128")


@click.group(epilog="Example: v4quant bench convert --experts 64")
def bench() -> None:
    """Measure speed against the floor of the same machine in the same run."""


@bench.command(epilog="Example: v4quant bench convert --dir /fast-disk --json")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to work (default: a temporary folder); needs about 4 times the layer.",
)
@click.option(
    "--width",
    type=Choice(WIDTHS),
    default="flash",
    show_default=True,
    help="Whose layer widths.",
)
@click.option("--experts", type=click.IntRange(1, 4096), help="Fewer experts: a quicker run.")
@click.option("--scheme", "schemes", multiple=True, help="Only these schemes (repeatable).")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads (default: all cores).")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True,
              help="Times each scheme is measured; medians are reported.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(
    folder: Path | None,
    width: str,
    experts: int | None,
    schemes: tuple[str, ...],
    workers: int | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Convert a synthetic full-width layer to each scheme and compare with a plain file copy."""
    from v4quant.bench.convert import bench_convert  # torch, which --help can wait for
    from v4quant.temporary_folders import TemporaryFolder

    chosen = schemes or SCHEMES
    with TemporaryFolder(folder) as work:
        result = bench_convert(
            work,
            width,
            experts,
            chosen,
            workers or os.cpu_count() or 1,
            rounds,
            _output.TerminalProgress(),
        )
    if as_json:
        _output.emit(result)
    else:
        _output.data(_as_text(result))


def _as_text(result: ConvertBench) -> str:
    rows = [
        (
            t.scheme,
            f"{t.seconds:.1f}",
            f"{t.bytes_in_per_second / 1e6:.0f}",
            f"{t.ratio_in:.2f}",
            f"{t.ratio_moved:.2f}",
            human_bytes(t.peak_rss_bytes),
            f"{t.release_minutes:.0f}",
        )
        for t in result.timings
    ]
    header = ("scheme", "s", "MB/s in", "of copy, in", "of copy, moved", "peak memory",
              f"{result.width} min")  # fmt: skip
    copy = (
        f"copy of {human_bytes(result.bytes)} ({result.experts or 'all'} experts): "
        f"{result.copy_seconds:.1f} s ({result.fastest_copy:.1f} to {result.slowest_copy:.1f}), "
        f"{result.copy_bytes_per_second / 1e6:.0f} MB/s; "
        f"{result.workers} workers, {result.rounds} rounds"
    )
    if not result.steady:
        copy += "\nThe copies took very different times, so the ratios are rough."
    return copy + "\n\n" + _output.table(rows, header)


@bench.command(epilog="Example: v4quant bench solver --scheme int3-g128 --json")
@click.option(
    "--width",
    type=Choice(list(SOLVER_WIDTHS)),
    default="flash",
    show_default=True,
    help="Whose expert.",
)
@click.option("--scheme", default="int4-g128", show_default=True, help="What to solve for.")
@click.option(
    "--solver",
    "solvers",
    type=Choice(BENCHED),
    multiple=True,
    help="Only these solvers (repeatable).",
)
@click.option("--rows", type=click.IntRange(1), default=4096, show_default=True,
              help="Input rows the moments are formed from.")  # fmt: skip
@click.option("--device", type=Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where to solve.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def solver(
    width: str,
    scheme: str,
    solvers: tuple[str, ...],
    rows: int,
    device: str,
    as_json: bool,
) -> None:
    """Time and peak memory of each solver for one expert, extrapolated to layer and model."""
    from v4quant.bench.solver import bench_solvers  # torch, which --help can wait for

    chosen = solvers or BENCHED
    found = bench_solvers(width, scheme, chosen, rows, device, _output.TerminalProgress())
    if as_json:
        _output.emit({"width": width, "scheme": scheme, "rows": rows,
                      "solvers": [vars(t) for t in found]})  # fmt: skip
        return
    table = [
        (
            t.solver,
            str(t.batch),
            f"{t.seconds:.2f}",
            f"{t.moments_seconds:.2f}",
            human_bytes(t.peak_bytes),
            f"{t.layer_hours:.2f}",
            f"{t.model_hours:.1f}",
        )
        for t in found
    ]
    header = (
        "solver",
        "at once",
        "s per expert",
        "moments s",
        "peak memory",
        "h per layer",
        "h per model",
    )
    _output.data(_output.table(table, header))


@bench.command(epilog="Example: v4quant bench threads --rounds 5")
@click.option("--tokens", type=click.IntRange(1), default=2048, show_default=True,
              help="Tokens of the pass.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True,
              help="Runs of each setting, quiet and busy.")  # fmt: skip
@click.option("--limit", type=FiniteRange(1), default=120, show_default=True,
              help="Seconds after which a run is stopped.")  # fmt: skip
@click.option("--setting", "settings", type=Choice(list(SETTINGS)), multiple=True,
              help="Only this (repeatable).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def threads(
    tokens: int, rounds: int, limit: float, settings: tuple[str, ...], as_json: bool
) -> None:
    """Time a forward pass alone and beside two busy processes per core, by how threads wait."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    chosen = settings or tuple(SETTINGS)
    found = bench_threads(tokens, rounds, limit, chosen, _output.TerminalProgress())
    if as_json:
        timings = [asdict(t) | {"worst_ratio": t.worst_ratio} for t in found]
        facts = {"tokens": tokens, "cores": os.cpu_count(), "load_before": load}
        _output.emit(facts | {"settings": timings})
    else:
        if load > 0.5:
            _output.note(f"The machine had a load of {load:.1f} before: 'quiet' was not quiet.")
        _output.data(threads_text(found))


def threads_text(found: Sequence[ThreadTiming]) -> str:
    """A row per setting: medians, and the busy run that took longest."""

    def median(runs: Sequence[Run], name: str) -> str:
        return f"{statistics.median(getattr(run, name) for run in runs):.1f}"

    rows = []
    for timing in found:
        over = "" if all(run.finished for run in timing.busy) else "over "
        rows.append((
            timing.setting,
            *(median(timing.quiet, name) for name in ("wall", "core")),
            *(median(timing.busy, name) for name in ("wall", "core")),
            f"{over}{max(run.wall for run in timing.busy):.1f}",
            f"{over}{timing.worst_ratio:.1f}",
        ))  # fmt: skip
    header = ("threads", "quiet s", "core s", "busy s", "core s", "longest s", "of quiet")
    return _output.table(rows, header)


bench.add_command(gpu)
bench.add_command(moe)
bench.add_command(indexer)
