"""The stretches of text with the largest divergence, each with its text, to look at."""

from __future__ import annotations

from v4quant.evaluation.figures import Figures
from v4quant.evaluation.report.text import count, escape_html, plain, text


def worst_html(result: Figures, name: str, anchor: str) -> str:
    """A section whose entries can be linked to as `#ANCHOR-1`, ...; empty without stretches."""
    rows = result.worst_stretches
    if not rows:
        return ""
    parts = [
        f'<section id="{anchor}">\n<h2>Where {escape_html(name)} diverges most</h2>\n'
        "<p>The stretches with the largest mean KL, and their text. One that is far above the "
        "others, and above the floor there, is damage worth looking into.</p>"
    ]
    for index, row in enumerate(rows, 1):
        title = (
            f"{index}. {text(row.part)}, window {count(row.window)}, from token "
            f"{count(row.start)}: mean KL {plain(row.kl_mean, 3)} nats, "
            f"largest {plain(row.kl_max, 3)}; the floor has "
            f"{plain(row.floor_kl_mean, 3)} there"
        )
        told = row.text.expandtabs(4)
        lines = "\n".join(escape_html(line) for line in told.split("\n"))
        body = f"<pre>{lines}</pre>" if told else "<p>Its text is not kept.</p>"
        is_open = " open" if index == 1 else ""
        parts.append(
            f'<details id="{anchor}-{index}"{is_open}>\n'
            f"<summary>{escape_html(title)}</summary>\n{body}\n</details>"
        )
    return "\n".join(parts) + "\n</section>"
