"""The evaluation report: one result, told to a person who must decide whether to ship.

The page answers in the order in which one asks: is there damage beyond the arithmetic's own noise
(the verdict), how much of it and for which saving (the summary), where does it sit (the plots),
and finally everything needed to doubt or repeat it (the tables, the command, the versions).

It is one HTML file without scripts or outside resources: it can be mailed, stored beside the
checkpoint and opened in ten years. Nothing in it is trusted: every string is escaped, and a content
security policy forbids whatever an escaping mistake might let through. A measure that the result
does not hold leaves its place out; the report never fills one in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from v4quant.evaluation.figures import Figures, FloorScores
from v4quant.evaluation.report.candidates import candidates_table, size_quality_plot
from v4quant.evaluation.report.decision import distinct_names
from v4quant.evaluation.report.glossary import TERMS, worked_sentences
from v4quant.evaluation.report.layers import expert_table, layer_table, starved_table
from v4quant.evaluation.report.plots import coverage_plot, kl_histogram_plot, layer_error_plot
from v4quant.evaluation.report.probes import draft_table, needle_table
from v4quant.evaluation.report.style import STYLE
from v4quant.evaluation.report.svg import NARROW, WIDE, Frame
from v4quant.evaluation.report.tables import (
    SHARES,
    SUMMARY_METRICS,
    Table,
    checkpoint_table,
    confidence_table,
    corpus_table,
    distribution_table,
    findings_table,
    floors_table,
    metric,
    recorded_command,
    run_table,
    summary_table,
    verdict_text,
)
from v4quant.evaluation.report.text import (
    count,
    escape_html,
    escape_markdown,
    percent,
    plain,
    text,
)
from v4quant.evaluation.report.worst import worst_html
from v4quant.evaluation.result import Evaluation
from v4quant.existing import signed
from v4quant_formats.manifest import to_json_text
from v4quant_formats.shards import write_file_atomically

Plot = Callable[[Figures, Frame], str]
DETAIL_TABLES = (
    confidence_table,
    floors_table,
    draft_table,
    needle_table,
    layer_table,
    expert_table,
    corpus_table,
    starved_table,
    run_table,
)
SIZE_PLOT = (
    "Size and quality",
    size_quality_plot,
    "Every candidate of this run; the line joins those that no other one dominates. Lower left is "
    "better. The limits of the grades are drawn where they fall inside.",
)
PLOTS = (
    (
        "Error per layer",
        layer_error_plot,
        "Local: this layer alone, fed with the reference's input. Stream: what all layers so far "
        "have added up to. A layer that stands out locally is damaged; a stream error that rises "
        "slowly is ordinary rounding.",
    ),
    (
        "Divergence per token",
        kl_histogram_plot,
        "How the probabilities of the next token moved, one count per scored token. A second hump "
        "or a long tail on the right means few but badly hit tokens.",
    ),
    (
        "Expert coverage",
        coverage_plot,
        "How many tokens each expert received. Starved experts have hardly been measured.",
    ),
)
MARKDOWN_METRICS = (
    *((key, reference) for _, key, reference in SUMMARY_METRICS),
    ("kl_median", ""),
    ("kl_p90", ""),
    ("kl_p999", ""),
    ("kl_max", ""),
    ("top5_agreement", ""),
    ("flips_weighted", ""),
    ("flips_confident", ""),
    ("delta_p_rms", ""),
)


def render_html(result: Figures) -> str:
    """One self-contained HTML page of an evaluation's figures.

    The part of a figure that is not there is left out. Raises ReportError when the histogram's
    lengths disagree or a count is none.
    """
    subject = text(result.candidate.path) or "checkpoint"
    parts = [f"<h1>Evaluation of <code>{escape_html(subject)}</code></h1>"]
    parts.append(_identity(result))
    told = [_verdict(result), _findings_html(result)]
    # A damaged matrix outweighs every figure.
    parts += told if findings_table(result) is None else reversed(told)
    summary = summary_table(result)
    if summary is not None:
        parts.append(_table_html(summary))
    several = candidates_table(result)
    if several is not None:
        parts.append(_table_html(several))
    parts += [_plot_html(result, *SIZE_PLOT), *_charts(result), *_worst(result)]
    parts += [
        _table_html(t)
        for build in (distribution_table, *DETAIL_TABLES)
        if (t := build(result)) is not None
    ]
    parts.append(_glossary(result))
    command = recorded_command(result)
    if command:
        parts.append(f"<section>\n<h2>Command</h2>\n<pre>{escape_html(command)}</pre>\n</section>")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Evaluation of {escape_html(subject)}</title>\n<style>{STYLE}</style>\n"
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _plot_html(result: Figures, title: str, plot: Plot, caption: str) -> str:
    """Drawn twice, for wide and for narrow screens, of which the style shows one."""
    drawing = plot(result, WIDE)
    return (
        f"<section>\n<h2>{title}</h2>\n<p>{caption}</p>\n"
        f'<div class="plot on-wide">{drawing}</div>\n'
        f'<div class="plot on-narrow">{plot(result, NARROW)}</div>\n</section>'
        if drawing
        else ""
    )


def _charts(result: Figures) -> list[str]:
    """The charts of the first candidate, and those of the others folded up behind their names."""
    parts = [_plot_html(result, *plot) for plot in PLOTS]
    others = result.others
    for name, other in zip(_names(result)[1:], others, strict=True):
        own = replace(other, noise_floor=result.noise_floor)
        charts = "\n".join(filter(None, (_plot_html(own, *plot) for plot in PLOTS)))
        if charts:
            parts.append(
                f"<details>\n<summary>Charts of {escape_html(name)}</summary>\n{charts}\n</details>"
            )
    return parts


def _worst(result: Figures) -> list[str]:
    everyone = [result, *result.others]
    return [
        worst_html(part, name, f"worst-{number_}")
        for number_, (name, part) in enumerate(zip(_names(result), everyone, strict=True), 1)
    ]


def _names(result: Figures) -> list[str]:
    parts = [result, *result.others]
    return distinct_names([text(p.candidate.path) for p in parts])


def _glossary(result: Figures) -> str:
    if result.noise_floor == FloorScores():
        return ""
    told = "".join(f"<p>{escape_html(line)}</p>\n" for line in worked_sentences(result))
    terms = "\n".join(f"<dt>{escape_html(t)}</dt><dd>{escape_html(m)}</dd>" for t, m in TERMS)
    return f"<section>\n<h2>What the words mean</h2>\n{told}<dl>\n{terms}\n</dl>\n</section>"


def render_markdown(result: Figures) -> str:
    """The same result as Markdown: a table in the manner of lm-evaluation-harness, then details.

    Raises ReportError as `render_html` does.
    """
    parts = []
    findings = findings_table(result)
    if findings is not None:
        parts.append(_table_markdown(findings))
    verdict = verdict_text(result)
    if verdict:
        parts.append(f"**{escape_markdown(verdict)}**")
    parts.append(_metrics_markdown(result))
    for build in (checkpoint_table, candidates_table, *DETAIL_TABLES):
        table = build(result)
        if table is not None:
            parts.append(_table_markdown(table))
    command = recorded_command(result)
    if command:
        fence = "`" * (_longest_run(command, "`") + 3)
        parts.append(f"{fence}\n{command}\n{fence}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _identity(result: Figures) -> str:
    reference = text(result.reference.path)
    facts = []
    if reference:
        facts.append(f"against <code>{escape_html(reference)}</code>")
    facts += _saved_logits(result)
    tokens, sequences = result.tokens, result.sequences
    if tokens is not None:
        facts.append(f"{count(tokens)} tokens scored")
    if sequences is not None:
        length = result.seq_len
        of = f" of {count(length)} tokens" if length is not None else ""
        facts.append(f"{count(sequences)} sequences{of}")
    if skipped := result.skipped_rows:
        facts.append(f"{count(skipped)} of the rows read are unusable and were left out")
    return f'<p class="identity">{", ".join(facts)}</p>' if facts else ""


def _saved_logits(result: Figures) -> list[str]:
    """Says so when the reference's answers were read from a file."""
    saved = result.reference_logits
    if not text(saved.file):
        return []
    top_k, kl = saved.top_k, text(saved.kl)
    kept = f", {count(top_k)} tokens per position: KL is a {kl}" if top_k is not None else ""
    return [f"against saved logits <code>{escape_html(text(saved.file))}</code>{escape_html(kept)}"]


def _verdict(result: Figures) -> str:
    """The first candidate's verdict, or one of every candidate."""
    everyone = [result, *result.others]
    several = len(everyone) > 1
    lines = []
    for index, (name, part) in enumerate(zip(_names(result), everyone, strict=True), 1):
        verdict = part.verdict
        above, told = verdict.above_floor, verdict_text(part)
        if above is None and not told:
            continue
        css = "" if above is None else "differs" if above else "same"
        if part.findings or text(verdict.grade).startswith("damaged"):
            css = "damaged"
        strong = f"<strong>{escape_html(name)}.</strong> " if several else ""
        link = ""
        if part.worst_stretches:
            link = f' <a href="#worst-{index}">Where it diverges most.</a>'
        lines.append(f'<p class="verdict {css}">{strong}{escape_html(told)}{link}</p>')
    return "\n".join(lines)


def _findings_html(result: Figures) -> str:
    """Suspected defects, or that every weight was looked at and none was found."""
    table = findings_table(result)
    if table is not None:
        return f'<div class="findings">\n{_table_html(table)}\n</div>'
    if result.findings is None:
        return ""
    parts = (result, *result.others)
    groups = [group for part in parts for group in part.weights]
    matrices = sum(group.matrices or 0 for group in groups)
    return f'<p class="clean">No defect found in the weights of {count(matrices)} matrices.</p>'


def _table_html(table: Table) -> str:
    def cell(tag: str, column: int, value: str) -> str:
        css = ' class="name"' if column < table.text_columns else ""
        # On a narrow screen a row is a list, and each value stands beside its column's name.
        label = table.columns[column] if tag == "td" and column else ""
        label = f' data-label="{escape_html(label)}"' if label else ""
        return f"<{tag}{css}{label}>{escape_html(value)}</{tag}>"

    rows = [
        "<tr>" + "".join(cell("td", c, value) for c, value in enumerate(row)) + "</tr>"
        for row in table.rows
    ]
    head = ""
    if any(table.columns):
        cells = "".join(cell("th", c, value) for c, value in enumerate(table.columns))
        head = f"<thead><tr>{cells}</tr></thead>\n"
    notes = "".join(f"\n<p>{escape_html(note)}</p>" for note in table.notes)
    body = "\n".join(rows)
    return (
        f'<section>\n<h2>{escape_html(table.title)}</h2>\n<div class="wide"><table>\n'
        f"{head}<tbody>\n{body}\n</tbody>\n</table></div>{notes}\n</section>"
    )


def _metrics_markdown(result: Figures) -> str:
    """One row a metric: name, direction, value, error, and the same of the noise floor."""
    floor = result.noise_floor
    rows = []
    for key, reference_key in MARKDOWN_METRICS:
        value = getattr(result, key)
        if value is None:
            continue
        agreement = key.endswith("agreement")
        digits = 3 if key.startswith("kl_") else 4
        shown = percent(value) if key.startswith(SHARES) else plain(value, digits)
        stderr = plain(getattr(result, f"{key}_stderr", None), 2)
        sign = "±" if stderr else ""
        before = metric(result, reference_key) if reference_key else ""
        rows.append(
            (key, "↑" if agreement else "↓", shown, sign, stderr, before, metric(floor, key))
        )
    if not rows:
        return ""
    columns = ("Metric", "", "Value", "", "Stderr", "Reference", "Noise floor")
    return _grid(columns, rows, text_columns=2)


def _table_markdown(table: Table) -> str:
    parts = [f"### {escape_markdown(table.title)}"]
    parts.append(_grid(table.columns, table.rows, table.text_columns))
    parts += [escape_markdown(note) for note in table.notes]
    return "\n\n".join(parts)


def _grid(columns: tuple[str, ...], rows: Any, text_columns: int) -> str:
    rule = ["---" if c < text_columns else "---:" for c in range(len(columns))]
    lines = [[escape_markdown(c) for c in columns], rule]
    lines += [[escape_markdown(value) for value in row] for row in rows]
    return "\n".join("|" + "|".join(cells) + "|" for cells in lines)


def _longest_run(value: str, character: str) -> int:
    longest = run = 0
    for c in value:
        run = run + 1 if c == character else 0
        longest = max(longest, run)
    return longest


def write_report(found: Evaluation, path: Path) -> None:
    """Write the evaluation as HTML, Markdown or JSON, by suffix."""
    if path.suffix == ".json":
        shown = to_json_text(found.as_dict())
    else:
        text = (render_markdown if path.suffix == ".md" else render_html)(found.figures)
        shown = signed(text, path.suffix)
    write_file_atomically(path, shown.encode())
