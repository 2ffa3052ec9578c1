"""An OnnxPlan being carried out, layer by layer, safe against being killed.

A layer is a data file and two graphs that refer into it: the routed experts alone, and the whole
layer. The data file is written first, expert by expert from several threads, under a temporary name
until it is whole. The layer's own graph comes last and carries the plan's digest and what the
conversion cost: where it stands, the layer is finished, and the same command goes on with the next.
The manifest is the last file of all. The same plan gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from v4quant import __version__
from v4quant.conversion.journal import begin_journal, begun_plan, locked_output, remove_work
from v4quant.conversion.records import TensorRecord
from v4quant.onnx_export.convert import write_dense, write_expert
from v4quant.onnx_export.plan import INDEXER, MANIFEST, LayerPlan, OnnxPlan
from v4quant.own_folders import FOLDER
from v4quant.sizes import human_bytes
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.errors import OutputError
from v4quant_formats.file_hash import hash_file
from v4quant_formats.json_object import read_json_object
from v4quant_formats.manifest import to_json
from v4quant_formats.model_config import ConfigError
from v4quant_formats.onnx.check import OnnxError, read_model
from v4quant_formats.onnx.indexer import indexer_model
from v4quant_formats.onnx.moe import experts_model, moe_model
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shards import (
    ShardWriter,
    WrittenFile,
    leftovers,
    output_error,
    plan_shard,
    remove_leftovers,
    write_file_atomically,
)
from v4quant_formats.system import peak_rss_bytes, real_path
from v4quant_kernels.progress import Progress, SilentProgress

_LAYER_FACTS = "v4quant.layer"
_DIGEST = "v4quant.plan"


@dataclass(frozen=True)
class LayerReport:
    """What a finished layer is: its data file, and what its experts' conversion cost."""

    stage: str
    data: WrittenFile
    exact: int
    lossy: int
    altered: int
    worst_relative_rms: float
    sum_relative_rms: float


@dataclass(frozen=True)
class OnnxResult:
    """What `export-onnx` reports (`--json`). Modules are expert matrices; all else is exact."""

    output: str
    scheme: str
    kernel: str
    layers: list[str]
    files: list[str]
    bytes_in: int
    bytes_out: int
    exact_modules: int
    lossy_modules: int
    altered_elements: int
    worst_relative_rms: float
    mean_relative_rms: float
    seconds: float
    peak_rss_bytes: int


def export_onnx(
    plan: OnnxPlan,
    out: Path,
    stats: Stats | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> OnnxResult:
    """Carry a plan out into folder `out`; the same call again resumes or confirms.

    Raises OutputError (not empty, locked, full, not writable) and what reading the source raises.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    _check_folder(plan, out)
    # Again, now that nobody else can change it.
    with locked_output(out, look=lambda: _check_folder(plan, out)):
        begin_journal(out, plan.digest, plan.files)
        remove_leftovers(out, plan.files)
        reports = {p.layer.stage: _finished(plan, p, out) for p in plan.layers}
        todo = [p for p in plan.layers if reports[p.layer.stage] is None]
        _check_space(out, sum(p.bytes_out for p in todo))
        progress.start("Exporting", sum(p.bytes_in for p in todo), "B")
        for part in todo:
            reports[part.layer.stage] = _write_layer(plan, part, out, stats, workers, progress)
        progress.finish()
        layers = [r for r in reports.values() if r is not None]
        _finish(plan, out, layers)
        remove_work(out)
    return _result(plan, out, layers, started)


def _check_folder(plan: OnnxPlan, out: Path) -> None:
    """Create the folder, or see that it is empty or holds what this export made.

    A name tells nothing: what a folder without this export's journal or manifest holds is a user's.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(out, error) from None
    begun = begun_plan(out)
    ours = _is_made(plan, out) if begun is None else begun == plan.digest
    known = {FOLDER}
    if ours:
        known |= {*plan.files, *(path.name for path in leftovers(out, plan.files))}
    foreign = sorted(p.name for p in out.iterdir() if p.name not in known)
    if foreign or (begun is not None and not ours):
        what = f"'{foreign[0]}'" if foreign else "another export"
        raise OutputError(
            f"{out}: holds {what}, which this export did not make; choose a new folder, the "
            "same source, scheme and layers to resume, or --overwrite to replace what v4quant made"
        )


def _is_made(plan: OnnxPlan, out: Path) -> bool:
    """Whether a finished manifest is there and states this plan."""
    with suppress(ConfigError):
        return bool(read_json_object(out / MANIFEST).get("plan") == plan.digest)
    return False


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OutputError(
            f"{out}: needs {human_bytes(needed)}, but only {human_bytes(free)} are free on this "
            "disk; free space, export fewer layers or choose another folder"
        )


def _finished(plan: OnnxPlan, part: LayerPlan, out: Path) -> LayerReport | None:
    """The report of a layer that an earlier run finished, or None. Raises OutputError."""
    path = out / part.graphs[1]
    if not path.exists():
        return None
    try:
        facts = {p.key: p.value for p in read_model(path).metadata_props}
        if facts.get(_DIGEST) != plan.digest:
            raise OutputError(
                f"{path}: belongs to another source, scheme, choice of layers or version; choose "
                "another folder or delete this one"
            )
        table = json.loads(facts[_LAYER_FACTS])
        report = LayerReport(**{**table, "data": WrittenFile(**table["data"])})
        size = (out / part.data_file).stat().st_size
    except (OnnxError, OSError, KeyError, TypeError, ValueError):
        return None  # damaged: made again
    # The file was perhaps written by a process whose machine lost power.
    whole = size == report.data.nbytes and (out / part.graphs[0]).exists()
    try:
        return report if whole and hash_file(out / part.data_file) == report.data.sha256 else None
    except OSError as error:
        raise OutputError(f"{out / part.data_file}: cannot be read ({error.strerror})") from None


def _write_layer(
    plan: OnnxPlan,
    part: LayerPlan,
    out: Path,
    stats: Stats | None,
    workers: int,
    progress: Progress,
) -> LayerReport:
    writer = ShardWriter(out / part.data_file, plan_shard(part.outputs))
    try:
        records = _write_data(plan, part, writer, stats, workers, progress)
    except BaseException:
        writer.abort()
        raise
    data = writer.close()
    losses = [r.relative_rms for r in records if not r.exact]
    report = LayerReport(
        part.layer.stage,
        data,
        sum(r.exact for r in records),
        len(losses),
        sum(r.altered for r in records),
        max(losses, default=0.0),
        sum(losses),
    )
    stored = read_header(out / part.data_file)
    facts = _facts(plan)
    write_file_atomically(out / part.graphs[0], experts_model(part.layer, stored, facts))
    facts |= {_LAYER_FACTS: json.dumps(asdict(report))}
    write_file_atomically(out / part.graphs[1], moe_model(part.layer, stored, facts))
    return report


def _facts(plan: OnnxPlan) -> dict[str, str]:
    return {
        "v4quant.version": __version__,
        "v4quant.scheme": plan.scheme,
        "v4quant.kernel": plan.kernel,
        _DIGEST: plan.digest,
    }


def _write_data(
    plan: OnnxPlan,
    part: LayerPlan,
    writer: ShardWriter,
    stats: Stats | None,
    workers: int,
    progress: Progress,
) -> list[TensorRecord]:
    block = part.layer.block
    for dense in part.dense:
        write_dense(plan.checkpoint, dense, block.experts, writer)
        progress.advance(dense.source.nbytes)
    pool = ThreadPoolExecutor(workers, "export", initializer=_one_thread)
    futures: list[Future[list[TensorRecord]]] = []
    try:
        for number, sources in enumerate(part.experts):
            futures.append(
                pool.submit(
                    write_expert, plan.checkpoint, number, sources, block.scheme, stats, writer
                )
            )
        records: list[TensorRecord] = []
        for sources, future in zip(part.experts, futures, strict=True):
            records += future.result()
            progress.advance(sum(s.nbytes for s in sources))
        return records
    finally:
        # Nothing may still write when the caller removes the file.
        pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _finish(plan: OnnxPlan, out: Path, layers: list[LayerReport]) -> None:
    """Write the indexer's graph and, last, the manifest."""
    config = plan.config
    indexer = indexer_model(config.index_n_heads, config.index_head_dim, _facts(plan))
    files = [write_file_atomically(out / INDEXER, indexer)]
    for part, report in zip(plan.layers, layers, strict=True):
        files += [report.data, *(_written(out / name) for name in part.graphs)]
    write_file_atomically(out / MANIFEST, to_json(_manifest(plan, files, layers)))


def _written(path: Path) -> WrittenFile:
    return WrittenFile(path.name, path.stat().st_size, hash_file(path))


def _manifest(
    plan: OnnxPlan, files: list[WrittenFile], layers: list[LayerReport]
) -> dict[str, Any]:
    rows: Iterator[dict[str, Any]] = (asdict(report) for report in layers)
    return {
        "manifest_version": 1,
        "tool": {"v4quant": __version__, "torch": torch.__version__},
        "source": {
            "name": real_path(plan.checkpoint.path).name,
            "digest": plan.checkpoint.digest(),
        },
        "scheme": plan.scheme,
        "kernel": plan.kernel,
        "stats": plan.stats_digest or None,
        "plan": plan.digest,
        "files": [{"name": f.name, "bytes": f.nbytes, "sha256": f.sha256} for f in files],
        "layers": [{k: v for k, v in row.items() if k != "data"} for row in rows],
    }


def _result(plan: OnnxPlan, out: Path, layers: list[LayerReport], started: float) -> OnnxResult:
    lossy = sum(r.lossy for r in layers)
    return OnnxResult(
        output=os.fspath(out),
        scheme=plan.scheme,
        kernel=plan.kernel,
        layers=[r.stage for r in layers],
        files=list(plan.files),
        bytes_in=sum(p.bytes_in for p in plan.layers),
        bytes_out=sum((out / name).stat().st_size for name in plan.files),
        exact_modules=sum(r.exact for r in layers),
        lossy_modules=lossy,
        altered_elements=sum(r.altered for r in layers),
        worst_relative_rms=max((r.worst_relative_rms for r in layers), default=0.0),
        mean_relative_rms=sum(r.sum_relative_rms for r in layers) / lossy if lossy else 0.0,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )
