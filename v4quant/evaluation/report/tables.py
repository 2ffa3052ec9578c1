"""The tables of an evaluation report, before anybody decides whether they become HTML or Markdown.

A table is text in rows and columns. A value the evaluation did not measure is an empty cell; rows
and columns that would be empty throughout are dropped, and a table without rows does not exist.
The summary comes first and puts every measure beside the same measure of the noise floor (the
reference compared with itself under rounding-sized noise): a divergence means nothing until one
knows how much of it the arithmetic produces on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from v4quant.evaluation.figures import Band, Facts, Figures, FloorScores, Scores
from v4quant.evaluation.report.text import (
    change,
    count,
    percent,
    plain,
    size,
    text,
    with_error,
)
from v4quant.shell import command_line
from v4quant.visible import visible


@dataclass(frozen=True)
class Table:
    """Unescaped text. The first `text_columns` columns are names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    text_columns: int = 1


SUMMARY_METRICS = (
    ("Perplexity", "perplexity", "reference_perplexity"),
    ("Mean negative log-likelihood (nats)", "nll", ""),
    ("KL from the reference, mean (nats)", "kl_mean", ""),
    ("KL, 99th percentile (nats)", "kl_p99", ""),
    ("Same top-1 token", "top1_agreement", ""),
)

DISTRIBUTION = (
    ("median", "kl_median"),
    ("90th percentile", "kl_p90"),
    ("99th percentile", "kl_p99"),
    ("99.9th percentile", "kl_p999"),
    ("maximum", "kl_max"),
)

INTERVALS = (
    ("KL, mean: 95 % interval (nats)", "kl_mean_ci95"),
    ("Perplexity over the reference's: 95 % interval", "perplexity_ratio_ci95"),
)
# Metrics that are shares or differences of probabilities, told in percent.
SHARES = ("top1_", "top5_", "flips_", "delta_p_")
# Below this many blocks a bootstrap interval comes out too narrow.
FEW_BLOCKS = 10
FLIPS = (
    ("Changed top-1 tokens, weighted by the reference's probability", "flips_weighted"),
    ("Changed top-1 tokens where the reference was above 50 %", "flips_confident"),
    ("Change of the true token's probability, root mean square", "delta_p_rms"),
)


def metric(values: Scores, key: str) -> str:
    """One measure as text, with its standard error when the mapping has `<key>_stderr`."""
    value = getattr(values, key)
    if key.startswith(SHARES):
        return percent(value)
    stderr = getattr(values, f"{key}_stderr", None)
    return (
        plain(value, 3) if stderr is None and key.startswith("kl_") else with_error(value, stderr)
    )


def checkpoint_table(result: Figures) -> Table | None:
    """What the two checkpoints are and what they weigh."""
    return build_table("Checkpoints", ("", *named(result), "Change"), _size_rows(result))


def summary_table(result: Figures) -> Table | None:
    """Size, bits, perplexity, divergence and agreement, beside the noise floor."""
    floor = result.noise_floor
    rows: list[tuple[str, ...]] = [(*row, "") for row in _size_rows(result)]
    for label, key, reference_key in SUMMARY_METRICS:
        before = metric(result, reference_key) if reference_key else ""
        row = (label, before, metric(result, key), _delta(result, key), metric(floor, key))
        if any(row[1:]):
            rows.append(row)
    notes = []
    if floor != FloorScores():
        described = text(floor.description)
        notes.append(f"Noise floor: {described}." if described else "")
        notes.append(
            "KL tells how far the probabilities of the next token moved from the reference's, 0 if "
            "not at all. Only what lies above the noise floor is the conversion's doing."
        )
    return build_table(
        "Summary", ("", *named(result), "Change", "Noise floor"), rows, tuple(filter(None, notes))
    )


def distribution_table(result: Figures) -> Table | None:
    """Intervals and quantiles of the per-token KL, top-5 agreement and flips."""
    floor = result.noise_floor
    sides = (result, floor)
    rows = [(label, *(interval(side, key) for side in sides)) for label, key in INTERVALS]
    rows += [
        (f"KL, {label} (nats)", *(metric(side, key) for side in sides))
        for label, key in DISTRIBUTION
    ]
    label = "Share of the reference's top 5 in the candidate's top 5"
    rows.append((label, *(metric(side, "top5_agreement") for side in sides)))
    rows += [(label, *(metric(side, key) for side in sides)) for label, key in FLIPS]
    rows = [row for row in rows if any(row[1:])]
    blocks = result.blocks
    notes = (
        (
            f"The intervals come from only {count(blocks)} blocks of text and are too narrow; "
            "evaluate more tokens.",
        )
        if blocks is not None and blocks < FEW_BLOCKS
        else ()
    )
    return build_table("Divergence in detail", ("", "Candidate", "Noise floor"), rows, notes)


def confidence_table(result: Figures) -> Table | None:
    """KL and agreement by how sure the reference was of its best token."""
    floor = {r.low: r.kl_mean for r in result.noise_floor.kl_by_confidence}
    rows = [
        (
            f"{_edge(band, 'low')} to {_edge(band, 'high')} %",
            count(band.tokens),
            plain(band.kl_mean, 3),
            plain(floor.get(band.low), 3),
            percent(band.top1_agreement),
        )
        for band in result.kl_by_confidence
    ]
    columns = (
        "Reference's top probability",
        "Tokens",
        "KL mean (nats)",
        "Noise floor's KL mean",
        "Same top-1 token",
    )
    return build_table("Divergence by the reference's confidence", columns, rows)


def _edge(band: Band, key: str) -> str:
    share = getattr(band, key)
    return "" if share is None else f"{100 * share:g}"


def verdict_text(part: Figures) -> str:
    """A candidate's verdict in words: damaged weights first, for no text excuses them."""
    told = text(part.verdict.text)
    if not part.findings:
        return told
    first, more = part.findings[0], len(part.findings) - 1
    others = f" and {more:,} more" if more else ""
    damage = f"Suspected damage in {text(first.where)}{others}: look before you use it."
    return f"{damage} By its predictions alone: {told}" if told else damage


def findings_table(result: Figures) -> Table | None:
    """Suspected defects in the weights of every candidate."""
    others = result.others
    rows = []
    for part in (result, *others):
        path = text(part.candidate.path) if others else ""
        rows += [(path, text(f.where), text(f.problem)) for f in part.findings or ()]
    title = f"Suspected defects ({len(rows):,})"
    return build_table(title, ("Candidate", "Module", "Problem"), rows, text_columns=3)


def floors_table(result: Figures) -> Table | None:
    """The noise floors, when several ran; the largest is the one used."""
    runs = result.noise_floor.runs
    rows = [
        (text(run.description), *(metric(run, k) for k in ("kl_mean", "kl_p99", "kl_max")),
         metric(run, "top1_agreement"))
        for run in runs
    ]  # fmt: skip
    columns = ("Run", "KL mean (nats)", "99th percentile", "Maximum", "Same top-1 token")
    return build_table("Noise floors", columns, rows if len(rows) > 1 else [])


def corpus_table(result: Figures) -> Table | None:
    """One row a part of the evaluation text."""
    rows = [
        (
            text(part.name),
            count(part.tokens),
            plain(part.reference_perplexity),
            plain(part.perplexity),
            change(part.reference_perplexity, part.perplexity),
            plain(part.kl_mean, 3),
            percent(part.top1_agreement),
        )
        for part in result.corpora
    ]
    columns = (
        "Text",
        "Tokens",
        "Reference perplexity",
        "Perplexity",
        "Change",
        "KL mean (nats)",
        "Same top-1 token",
    )
    return build_table("Parts of the evaluation text", columns, rows)


def run_table(result: Figures) -> Table | None:
    """What was measured with which versions, so that somebody else can repeat it."""
    tool = result.tool
    rows = []
    for label, checkpoint in (("Reference", result.reference), ("Candidate", result.candidate)):
        rows.append((f"{label} path", text(checkpoint.path)))
        rows.append((f"{label} bytes", count(checkpoint.bytes)))
    rows += [
        ("Tokens scored", count(result.tokens)),
        ("Sequences", count(result.sequences)),
        ("Sequence length (tokens)", count(result.seq_len)),
        ("Activations", text(result.activations)),
        ("Products", text(result.products)),
        ("v4quant", text(tool.version)),
        ("torch", text(tool.torch)),
        ("Python", text(tool.python)),
    ]
    rows = [row for row in rows if row[1]]
    return build_table("How this was measured", ("", ""), rows, text_columns=2)


def recorded_command(result: Figures) -> str:
    """The exact command, quoted for a shell when it was recorded as a list; empty when absent."""
    command = result.tool.command
    return visible(command if isinstance(command, str) else command_line(command, "sh"))


def named(result: Figures) -> tuple[str, str]:
    return ("Reference", "Candidate") if result.reference != Facts() else ("", "Checkpoint")


def interval(values: Scores, key: str) -> str:
    """`low to high` of a pair, empty when absent."""
    ends = getattr(values, key)
    return f"{plain(ends[0])} to {plain(ends[1])}" if len(ends) == 2 else ""


def _size_rows(result: Figures) -> list[tuple[str, ...]]:
    reference, candidate = result.reference, result.candidate
    before, after = reference.bytes, candidate.bytes
    bits_before = reference.expert_bits_per_weight
    bits_after = candidate.expert_bits_per_weight
    bits_change = change(bits_before, bits_after)
    rows = [
        ("Scheme", text(reference.scheme), text(candidate.scheme), ""),
        ("Size", size(before), size(after), change(before, after)),
        ("Bits per expert weight", plain(bits_before), plain(bits_after), bits_change),
    ]
    return [row for row in rows if any(row[1:])]


def _delta(result: Figures, key: str) -> str:
    """Perplexity: against the reference. Divergence: as a multiple of the noise floor."""
    if key == "perplexity":
        return change(result.reference_perplexity, getattr(result, key))
    if not key.startswith("kl_"):
        return ""
    return multiple_of_floor(result, result.noise_floor, key)


def multiple_of_floor(values: Scores, floor: Scores, key: str) -> str:
    """`3.1 × floor`, empty when either is absent or the floor is zero."""
    value, base = getattr(values, key), getattr(floor, key)
    if value is None or base is None or base <= 0 or not math.isfinite(value / base):
        return ""
    return f"{plain(value / base, 2)} × floor"


def build_table(
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    notes: tuple[str, ...] = (),
    text_columns: int = 1,
) -> Table | None:
    """Drop columns that are empty throughout; None when nothing is left."""
    kept = [c for c in range(len(columns)) if any(row[c] for row in rows)]
    if not rows or not kept:
        return None
    table = Table(title, columns, tuple(rows), notes, sum(c < text_columns for c in kept))
    return replace(
        table,
        columns=tuple(columns[c] for c in kept),
        rows=tuple(tuple(row[c] for c in kept) for row in rows),
    )
