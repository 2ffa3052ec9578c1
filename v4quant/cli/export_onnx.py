"""`v4quant export-onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.cli import _output
from v4quant.cli._options import overwrite_option
from v4quant.cli._types import SOURCE
from v4quant.sizes import human_bytes
from v4quant_formats.onnx.kernels import KERNELS

if TYPE_CHECKING:
    from v4quant import PlannedExport
    from v4quant.onnx_export.export import OnnxResult

_KERNELS = list(dict.fromkeys(k for kernels in KERNELS.values() for k in kernels))


@click.command(
    "export-onnx",
    epilog="Example: v4quant export-onnx DeepSeek-V4-Flash onnx --layers 0,3 --scheme int4-g32",
)
@click.argument("source", type=SOURCE)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scheme", required=True, help=f"How experts are coded: {', '.join(KERNELS)}.")
@click.option("--layers", default="", help="Like 0,3 or 0,mtp.0 (default: all of the trunk).")
@click.option("--kernel", help=f"What multiplies them: {', '.join(_KERNELS)} (default: by scheme).")
@click.option("--stats", "stats_file", type=click.Path(path_type=Path), help="From calibrate.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads (default: all cores).")
@overwrite_option("in OUT what is there")
@click.option("--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export_onnx(
    source: str,
    out: Path,
    scheme: str,
    layers: str,
    kernel: str | None,
    stats_file: Path | None,
    workers: int | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write expert layers of checkpoint SOURCE as ONNX graphs into folder OUT.

    For tools and edge runtimes, not for serving: each layer becomes a graph of its routed experts
    and a graph of the whole mixture (router and shared expert included), with the weights beside
    them; the indexer's scores are a graph of their own. The same command again resumes.
    """
    wanted = [text.strip() for text in layers.split(",")] if layers else []
    if dry_run:
        planned = v4quant.plan_export_onnx(
            source, out, scheme=scheme, layers=wanted, kernel=kernel, stats=stats_file
        )
        _show(planned, as_json)
        return
    result = v4quant.export_onnx(
        source,
        out,
        scheme=scheme,
        layers=wanted,
        kernel=kernel,
        stats=stats_file,
        workers=workers,
        overwrite=overwrite,
        progress=_output.TerminalProgress(),
    )
    if as_json:
        _output.emit(result)
    else:
        _output.data(_summary(result))


def _show(planned: PlannedExport, as_json: bool) -> None:
    if as_json:
        _output.emit(planned)
        return
    sizes = map(human_bytes, (planned.bytes_in, planned.bytes_out))
    rows = [
        ("output", planned.output),
        ("scheme", f"{planned.scheme} by {planned.kernel}"),
        ("layers", ", ".join(planned.layers)),
        ("bytes", " -> ".join(sizes)),
    ]
    _output.data(_output.table(rows))


def _summary(result: OnnxResult) -> str:
    rows = [
        ("output", result.output),
        ("scheme", f"{result.scheme} by {result.kernel}"),
        ("layers", ", ".join(result.layers)),
        ("bytes", f"{human_bytes(result.bytes_in)} -> "
                  f"{human_bytes(result.bytes_out)}"),
        ("experts", f"{result.exact_modules} matrices exact, {result.lossy_modules} lossy"),
        ("took", f"{result.seconds:.1f} s, peak memory "
                 f"{human_bytes(result.peak_rss_bytes)}"),
    ]  # fmt: skip
    if result.lossy_modules:
        loss = f"relative RMS {result.mean_relative_rms:.4f}, worst {result.worst_relative_rms:.4f}"
        rows.insert(5, ("weight error", loss))
    return _output.table(rows)
