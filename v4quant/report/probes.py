"""Tables of what ran beside the text: hidden sentences by depth, and the draft stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4quant.report.tables import Table, build_table
from v4quant.report.text import count, number, plain, records, section


def needle_table(result: Mapping[str, Any]) -> Table | None:
    """Loss of the answer's tokens by the depth at which the sentence stands."""
    needle = section(result, "needle")
    rows = []
    for row in records(needle, "depths"):
        depth = number(row, "depth")
        before, after, noise = (number(row, k) for k in ("reference_nll", "nll", "floor_change"))
        rows.append(
            (
                "no such sentence" if depth is None else f"{100 * depth:.0f} %",
                count(number(row, "tokens")),
                plain(before),
                plain(after),
                "" if before is None or after is None else f"{after - before:+.4f}",
                "" if noise is None else f"{noise:+.4f}",
            )
        )
    columns = (
        "Depth",
        "Answer tokens",
        "Reference (nats a token)",
        "Candidate (nats a token)",
        "Change",
        "Change by noise",
    )
    length = number(needle, "seq_len")
    of = "" if length is None else f" in {count(length)} tokens"
    notes = (
        "A sentence with random digits is put into the text and asked for at its end; the last row "
        "asks without it. A model that finds it loses little at every depth.",
    )
    return build_table(f"A hidden sentence{of}", columns, rows, notes)
