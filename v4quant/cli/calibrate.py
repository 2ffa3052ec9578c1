"""`v4quant calibrate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from v4quant.builtin import MIXED_CALIBRATION
from v4quant.calibration.collect import calibrate_to, draw_corpus, solve_settings
from v4quant.cli import _output
from v4quant.cli._options import corpus_options, forward_options, products_option, read_corpus
from v4quant.cli._source import SOURCE
from v4quant.devices import find_device
from v4quant.recipe import Recipe, read_toml, recipe_from_table
from v4quant.sizes import parse_size
from v4quant.source import Source, open_source
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.statistics.collect import DEFAULT_FLOOR
from v4quant_calibration.statistics.coverage import coverage, spread
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.model_config import parse_model_config


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
    "--floor",
    type=click.IntRange(1),
    default=DEFAULT_FLOOR,
    show_default=True,
    help="Tokens every expert shall see: beyond --tokens, more of the corpus is drawn until it has "
    "or the corpus ends. Experts still below count as starved.",
)
@click.option(
    "--solve",
    "scheme",
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
@click.option("--device", default="cpu", show_default=True, help="Where passes run and solvers "
              "work: cpu, cuda, cuda:0, ...")  # fmt: skip
@click.option("--max-memory", help="Cap on memory, like 6GB: streams go to files, experts' inputs "
              "in parts, fewer experts are solved at once.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(
    source: Source,
    out: Path,
    corpus: tuple[str, ...],
    tokens: int | None,
    seq_len: int | None,
    mode: str,
    activations: str,
    products: str,
    floor: int,
    scheme: str | None,
    dense: str,
    recipe_file: Path | None,
    propagate: bool,
    device: str,
    max_memory: str | None,
    as_json: bool,
) -> None:
    """Run a corpus through checkpoint SOURCE and record what every expert's inputs look like.

    With --solve an interrupted run is resumed by the same command, layer by layer.
    """
    cap, where = parse_size(max_memory) if max_memory else None, find_device(device)
    recipe = _recipe(scheme, dense, recipe_file)
    options, progress = forward_options(activations, products), _output.TerminalProgress()
    with open_source(source) as checkpoint:
        config = parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))
        settings = solve_settings(checkpoint, recipe, propagate) if recipe else None

        def load(limit: int | None) -> Corpus:
            return read_corpus(corpus, checkpoint, config, seq_len, limit, mode)

        drawn = draw_corpus(load, tokens)
        done = calibrate_to(
            checkpoint, config, drawn, options, floor, settings, out, progress, cap, where
        )
    stats, found = done.stats, coverage(done.stats)
    if as_json:
        _output.emit({"stats": str(out), "tokens": sum(map(len, done.windows)), **found})
    else:
        _output.data(coverage_text(stats))
        _output.data(f"{'solution' if settings else 'statistics'} in {out}")


def _recipe(scheme: str | None, dense: str, file: Path | None) -> Recipe | None:
    """The recipe to solve for, None where nothing is. Raises UsageError, RecipeError."""
    if file is not None:
        if scheme or dense:
            raise click.UsageError("--recipe says schemes; leave --solve and --dense out")
        return replace(recipe_from_table(read_toml(file), str(file)), solver="gptq")
    if scheme is None:
        if dense:
            raise click.UsageError("--dense goes with --solve")
        return None
    return Recipe(scheme, dense=dense, solver="gptq")


def coverage_text(stats: Stats) -> str:
    """Coverage for a person: how tokens spread over a stage's experts, and who is starved.

    Where more text was drawn for starved experts, the first draw's fewest stands beside the final.
    """
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
