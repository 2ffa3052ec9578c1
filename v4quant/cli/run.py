"""`v4quant run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.cli import _exit, _output
from v4quant.cli._options import overwrite_option, threads_option
from v4quant.cli._types import RUN_FILE, Choice
from v4quant.cli.calibrate import coverage_text
from v4quant.cli.evaluate import finding_lines
from v4quant.cli.quantize import summary
from v4quant.planner.choices import EFFORTS, Effort
from v4quant.sizes import human_bytes

if TYPE_CHECKING:
    from v4quant import Evaluation, JobResult, RunResult
    from v4quant.evaluation.result import Distance, ModelFacts
    from v4quant_calibration.statistics.stats import Stats


@click.command(epilog="Example: v4quant run demo    (or: v4quant run my-run.toml --out converted)")
@click.argument("recipe", type=RUN_FILE)
@click.option("--model", type=Choice(["v4", "v41"]), default="v4", show_default=True,
              help="The built-in model that `demo` is run on.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder for all results.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads of the conversion (default: "
              "all cores).")  # fmt: skip
@threads_option
@click.option("--device", default="cpu", show_default=True, help="Where experts are recoded, "
              "passes run and solvers work: cpu, cuda, cuda:0, ...")  # fmt: skip
@click.option("--max-memory", help="Cap on every step's memory, like 6GB.")
@click.option("--disk-cap", help="Disk for shards coming from or going to the hub.")
@click.option("--effort", type=Choice(EFFORTS), help="Choose solver and text by how long "
              "they may take, instead of what the file says.")  # fmt: skip
@overwrite_option("solutions and conversions of something else")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def run(
    ctx: click.Context,
    recipe: str,
    model: str,
    out: Path | None,
    workers: int | None,
    device: str,
    threads: int | None,
    max_memory: str | None,
    disk_cap: str | None,
    effort: Effort | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Calibrate, quantize, verify and evaluate as RECIPE (a TOML file, or `demo`) says.

    Results go to --out: the checkpoint in `checkpoint/`, statistics, evaluation and report beside
    it. Several [[quantize]] tables make a ladder: one calibration, one evaluation, and a folder (or
    a repository) of each conversion's name. Running the same command again resumes, and repeats
    nothing that is done but verification.
    """
    if dry_run:
        planned = v4quant.plan_run(recipe, model=model, effort=effort, workers=workers)
        _output.emit(planned) if as_json else _output.data("\n".join(planned.steps))
        return
    result = v4quant.run(
        recipe,
        model=model,
        out=out,
        workers=workers,
        device=device,
        threads=threads,
        max_memory=max_memory,
        disk_cap=disk_cap,
        effort=effort,
        overwrite=overwrite,
        progress=_output.TerminalProgress(),
        watcher=_Narrator(),
    )
    if as_json:
        _output.emit(result.as_dict())
    else:
        _output.data("")
        _output.data(_closing_table(result))
    if not result.ok:
        ctx.exit(_exit.DIFFERENT)


class _Narrator:
    """Tells the steps of a run on stderr."""

    def step(self, title: str) -> None:
        _output.heading(title)

    def note(self, text: str) -> None:
        _output.note(text)

    def calibrated(self, stats: Stats) -> None:
        _output.note(coverage_text(stats))

    def converted(self, job: JobResult) -> None:
        _output.note(summary(job))


def _ladder_table(done: RunResult) -> str:
    """A row for each conversion of a ladder."""
    found = done.evaluation
    parts = (None,) * len(done.ladder) if found is None else (found, *found.others)
    rows = []
    for one, part in zip(done.ladder, parts, strict=True):
        kl = top1 = grade = ""
        if part is not None and part.distance is not None and part.verdict is not None:
            kl, grade = f"{part.distance.kl_mean:.2e}", part.verdict.grade
            top1 = f"{100 * part.distance.top1_agreement:.2f} %"
        size = human_bytes(one.conversion.bytes_out)
        rows.append((one.name, size, kl, top1, grade, one.checkpoint))
    return _output.table(rows, ("name", "size", "mean KL", "top-1", "verdict", "where"))


def _quality_rows(
    found: Evaluation, reference: ModelFacts, moved: Distance, floor: Distance
) -> list[tuple[str, str, str]]:
    """The source beside the first conversion."""
    before = found.reference_perplexity
    bits = [f"{one.expert_bits_per_weight or 0:.3f}" for one in (reference, found.candidate)]
    return [
        ("expert weights", reference.scheme, found.candidate.scheme),
        ("bits per expert weight", bits[0], bits[1]),
        ("perplexity", "" if before is None else f"{before.value:.3f}",
         f"{found.perplexity.value:.3f}"),
        ("mean KL, nats", f"floor {floor.kl_mean:.1e}", f"{moved.kl_mean:.1e}"),
        ("top-1 agreement", f"floor {100 * floor.top1_agreement:.2f} %",
         f"{100 * moved.top1_agreement:.2f} %"),
    ]  # fmt: skip


def _closing_table(done: RunResult) -> str:
    job, found = done.conversion, done.evaluation
    rows = [("", "before", "after")]
    rows.append(("size", human_bytes(job.bytes_in), human_bytes(job.bytes_out)))
    if found is not None and (found.distance and found.floor and found.reference):
        rows += _quality_rows(found, found.reference, found.distance, found.floor)
    lines = [_output.table(rows[1:], rows[0]), ""]
    if done.ladder:
        lines = [_ladder_table(done), ""]
    if found is not None:
        lines += [found.verdict.text] if found.verdict is not None else []
        lines += finding_lines(found)
        lines.append(f"report:      {Path(done.folder) / 'report.html'}")
    lines.append(f"checkpoint:  {done.checkpoint}")
    lines.append(f"serve with:  {done.serve}")
    lines.append(f"took {done.seconds:.0f} s")
    return "\n".join(lines)
