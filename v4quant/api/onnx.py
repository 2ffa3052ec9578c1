"""export_onnx: expert layers as graphs, for tools and edge runtimes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from v4quant.api.arguments import PathLike, SourceLike, output_of, path_of, source_of
from v4quant.conversion.calibrated import read_stats
from v4quant.conversion.overwrite import replacing
from v4quant.onnx_export.export import OnnxResult
from v4quant.onnx_export.export import export_onnx as write_graphs
from v4quant.onnx_export.plan import OnnxPlan, make_onnx_plan
from v4quant.outputs import refuse_inputs
from v4quant.progress import default_progress
from v4quant.source import open_source
from v4quant_calibration.statistics.stats import Stats
from v4quant_kernels.progress import Progress


@dataclass(frozen=True)
class PlannedExport:
    """What an export would write: sizes in bytes."""

    source: str
    output: str
    scheme: str
    kernel: str
    layers: tuple[str, ...]
    files: tuple[str, ...]
    bytes_in: int
    bytes_out: int


def plan_export_onnx(
    source: SourceLike,
    out: PathLike,
    *,
    scheme: str,
    layers: Sequence[str | int] = (),
    kernel: str | None = None,
    stats: PathLike | None = None,
) -> PlannedExport:
    """What `export_onnx` would write, from headers alone. Raises what planning raises."""
    with _planned(source, scheme, layers, kernel, stats, True) as (plan, _):
        return PlannedExport(
            source=str(plan.checkpoint.path),
            output=str(out),
            scheme=plan.scheme,
            kernel=plan.kernel,
            layers=tuple(p.layer.stage for p in plan.layers),
            files=tuple(plan.files),
            bytes_in=sum(p.bytes_in for p in plan.layers),
            bytes_out=sum(p.bytes_out for p in plan.layers),
        )


def export_onnx(
    source: SourceLike,
    out: PathLike,
    *,
    scheme: str,
    layers: Sequence[str | int] = (),
    kernel: str | None = None,
    stats: PathLike | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> OnnxResult:
    """Write expert layers of `source` as ONNX graphs into folder `out`; again resumes.

    overwrite: put them in the place of an earlier result that v4quant made, once they are whole.
    layers: like 0 or "mtp.0" (default: all of the trunk). kernel: what multiplies the experts
    (default: by scheme). stats: what `calibrate` wrote. Raises what planning and writing raise.
    """
    with (
        _planned(source, scheme, layers, kernel, stats, False) as (plan, found),
        replacing(
            output_of(out),
            overwrite,
            [plan.checkpoint.path, path_of(stats)],
            request=(str(source), scheme, [str(n) for n in layers], kernel, str(stats)),
        ) as place,
    ):
        refuse_inputs((), [plan.checkpoint], (), [place])
        threads = workers or os.cpu_count() or 1
        done = write_graphs(plan, place, found, threads, default_progress(progress))
    return replace(done, output=str(out))


@contextmanager
def _planned(
    source: SourceLike,
    scheme: str,
    layers: Sequence[str | int],
    kernel: str | None,
    stats: PathLike | None,
    headers_only: bool,
) -> Iterator[tuple[OnnxPlan, Stats | None]]:
    with open_source(source_of(source), headers_only=headers_only) as checkpoint:
        found, digest = None, ""
        if (file := path_of(stats)) is not None:
            found, digest = read_stats(checkpoint, file)
        yield make_onnx_plan(checkpoint, scheme, [str(n) for n in layers], kernel, digest), found
