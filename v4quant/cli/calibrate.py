"""`v4quant calibrate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.builtin import MIXED_CALIBRATION
from v4quant.cli import _output
from v4quant.cli._options import corpus_options, overwrite_option, products_option, threads_option
from v4quant.cli._types import SCHEME, SOURCE
from v4quant_calibration.defaults import MIN_TOKENS

if TYPE_CHECKING:
    from v4quant_calibration.statistics.stats import Stats


@click.command(
    epilog="Example: v4quant calibrate DeepSeek-V4-Flash --out stats.v4q --corpus chat.jsonl"
)
@click.argument("source", type=SOURCE)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Statistics file; with --solve the solution's folder.",
)
@corpus_options(MIXED_CALIBRATION)
@products_option()
@click.option(
    "--min-tokens",
    type=click.IntRange(1),
    default=MIN_TOKENS,
    show_default=True,
    help="Tokens every expert should see: beyond --tokens, more of the corpus is drawn until they "
    "have or it ends. Experts still below count as starved.",
)
@click.option(
    "--solve",
    "solve",
    type=SCHEME,
    help="Also find the codes of this scheme, of integers or GGUF's blocks (int3-g128, q3_k, ...), "
    "by GPTQ on the streaming inputs, for `quantize --stats`.",
)
@click.option(
    "--dense",
    default="",
    help="With --solve of a GGUF type: the dense matrices' type, which are then solved too.",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="Instead of --solve: solve what this recipe file asks for, place by place.",
)
@click.option(
    "--propagate/--no-propagate",
    default=True,
    show_default=True,
    help="With --solve: later layers are solved on what the already converted ones give them.",
)
@threads_option
@click.option("--device", default="cpu", show_default=True, help="Where passes run and solvers "
              "work: cpu, cuda, cuda:0, ...")  # fmt: skip
@click.option("--max-memory", help="Cap on memory, like 6GB: streams go to files, experts' inputs "
              "in parts, fewer experts are solved at once.")  # fmt: skip
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="Also write an importance matrix (.gguf) that llama.cpp's own quantizer reads.",
)
@overwrite_option("files, or another solution,")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(
    source: str,
    out: Path,
    corpus: tuple[str, ...],
    tokens: int | None,
    seq_len: int | None,
    tokenizer: Path | None,
    mode: str,
    chat_keys: str,
    skip_bad_rows: int,
    activations: str,
    products: str,
    min_tokens: int,
    solve: str | None,
    dense: str,
    recipe_file: Path | None,
    propagate: bool,
    device: str,
    threads: int | None,
    max_memory: str | None,
    imatrix: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run a corpus through checkpoint SOURCE and record what every expert's inputs look like.

    An interrupted run is resumed by the same command, layer by layer. With --solve several
    processes, also on several machines with a shared disk, divide the work when started by
    `torchrun --nproc-per-node N -m v4quant calibrate ...`; any number may resume it.
    """
    found = v4quant.calibrate(
        source,
        out,
        corpus=corpus,
        tokens=tokens,
        seq_len=seq_len,
        tokenizer=tokenizer,
        mode=mode,
        chat_keys=chat_keys,
        skip_bad_rows=skip_bad_rows,
        activations=activations,
        products=products,
        min_tokens=min_tokens,
        solve=solve,
        dense=dense,
        recipe=recipe_file,
        propagate=propagate,
        device=device,
        threads=threads,
        max_memory=max_memory,
        imatrix=imatrix,
        overwrite=overwrite,
        progress=_output.TerminalProgress(),
    )
    if int(os.environ.get("RANK", "0")):
        return  # torchrun: the first rank speaks for all
    if as_json:
        _output.emit(found.as_dict())
    else:
        _output.data(coverage_text(found.stats))
        if found.skipped_rows:
            _output.data(f"{found.skipped_rows:,} of the rows read are unusable and were left out")
        _output.data(f"{'solution' if found.solved else 'statistics'} in {out}")


def coverage_text(stats: Stats) -> str:
    """Coverage for a person: how tokens spread over a stage's experts, and who is starved.

    Where more text was drawn for starved experts, the first draw's fewest stands beside the final.
    """
    from v4quant_calibration.statistics.coverage import spread  # torch, which --help can wait for

    rows = []
    for name, stage in stats.stages.items():
        now = spread(stage.tokens)
        first = spread(stats.first[name])["min"] if name in stats.first else now["min"]
        counts = [f"{n:,}" for n in (first, *now.values())]
        rows.append((name, *counts, str(int((stage.tokens < stats.floor).sum()))))
    header = ("stage", "first draw", "fewest tokens", "quarter", "median", "3/4", "most", "starved")
    lines = [_output.table(rows, header)]
    for layer, expert, tokens in stats.starved()[:20]:
        lines.append(
            f"starved: {layer} expert {expert} saw {tokens} tokens; mixed with the layer's moments"
        )
    return "\n".join(lines)
