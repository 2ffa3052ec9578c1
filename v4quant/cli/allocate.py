"""`v4quant allocate`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.builtin import MIXED_CALIBRATION
from v4quant.cli import _output
from v4quant.cli._options import overwrite_option, row_options
from v4quant.cli._types import SOURCE, Choice, FiniteRange
from v4quant.shell import command_line
from v4quant.targets import ALL, AUTO
from v4quant_formats.engines.vllm_memory import UTILIZATION, Serving
from v4quant_formats.layouts.choices import ENGINE_CHOICES, LAYOUT_NAMES, NEUTRAL, dense_types

if TYPE_CHECKING:
    from v4quant.allocation.allocate import Allocation
    from v4quant.allocation.card_budget import CardMemory


@click.command(
    epilog="Example: v4quant allocate DeepSeek-V4-Flash --out recipe.toml --budget 128GB "
    "--stats stats.v4q"
)
@click.argument("source", type=SOURCE)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Recipe to write.")
@click.option("--budget", help="Largest size of the output, like 128GB.")
@click.option("--bpw", type=float, help="The same as bits per weight, over all parameters.")
@click.option("--fits", help="The same as cards it must fit, like 4x24GB, with --context.")
@click.option("--ram", help="System memory that experts may lie in beside these cards, like 128GB, "
              "for llama.cpp; a size as sold.")  # fmt: skip
@click.option("--context", type=click.IntRange(1, 2**24), default=32768, show_default=True,
              help="Tokens of one sequence kept beside the weights, for --fits.")  # fmt: skip
@click.option("--sequences", type=click.IntRange(1, 2**16), default=1, show_default=True,
              help="How many such sequences, for --fits with --engine vllm.")  # fmt: skip
@click.option("--batched-tokens", type=click.IntRange(16, 2**20),
              help="vLLM's --max-num-batched-tokens, for --fits (default: its own for such cards); "
              "fewer leave more room.")  # fmt: skip
@click.option("--gpu-memory-utilization", "utilization", default=UTILIZATION, show_default=True,
              type=FiniteRange(0, 1, min_open=True),
              help="The share of a card that vLLM may take, for --fits.")  # fmt: skip
@click.option("--expert-parallel", is_flag=True, help="For --fits: vLLM keeps experts whole and "
              "shares them out, so that no scale group is cut.")  # fmt: skip
@click.option("--format", "format_", type=Choice(LAYOUT_NAMES), default="gguf",
              show_default=True, help="Container; gguf mixes layers and projections, "
              "compressed-tensors with --engine vllm whole layers.")  # fmt: skip
@click.option("--engine", type=Choice(ENGINE_CHOICES), default=NEUTRAL, show_default=True,
              help="Write what this engine wants, as of quantize.")  # fmt: skip
@click.option("--dense", type=Choice([*dense_types(), AUTO, ALL]), metavar="TYPE|auto|all",
              help="Type of dense matrices, for gguf (default bf16); auto: one per layer, for "
              "embedding and head; all: compressors and hyper-connections take part too. Both "
              "need --measure-kl.")  # fmt: skip
@click.option("--engram", default="", help="How V4.1's Engram tables are coded, for gguf (default "
              "bf16, exact).")  # fmt: skip
@click.option("--draft", type=Choice(["convert", "drop"]), default="convert",
              show_default=True, help="MTP / DSpark stages.")  # fmt: skip
@click.option("--split-size", default="", help="Largest file, like 45GB (default 45GB).")
@click.option("--stats", "stats_file", type=click.Path(path_type=Path),
              help="What calibrate wrote: whose inputs matter.")  # fmt: skip
@click.option("--measure-kl", is_flag=True, help="Measure what rounding each layer does to "
              "predictions on --corpus; without it, all layers count alike.")  # fmt: skip
@click.option("--corpus", multiple=True, default=[MIXED_CALIBRATION], show_default=True,
              help="Text for --measure-kl; may be repeated.")  # fmt: skip
@row_options
@click.option("--tokens", type=int, default=4096, show_default=True, help="Tokens of it to use.")
@click.option("--seq-len", type=int, default=256, show_default=True, help="Window length.")
@click.option("--experts", type=click.IntRange(1), default=4, show_default=True,
              help="Experts per layer whose rounding is measured.")  # fmt: skip
@overwrite_option("a recipe")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def allocate(
    source: str,
    out: Path,
    budget: str | None,
    bpw: float | None,
    fits: str | None,
    ram: str | None,
    context: int,
    sequences: int,
    batched_tokens: int | None,
    utilization: float,
    expert_parallel: bool,
    format_: str,
    engine: str,
    dense: str | None,
    engram: str,
    draft: str,
    split_size: str,
    stats_file: Path | None,
    measure_kl: bool,
    corpus: tuple[str, ...],
    chat_keys: str,
    skip_bad_rows: int,
    tokens: int,
    seq_len: int,
    experts: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Choose a scheme for every layer and projection of SOURCE within a size.

    Writes a recipe for `quantize --recipe`, which a person can read and change.
    """
    result = v4quant.allocate(
        source,
        out,
        budget=budget,
        bpw=bpw,
        fits=fits,
        ram=ram,
        context=context,
        sequences=sequences,
        batched_tokens=batched_tokens,
        gpu_memory_utilization=utilization,
        expert_parallel=expert_parallel,
        format=format_,
        engine=engine,
        dense=dense or "",
        engram=engram,
        draft=draft,
        split_size=split_size,
        stats=stats_file,
        measure_kl=measure_kl,
        corpus=corpus,
        chat_keys=chat_keys,
        skip_bad_rows=skip_bad_rows,
        tokens=tokens,
        seq_len=seq_len,
        experts=experts,
        overwrite=overwrite,
        progress=_output.TerminalProgress(),
    )
    if as_json:
        _output.emit(result.as_dict())
        return
    _output.data(_output.table(_rows(result.found, out)))
    if result.skipped_rows:
        _output.data(f"{result.skipped_rows:,} of the rows read are unusable and were left out")
    if result.card is not None and result.serving is not None:
        _output.data(f"\nEach of {result.serving.gpus} cards, by tensor parallelism:")
        _output.data(_output.table(_card_rows(result.card, result.serving)))
        _output.data("\n" + _serve(result.serving))


def _card_rows(memory: CardMemory, serving: Serving) -> list[tuple[str, str]]:
    experts = "whole experts, shared out" if serving.expert_parallel else "experts"
    tokens = f"{serving.sequences} x {serving.context:,} tokens"
    rows = [
        (memory.split, f"weights cut: {experts}, heads, vocabulary"),
        (memory.whole, "weights on every card: latents, indexer, compressors, router, norms"),
        (memory.kv_cache, f"KV cache: {tokens}, 2 x {serving.batched_tokens:,} in flight"),
        (memory.buffers, "buffers: rotary tables, workspaces, activations of a batch"),
        (memory.runtime, "CUDA, communication and graphs: an estimate"),
        (memory.reserve, f"left alone by vLLM ({1 - serving.utilization:.0%})"),
        (memory.free, "free"),
        (memory.size, "in all"),
    ]
    if memory.host:
        rows.append((memory.host, "of system memory beside all cards: the Engram's tables, pinned"))
    return [(f"{nbytes / 1e9:.2f} GB", text) for nbytes, text in rows]


def _serve(serving: Serving) -> str:
    return (
        f"vllm serve OUT --tensor-parallel-size {serving.gpus} --max-model-len {serving.context} "
        f"--max-num-seqs {serving.sequences} --max-num-batched-tokens {serving.batched_tokens} "
        f"--gpu-memory-utilization {serving.utilization:g} --kv-cache-dtype fp8"
        + (" --enable-expert-parallel" if serving.expert_parallel else "")
    )


def _rows(found: Allocation, out: Path) -> list[tuple[str, str]]:
    counts = Counter(found.chosen.values())
    unit = "nats of KL" if found.measured else "relative noise, layers counted alike"
    rows = [
        ("recipe", str(out)),
        ("bytes", f"{found.nbytes:,} of {found.budget:,} ({found.nbytes / found.budget:.2%})"),
        ("bits per weight", f"{found.bits_per_weight:.3f}"),
        ("places", ", ".join(f"{n} {s}" for s, n in counts.most_common())),
        ("predicted loss", f"{sum(found.losses.values()):.4g} ({unit})"),
    ]
    if found.needs_text:
        names = ", ".join(found.needs_text)
        solve = ["v4quant", "calibrate", "SOURCE", "--recipe", str(out), "--out", "solved"]
        rows.append(
            ("before quantize", f"{command_line(solve)}, and then --stats solved: {names} is "
             "refused without a text")
        )  # fmt: skip
    if found.room_left:
        rows.append(("room left", found.room_left))
    return rows
