"""`v4quant diff`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.cli import _exit, _output
from v4quant.cli._types import SOURCE

if TYPE_CHECKING:
    from v4quant import DiffResult

_SHOWN = 40


@click.command(epilog="Example: v4quant diff DeepSeek-V4-Flash somebodys-int4 --samples 8")
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@click.option("--full", is_flag=True, help="Compare every value, not samples.")
@click.option(
    "--samples",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Experts of about 64 that are looked at in each stage.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, full: bool, samples: int, as_json: bool) -> None:
    """Compare checkpoints A and B as numbers, whatever their formats. Exit code 3: they differ.

    Tells re-encodings that keep every value from re-gridded weights (with their error), and names
    missing modules, misread block sizes, nibbles in the wrong order and exchanged projections.
    """
    result = v4quant.diff(a, b, full=full, samples=samples, progress=_output.TerminalProgress())
    if as_json:
        _output.emit({**asdict(result), "same": result.same})
    else:
        _output.data(_as_text(result))
    if not result.same:
        ctx.exit(_exit.DIFFERENT)


def _as_text(result: DiffResult) -> str:
    lines = []
    for d in result.differences[:_SHOWN]:
        error = f", relative error {d.relative_error:.4f}" if d.relative_error else ""
        detail = f": {d.detail}" if d.detail else ""
        lines.append(f"{d.module}: {d.verdict} ({d.a} -> {d.b}{error}){detail}")
    if len(result.differences) > _SHOWN:
        lines.append(f"... and {len(result.differences) - _SHOWN:,} more (--json lists them)")
    lines += result.defects[:_SHOWN]
    counts = ", ".join(f"{n:,} {verdict}" for verdict, n in sorted(result.verdicts.items()))
    lines.append(f"{result.compared:,} modules compared, {result.skipped:,} by headers only")
    lines.append(counts or "nothing in common")
    return "\n".join(lines)
