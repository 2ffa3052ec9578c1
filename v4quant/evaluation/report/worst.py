"""The stretches of text with the largest divergence, each with its text, to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4quant.evaluation.report.text import count, escape_html, number, plain, records, text


def worst_html(result: Mapping[str, Any], name: str, anchor: str) -> str:
    """A section whose entries can be linked to as `#ANCHOR-1`, ...; empty without stretches."""
    rows = records(result, "worst_stretches")
    if not rows:
        return ""
    parts = [
        f'<section id="{anchor}">\n<h2>Where {escape_html(name)} diverges most</h2>\n'
        "<p>The stretches with the largest mean KL, and their text. One that is far above the "
        "others, and above the floor there, is damage worth looking into.</p>"
    ]
    for index, row in enumerate(rows, 1):
        title = (
            f"{index}. {text(row, 'part')}, window {count(number(row, 'window'))}, from token "
            f"{count(number(row, 'start'))}: mean KL {plain(number(row, 'kl_mean'), 3)} nats, "
            f"largest {plain(number(row, 'kl_max'), 3)}; the floor has "
            f"{plain(number(row, 'floor_kl_mean'), 3)} there"
        )
        told = text(row, "text")
        lines = "\n".join(escape_html(line) for line in told.splitlines())
        body = f"<pre>{lines}</pre>" if told else "<p>Its text is not kept.</p>"
        is_open = " open" if index == 1 else ""
        parts.append(
            f'<details id="{anchor}-{index}"{is_open}>\n'
            f"<summary>{escape_html(title)}</summary>\n{body}\n</details>"
        )
    return "\n".join(parts) + "\n</section>"
