"""`v4quant bench moe` and `v4quant bench indexer`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from v4quant.bench_device import Machine
from v4quant.bench_indexer import CASES, CONTEXTS, IndexerBench, bench_indexer
from v4quant.bench_moe import SHAPES, TOKENS, MoeBench, bench_moe
from v4quant.cli import _output
from v4quant_kernels import dispatch

_DEVICE = click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    help="Where to measure (default: the GPU; cpu times the torch fallback).",
)
_APPEND = click.option(
    "--append",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also append the result to this JSON-lines file, e.g. kernels/bench/baselines.jsonl.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command(epilog="Example: v4quant bench moe --shape flash --append baselines.jsonl")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(sorted(SHAPES)),
              help="Whose experts (repeatable; default: flash and pro).")  # fmt: skip
@click.option("--scheme", "schemes", multiple=True, help="Weights (repeatable; default: mxfp4).")
@click.option("--activations", "modes", multiple=True, type=click.Choice(["bf16", "e4m3"]),
              help="Activations (repeatable; default: both).")  # fmt: skip
@click.option("--tokens", multiple=True, type=click.IntRange(1, 65536),
              help="Tokens in a batch (repeatable; default: 1 to 16384).")  # fmt: skip
@click.option("--no-alternatives", is_flag=True, help="Only our kernels.")
@click.option("--tune", type=click.Path(path_type=Path, dir_okay=False),
              help="First search for faster tiles, write them here and use them.")  # fmt: skip
@_DEVICE
@_APPEND
@_JSON
def moe(
    shapes: tuple[str, ...],
    schemes: tuple[str, ...],
    modes: tuple[Literal["bf16", "e4m3"], ...],
    tokens: tuple[int, ...],
    no_alternatives: bool,
    tune: Path | None,
    device: str | None,
    append: Path | None,
    as_json: bool,
) -> None:
    """Time the expert kernels against this GPU's copy and matrix speed and against torch."""
    if tune is not None:
        _tune(tune, shapes or ("flash",), schemes or ("mxfp4",), modes or ("bf16", "e4m3"), device)
    result = bench_moe(
        shapes or ("flash", "pro"),
        schemes or ("mxfp4",),
        modes or ("bf16", "e4m3"),
        tokens or TOKENS,
        _output.TerminalProgress(),
        device,
        not no_alternatives,
    )
    _report("moe", result, _moe_text(result), append, as_json)


@click.command(epilog="Example: v4quant bench indexer --context 131072")
@click.option("--context", "contexts", multiple=True, type=click.IntRange(8, 2**22),
              help="Tokens of context (repeatable; default: 128k and 1M).")  # fmt: skip
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)),
              help="Situation (repeatable; default: all).")  # fmt: skip
@click.option("--top-k", default=512, show_default=True, type=click.IntRange(1, 2048),
              help="Keys each token takes.")  # fmt: skip
@_DEVICE
@_APPEND
@_JSON
def indexer(
    contexts: tuple[int, ...],
    cases: tuple[str, ...],
    top_k: int,
    device: str | None,
    append: Path | None,
    as_json: bool,
) -> None:
    """Time the FP4 indexer's scores and its exact top-k."""
    result = bench_indexer(
        contexts or CONTEXTS, cases or tuple(CASES), top_k, _output.TerminalProgress(), device
    )
    _report("indexer", result, _indexer_text(result), append, as_json)


def _tune(
    path: Path,
    shapes: tuple[str, ...],
    schemes: tuple[str, ...],
    modes: tuple[Literal["bf16", "e4m3"], ...],
    device: str | None,
) -> None:
    """Write the tuned tiles, and let this process use them."""
    dispatch.require_triton()
    from v4quant.tune_moe import tune_moe, write_tiles
    from v4quant_kernels.gpu.tiles import TILES_VARIABLE, forget_tuned

    tuned = tune_moe(shapes, schemes, modes, _output.TerminalProgress(), device)
    write_tiles(tuned, path)
    os.environ[TILES_VARIABLE] = str(path)
    forget_tuned()
    for f in tuned.findings:
        gain = f.seconds_before / f.seconds_after
        _output.note(f"{f.key}: {f.seconds_before * 1e6:.1f} us, {gain:.2f} times as fast")


def _report(
    name: str, result: MoeBench | IndexerBench, text: str, append: Path | None, as_json: bool
) -> None:
    if append is not None:
        with append.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"bench": name, **asdict(result)}) + "\n")
    if as_json:
        _output.emit(result)
    else:
        _output.data(f"{_machine(result.machine)}\n\n{text}")


def _machine(machine: Machine) -> str:
    fp8 = f", FP8 {machine.fp8_flops / 1e12:.0f} TFLOP/s" if machine.fp8_flops else ""
    return (
        f"{machine.name} ({machine.driver}, torch {machine.torch}, triton {machine.triton}): "
        f"copy {machine.copy_bytes_per_second / 1e9:.0f} GB/s, "
        f"BF16 {machine.bf16_flops / 1e12:.2f} TFLOP/s{fp8}"
    )


def _moe_text(result: MoeBench) -> str:
    header = ("case", "tokens", "active", "us", "GB/s", "TFLOP/s", "% of floor")
    rows = [
        (
            f"{r.shape} {r.scheme} {r.activations}",
            str(r.tokens),
            f"{r.active_experts:.0f}",
            f"{r.seconds * 1e6:.1f}",
            f"{r.bytes_per_second / 1e9:.0f}",
            f"{r.flops / 1e12:.2f}",
            f"{100 * r.floor_share:.0f}",
        )
        for r in result.rows
    ]
    lines = [_output.table(rows, header)]
    for r in result.rows:
        for name, value in r.others.items():
            shown = value if isinstance(value, str) else f"{value / r.seconds:.2f} times as long"
            lines.append(f"{r.shape} {r.scheme} {r.activations} {r.tokens}: {name}: {shown}")
    return "\n".join(lines)


def _indexer_text(result: IndexerBench) -> str:
    header = ("case", "context", "scores us", "% of floor", "top-k us", "% of one read", "all us")
    rows = [
        (
            r.case,
            str(r.context),
            f"{r.score_seconds * 1e6:.1f}",
            f"{100 * r.score_floor_share:.0f}",
            f"{r.select_seconds * 1e6:.1f}",
            f"{100 * r.select_floor_share:.0f}",
            f"{r.total_seconds * 1e6:.1f}",
        )
        for r in result.rows
    ]
    return _output.table(rows, header)
