"""`v4quant bench moe` and `v4quant bench indexer`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from v4quant.bench.choices import CONTEXTS, INDEX_CASES, SHAPES, TOKENS, Compare
from v4quant.cli import _exit, _output
from v4quant.cli._types import Choice, FiniteRange

if TYPE_CHECKING:
    from v4quant.bench.kernels.device import Machine
    from v4quant.bench.kernels.indexer import IndexerBench
    from v4quant.bench.kernels.moe import MoeBench
    from v4quant.bench.kernels.tune import Tuned

_DEVICE = click.option(
    "--device",
    type=Choice(["cuda", "cpu"]),
    help="Where to measure (default: the GPU; cpu times the torch fallback).",
)
_APPEND = click.option(
    "--append",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also append the result to this JSON-lines file, e.g. kernels/bench/baselines.jsonl.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_PEERS = click.option(
    "--peers",
    type=Choice(get_args(Compare)),
    default="also",
    show_default=True,
    help="Time other people's kernels, where they are installed: also, only or none.",
)
_TUNE = click.option(
    "--tune",
    type=click.Path(path_type=Path, dir_okay=False),
    help="First search for faster tiles, write them here and use them.",
)
_MINUTES = click.option(
    "--minutes", type=FiniteRange(min=0), help="Start nothing new after this many minutes."
)


@click.command(epilog="Example: v4quant bench moe --shape flash --append baselines.jsonl")
@click.option("--shape", "shapes", multiple=True, type=Choice(sorted(SHAPES)),
              help="Whose experts (repeatable; default: flash and pro).")  # fmt: skip
@click.option("--scheme", "schemes", multiple=True, help="Weights (repeatable; default: mxfp4).")
@click.option("--activations", "modes", multiple=True, type=Choice(["bf16", "e4m3"]),
              help="Activations (repeatable; default: both).")  # fmt: skip
@click.option("--tokens", multiple=True, type=click.IntRange(1, 65536),
              help="Tokens in a batch (repeatable; default: 1 to 16384).")  # fmt: skip
@_PEERS
@_TUNE
@_MINUTES
@_DEVICE
@_APPEND
@_JSON
def moe(
    shapes: tuple[str, ...],
    schemes: tuple[str, ...],
    modes: tuple[Literal["bf16", "e4m3"], ...],
    tokens: tuple[int, ...],
    peers: Compare,
    tune: Path | None,
    minutes: float | None,
    device: str | None,
    append: Path | None,
    as_json: bool,
) -> None:
    """Time the expert kernels against this GPU's copy and matrix speed and against other kernels.

    Names what cannot be measured and continues with the rest.
    """
    from v4quant.bench.kernels.moe import bench_moe  # torch, which --help can wait for

    if tune is not None:
        _require_tunable(tune)
        from v4quant.bench.kernels.tune_moe import tune_moe

        what = shapes or ("flash",), schemes or ("mxfp4",), modes or ("bf16", "e4m3")
        _use(tune_moe(*what, _output.TerminalProgress(), device), tune)
    result = bench_moe(
        shapes or ("flash", "pro"),
        schemes or ("mxfp4",),
        modes or ("bf16", "e4m3"),
        tokens or TOKENS,
        _output.TerminalProgress(),
        device,
        peers,
        append,
        minutes,
    )
    _report(result, _moe_text(result), as_json)


@click.command(epilog="Example: v4quant bench indexer --context 131072")
@click.option("--context", "contexts", multiple=True, type=click.IntRange(8, 2**22),
              help="Tokens of context (repeatable; default: 128k and 1M).")  # fmt: skip
@click.option("--case", "cases", multiple=True, type=Choice(list(INDEX_CASES)),
              help="Situations (repeatable; default: all).")  # fmt: skip
@click.option("--top-k", type=click.IntRange(1, 2048), default=512, show_default=True,
              help="Keys chosen for each token.")  # fmt: skip
@_PEERS
@_TUNE
@_MINUTES
@_DEVICE
@_APPEND
@_JSON
def indexer(
    contexts: tuple[int, ...],
    cases: tuple[str, ...],
    top_k: int,
    peers: Compare,
    tune: Path | None,
    minutes: float | None,
    device: str | None,
    append: Path | None,
    as_json: bool,
) -> None:
    """Time the FP4 indexer's scores and its exact top-k, beside other kernels.

    Names what cannot be measured and continues with the rest.
    """
    from v4quant.bench.kernels.indexer import bench_indexer  # torch, which --help can wait for

    if tune is not None:
        _require_tunable(tune)
        from v4quant.bench.kernels.tune_indexer import tune_indexer

        _use(tune_indexer(_output.TerminalProgress(), device), tune)
    result = bench_indexer(
        contexts or CONTEXTS,
        cases or tuple(INDEX_CASES),
        top_k,
        _output.TerminalProgress(),
        device,
        peers,
        append,
        minutes,
    )
    _report(result, _indexer_text(result), as_json)


@click.command(epilog="Example: v4quant bench gpu --append kernels/bench/baselines.jsonl")
@click.option("--minutes", type=FiniteRange(min=0.5), default=9.0, show_default=True,
              help="How long the GPU is available.")  # fmt: skip
@click.option("--append", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="Append every row to this JSON-lines file as soon as it exists.")  # fmt: skip
@click.pass_context
def gpu(ctx: click.Context, minutes: float, append: Path) -> None:
    """Measure all kernels in the time available, most important first.

    Steps are processes of their own: one that crashes or hangs does not stop the others. Exit code
    1 if one did not finish.
    """
    from v4quant.bench.kernels.device import choose_device  # torch, which --help can wait for
    from v4quant.bench.kernels.session import STEPS, run_session

    choose_device("cuda")
    results = run_session(STEPS, append, minutes, _output.heading)
    rows = [(r.name, f"{r.seconds:.0f}", r.outcome) for r in results]
    _output.data(_output.table(rows, ("step", "seconds", "outcome")))
    _output.data(f"rows in {append}")
    if any(r.outcome != "done" for r in results):
        ctx.exit(_exit.FAILED)


def _require_tunable(path: Path) -> None:
    """Raise, before anything is measured, where tiles cannot be found or written."""
    from v4quant_kernels import dispatch  # torch, which --help can wait for

    dispatch.require_triton()  # without which the next import fails
    from v4quant.bench.kernels.tune import stored_tiles

    stored_tiles(path)


def _use(tuned: Tuned, path: Path) -> None:
    """Write the tuned tiles, and let this process use them."""
    from v4quant.bench.kernels.tune import write_tiles  # torch, which --help can wait for
    from v4quant_kernels.gpu.tiles import TILES_VARIABLE, forget_tuned

    write_tiles(tuned, path)
    os.environ[TILES_VARIABLE] = str(path)
    forget_tuned()
    for f in tuned.findings:
        gain = f.seconds_before / f.seconds_after
        _output.note(f"{f.key}: {f.seconds_before * 1e6:.1f} us, {gain:.2f} times as fast")


def _report(result: MoeBench | IndexerBench, text: str, as_json: bool) -> None:
    if as_json:
        _output.emit(result)
        return
    lines = [_machine(result.machine), "", text]
    lines += [f"not measured: {m.cell}: {m.reason}" for m in result.missing]
    _output.data("\n".join(lines))


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
    own = {(r.shape, r.scheme, r.tokens): r.seconds for r in reversed(result.rows)}
    own |= {(r.shape, "bf16", r.tokens): r.seconds for r in reversed(result.rows)}
    others = [
        (
            f"{p.shape} {p.scheme}, {p.peer}",
            str(p.tokens),
            f"{p.seconds * 1e6:.1f}",
            _ratio(p.seconds, own.get((p.shape, p.scheme, p.tokens))),
            f"{p.deviation:.1e}",
            "graph" if p.graph else "launched",
        )
        for p in result.peers
    ]
    return _tables((rows, header), (others, ("other kernel", "tokens", *_OTHERS)))


_OTHERS = ("us", "times ours", "deviation", "timed as")


def _ratio(theirs: float, ours: float | None) -> str:
    return "-" if ours is None else f"{theirs / ours:.2f}"


def _tables(*tables: tuple[Sequence[Sequence[str]], Sequence[str]]) -> str:
    return "\n\n".join(_output.table(rows, header) for rows, header in tables if rows)


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
    from v4quant.bench.kernels.indexer_peers import SCORERS  # torch, which --help can wait for

    own = {(r.case, r.context): r for r in result.rows}
    others = []
    for p in result.peers:
        mine, scores = own.get((p.case, p.context)), p.peer in {s.name for s in SCORERS}
        ours = None if mine is None else mine.score_seconds if scores else mine.select_seconds
        others.append(
            (
                f"{p.case}, {p.peer}",
                str(p.context),
                f"{p.seconds * 1e6:.1f}",
                _ratio(p.seconds, ours),
                f"{p.deviation:.1e}",
                "graph" if p.graph else "launched",
            )
        )
    return _tables((rows, header), (others, ("other kernel", "context", *_OTHERS)))
