"""`v4quant quantize`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.cli import _output
from v4quant.cli._options import overwrite_option
from v4quant.cli._types import ADAPTER, FORMAT, OUT, SCHEME, SOURCE, Choice
from v4quant.sizes import human_bytes
from v4quant_calibration.defaults import SOLVER_NAMES
from v4quant_formats.layouts.choices import ENGINE_CHOICES, LAYOUT_NAMES, WRITABLE

if TYPE_CHECKING:
    from v4quant import JobResult, PlannedConversion


@click.command(
    epilog="Example: v4quant quantize DeepSeek-V4-Flash out --scheme int4-g32 --stats stats.v4q"
)
@click.argument("source", type=SOURCE)
@click.argument("out", type=OUT)
@click.option("--scheme", type=SCHEME, help=f"How experts are coded: {', '.join(WRITABLE)}.")
@click.option(
    "--format",
    "format_",
    type=FORMAT,
    help=f"Container: {', '.join(LAYOUT_NAMES)} (default by scheme).",
)
@click.option(
    "--engine",
    type=Choice(ENGINE_CHOICES),
    help="Write what this engine wants where engines differ (default neutral: what most load).",
)
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="Recipe TOML file.")
@click.option(
    "--stats",
    "stats_file",
    type=click.Path(path_type=Path),
    help="What calibrate wrote: a file of statistics, or a solution's folder.",
)
@click.option(
    "--adapter",
    type=ADAPTER,
    help="Folder or repository of a LoRA adapter (PEFT's layout), merged while converting.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A tokenizer.json, or its folder, that goes with OUT in place of SOURCE's own.",
)
@click.option(
    "--solver",
    type=Choice(SOLVER_NAMES),
    help="How integer codes are found: largest magnitude, best scales (the default), or by GPTQ "
    "in the solution given with --stats.",
)
@click.option("--draft", type=Choice(["convert", "drop"]), help="MTP / DSpark stages.")
@click.option(
    "--on-inexact",
    type=Choice(["nearest", "keep", "refuse"]),
    help="When a cast cannot hold every value: take the nearest and count, keep the stage as it "
    "is, or stop.",
)
@click.option("--dense", help="How dense matrices are coded, for gguf (default bf16, exact).")
@click.option(
    "--engram", help="How V4.1's Engram tables are coded, for gguf (default bf16, exact)."
)
@click.option("--split-size", help="Largest file, like 45GB, for gguf (default 45GB).")
@click.option(
    "--unknown",
    type=Choice(["refuse", "copy"]),
    help="Tensors that no V4 release has.",
)
@click.option("--workers", type=click.IntRange(1, 256), help="Threads (default: all cores).")
@click.option("--max-memory", help="Cap on memory, like 6GB; fewer workers are used to fit it.")
@click.option(
    "--device", default="cpu", show_default=True, help="Where experts are computed: cpu or cuda."
)
@click.option(
    "--disk-cap",
    help="Disk for shards coming from or going to the hub (default: three of each side).",
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    help="Folder for such shards (default: inside OUT, or ./v4quant-OWNER--NAME for a hub OUT).",
)
@click.option("--public", is_flag=True, help="Create a hub OUT public (default: private).")
@overwrite_option("in OUT what is there")
@click.option("--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quantize(
    source: str,
    out: str,
    scheme: str | None,
    format_: str | None,
    engine: str | None,
    recipe_file: Path | None,
    stats_file: Path | None,
    adapter: str | None,
    tokenizer: Path | None,
    solver: str | None,
    draft: str | None,
    on_inexact: str | None,
    dense: str | None,
    engram: str | None,
    split_size: str | None,
    unknown: str | None,
    workers: int | None,
    max_memory: str | None,
    device: str,
    disk_cap: str | None,
    scratch: Path | None,
    public: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert checkpoint SOURCE into folder OUT. The same command again resumes.

    Either may be a repository on the hub, hf://owner/name: source shards are then fetched ahead of
    the work and deleted after it, output shards sent as they are finished and deleted here.

    Several processes, also on several machines with a shared disk, share the work when started by
    `torchrun --nproc-per-node N -m v4quant quantize ...`; the bytes are the same.
    """
    recipe = v4quant.make_recipe(
        scheme=scheme, format=format_, engine=engine, recipe=recipe_file, stats=stats_file,
        solver=solver, draft=draft, on_inexact=on_inexact, unknown=unknown, dense=dense,
        engram=engram,
        split_size=split_size,
    )  # fmt: skip
    if dry_run:
        planned = v4quant.plan_quantize(
            source, out, recipe=recipe, stats=stats_file, adapter=adapter, tokenizer=tokenizer,
            workers=workers, max_memory=max_memory,
        )  # fmt: skip
        _show(planned, as_json)
        return
    result = v4quant.quantize(
        source,
        out,
        recipe=recipe,
        stats=stats_file,
        adapter=adapter,
        tokenizer=tokenizer,
        workers=workers,
        max_memory=max_memory,
        device=device,
        disk_cap=disk_cap,
        scratch=scratch,
        public=public,
        overwrite=overwrite,
        progress=_output.TerminalProgress(),
    )
    if int(os.environ.get("RANK", "0")):
        return  # torchrun: the first rank speaks for all
    if as_json:
        _output.emit(result)
    else:
        _output.data(summary(result))


def _show(planned: PlannedConversion, as_json: bool) -> None:
    if as_json:
        _output.emit(planned)
        return
    shown = {
        **asdict(planned),
        "bytes_in": human_bytes(planned.bytes_in),
        "bytes_out": human_bytes(planned.bytes_out),
    }
    _output.data(_output.table([(k.replace("_", " "), str(v)) for k, v in shown.items()]))


def summary(result: JobResult) -> str:
    """What a person wants to know after a conversion."""
    rows = [
        ("output", result.output),
        ("scheme", f"{result.scheme} ({result.format})"),
        ("bytes", f"{human_bytes(result.bytes_in)} -> "
                  f"{human_bytes(result.bytes_out)}"),
        ("modules", f"{result.copied_tensors} copied, {result.exact_tensors} re-encoded exactly, "
                    f"{result.lossy_tensors} lossy, {result.dropped_tensors} tensors dropped"),
        ("took", f"{result.seconds:.1f} s, peak memory "
                 f"{human_bytes(result.peak_rss_bytes)}"),
    ]  # fmt: skip
    if result.lossy_tensors:
        loss = f"relative RMS {result.mean_relative_rms:.4f}, worst {result.worst_relative_rms:.4f}"
        rows.insert(4, ("weight error", loss))
    if result.engram_relative_rms:
        told = f"relative RMS {result.engram_relative_rms:.4f}"
        if result.engram_relative_rms_in_use:
            told += f", {result.engram_relative_rms_in_use:.4f} as the calibration text used rows"
        rows.insert(4, ("Engram tables", told))
    if result.altered_elements:
        rows.insert(4, ("not exact", f"{result.altered_elements:,} values changed in casts"))
    return _output.table(rows)
