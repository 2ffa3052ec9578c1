"""Tables of what ran beside the text: hidden sentences by depth, and the draft stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4quant.evaluation.report.tables import Table, build_table, named
from v4quant.evaluation.report.text import (
    count,
    number,
    numbers,
    percent,
    plain,
    records,
    section,
    text,
    with_error,
)

CHANGES = ("change", "noise_change")
LENGTH = "accepted_length_change"
Sides = tuple[Mapping[str, Any], Mapping[str, Any]]


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
        "Reference (nats per token)",
        "Candidate (nats per token)",
        "Change",
        "Change by noise",
    )
    length = number(needle, "seq_len")
    of = "" if length is None else f" in {count(length)} tokens"
    notes = (
        "A sentence with random digits is put into the text, at 0 % where it begins, at 100 % just "
        "before its end, and asked for there; the last row asks without it. A model that finds it "
        "loses little at every depth, and much in the last row.",
    )
    return build_table(f"A hidden sentence{of}", columns, rows, notes)


def draft_table(result: Mapping[str, Any]) -> Table | None:
    """How often the draft stages guess right, before and after."""
    draft = section(result, "draft")
    sides = section(draft, "reference"), section(draft, "candidate")
    guesses = number(draft, "block_size") or 1
    own = "Guess is what the model itself chooses there"
    rows: list[tuple[str, ...]] = [
        (own, *_shares(sides, "target_agreement"), *(_points(draft, k) for k in CHANGES)),
        ("Guess is the token of the text", *_shares(sides, "text_agreement"), "", ""),
    ]
    if guesses > 1:
        lengths = (_with_error(side, "accepted_length") for side in sides)
        changes = (_with_error(draft, k.replace("change", LENGTH)) for k in CHANGES)
        rows.append((f"Guesses accepted in a row, of {count(guesses)}", *lengths, *changes))
        rows += _positions(sides, "by_position", "Guess {} accepted")
        rows += _positions(sides, "confidence_by_position", "Guess {}: the draft's own estimate")
    rows = [row for row in rows if any(row[1:])]
    if text(draft, "note"):
        rows.append((text(draft, "note"), "", "", "", ""))
    notes: tuple[str, ...] = ()
    if rows and guesses > 1:
        notes = (
            "Every guess is held against what the model chooses behind the text before it. Where "
            "text is what the model would write itself, the guesses accepted in a row are those of "
            "greedy speculative decoding; each round gives one token of the model besides.",
        )
    title = "Draft stages (DSpark)" if guesses > 1 else "Draft stage (MTP)"
    return build_table(title, ("", *named(result), "Change", "Change by noise"), rows, notes)


def _shares(sides: Sides, key: str) -> tuple[str, ...]:
    found = []
    for side in sides:
        value, error = number(side, key), number(side, f"{key}_stderr")
        told = value is not None and error is not None
        found.append(f"{100 * value:.2f} ± {100 * error:.2f} %" if told else percent(value))  # type: ignore[operator]
    return tuple(found)


def _positions(sides: Sides, key: str, label: str) -> list[tuple[str, ...]]:
    """One row a guess of a block."""
    before, after = (numbers(side, key) for side in sides)
    rows: list[tuple[str, ...]] = []
    for place, share in enumerate(after):
        moved = f"{100 * (share - before[place]):+.2f} points" if before else ""
        rows.append(
            (
                label.format(place + 1),
                percent(before[place]) if before else "",
                percent(share),
                moved,
                "",
            )
        )
    return rows


def _points(draft: Mapping[str, Any], key: str) -> str:
    """A change of a share, in percentage points."""
    moved, error = number(draft, key), number(draft, f"{key}_stderr")
    return "" if moved is None else f"{100 * moved:+.2f} ± {100 * (error or 0):.2f} points"


def _with_error(values: Mapping[str, Any], key: str) -> str:
    return with_error(number(values, key), number(values, f"{key}_stderr"))
