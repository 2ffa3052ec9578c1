"""`v4quant calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from v4quant.builtin import CALIBRATION
from v4quant.cli import _output
from v4quant.cli._options import corpus_options, forward_options, read_corpus
from v4quant.cli._source import SOURCE
from v4quant.source import Source, open_source
from v4quant_calibration.calibrate import DEFAULT_FLOOR
from v4quant_calibration.calibrate import calibrate as calibrate_checkpoint
from v4quant_calibration.stats import Stats, save_stats
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.shards import write_file_atomically


@click.command(
    epilog="Example: v4quant calibrate DeepSeek-V4-Flash --out stats.v4q --corpus chat.jsonl"
)
@click.argument("source", type=SOURCE)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Statistics file.")
@corpus_options(CALIBRATION)
@click.option(
    "--floor",
    type=click.IntRange(1),
    default=DEFAULT_FLOOR,
    show_default=True,
    help="Experts with fewer tokens count as starved.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(
    source: Source,
    out: Path,
    corpus: tuple[str, ...],
    tokens: int | None,
    seq_len: int | None,
    mode: str,
    activations: str,
    floor: int,
    as_json: bool,
) -> None:
    """Run a corpus through checkpoint SOURCE and record what every expert's inputs look like."""
    with open_source(source) as checkpoint:
        config = parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))
        windows = read_corpus(corpus, checkpoint, config, seq_len, tokens, mode).windows
        stats = calibrate_checkpoint(
            checkpoint,
            config,
            windows,
            forward_options(activations),
            floor,
            _output.TerminalProgress(),
        )
    write_file_atomically(out, save_stats(stats))
    found = coverage(stats)
    if as_json:
        _output.emit({"stats": str(out), "tokens": sum(map(len, windows)), **found})
    else:
        _output.data(coverage_text(stats))
        _output.data(f"statistics in {out}")


def coverage(stats: Stats) -> dict[str, object]:
    """Coverage in the form reports and `--json` use."""
    return {
        "measured_on": "calibration",
        "floor": stats.floor,
        "layers": [
            {"name": name, "tokens_per_expert": stage.tokens.tolist()}
            for name, stage in stats.stages.items()
        ],
        "starved": [
            {"layer": layer, "expert": expert, "tokens": tokens}
            for layer, expert, tokens in stats.starved()
        ],
    }


def coverage_text(stats: Stats) -> str:
    """Coverage for a person: minimum, median and maximum per stage, starved experts by name."""
    rows = []
    for name, stage in stats.stages.items():
        counts = stage.tokens.sort().values
        low, middle, high = counts[0], counts[len(counts) // 2], counts[-1]
        starved = int((counts < stats.floor).sum())
        rows.append((name, f"{low:,}", f"{middle:,}", f"{high:,}", str(starved)))
    lines = [_output.table(rows, ("stage", "fewest tokens", "median", "most", "starved"))]
    for layer, expert, tokens in stats.starved()[:20]:
        lines.append(f"starved: {layer} expert {expert} saw {tokens} tokens; uses pooled moments")
    return "\n".join(lines)
