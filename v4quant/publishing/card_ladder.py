"""The other sizes of a ladder on a card: a table of what each costs, and a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from v4quant.evaluation.figures import Figures
from v4quant.evaluation.report import svg
from v4quant.evaluation.report.candidates import SizePoint, sizes_plot
from v4quant.evaluation.report.decision import grade_text
from v4quant.evaluation.report.style import STYLE
from v4quant.evaluation.report.text import code_span, escape_markdown
from v4quant.publishing.card_facts import markdown_table, size_text

CHART_NAME = "v4quant-sizes.svg"


@dataclass(frozen=True)
class Sibling:
    """Another conversion of the same source, evaluated in the same run.

    repo: its repository, "" where it is not known to be published.
    """

    repo: str
    scheme: str
    nbytes: int
    kl: float
    top1: float
    grade: str


def other_sizes(siblings: Sequence[Sibling], repo: str, charted: bool) -> str:
    """The whole ladder, smallest first: what each size costs; empty for a single one.

    repo: whose card it is. charted: whether a chart lies beside the card.
    """
    if len(siblings) < 2:
        return ""
    rows = []
    for one in sorted(siblings, key=lambda s: s.nbytes):
        name = escape_markdown(one.repo.rpartition("/")[2])
        link = f"[{name}](https://huggingface.co/{one.repo})" if one.repo else "not published"
        shown = f"**{name}** (this one)" if one.repo == repo else link
        figures = (
            f"{one.kl:.2e}",
            f"{100 * one.top1:.2f} %",
            escape_markdown(grade_text(one.grade)),
        )
        rows.append((shown, code_span(one.scheme), size_text(one.nbytes), *figures))
    columns = ("Repository", "Experts", "Size", "Mean KL (nats)", "Same top-1 token", "Verdict")
    table = markdown_table(columns, rows)
    chart = f"\n\n![Size against mean KL of every size]({CHART_NAME})" if charted else ""
    return f"Other sizes, measured in the same run on the same text:\n\n{table}{chart}"


def sizes_chart(siblings: Sequence[Sibling], evaluation: Figures | None) -> str:
    """All sizes as an SVG file, above the noise floor of `evaluation`; empty for fewer than two."""
    points = [
        SizePoint(one.repo.rpartition("/")[2] or one.scheme, one.nbytes, one.kl) for one in siblings
    ]
    floor = evaluation.noise_floor.kl_mean if evaluation else None
    return svg.standalone(sizes_plot(points, floor or 0.0), STYLE)
