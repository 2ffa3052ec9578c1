"""Tables of what ran beside the text: hidden sentences by depth, and the draft stages."""

from __future__ import annotations

from v4quant.evaluation.figures import Draft, DraftShares, Figures
from v4quant.evaluation.report.tables import Table, build_table, named
from v4quant.evaluation.report.text import (
    count,
    percent,
    plain,
    text,
    with_error,
)

CHANGES = ("change", "noise_change")
LENGTH = "accepted_length_change"
Sides = tuple[DraftShares, DraftShares]


def needle_table(result: Figures) -> Table | None:
    """Loss of the answer's tokens by the depth at which the sentence stands."""
    needle = result.needle
    rows = []
    for row in needle.depths:
        depth = row.depth
        before, after, noise = (getattr(row, k) for k in ("reference_nll", "nll", "floor_change"))
        rows.append(
            (
                "no such sentence" if depth is None else f"{100 * depth:.0f} %",
                count(row.tokens),
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
    length = needle.seq_len
    of = "" if length is None else f" in {count(length)} tokens"
    notes = (
        "A sentence with random digits is put into the text, at 0 % where it begins, at 100 % just "
        "before its end, and asked for there; the last row asks without it. A model that finds it "
        "loses little at every depth, and much in the last row.",
    )
    return build_table(f"A hidden sentence{of}", columns, rows, notes)


def draft_table(result: Figures) -> Table | None:
    """How often the draft stages guess right, before and after."""
    draft = result.draft
    sides = draft.reference, draft.candidate
    guesses = draft.block_size or 1
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
    if text(draft.note):
        rows.append((text(draft.note), "", "", "", ""))
    notes: tuple[str, ...] = ()
    if rows and guesses > 1:
        notes = (
            "Every guess is held against what the model chooses behind the text before it. Where "
            "text is what the model would write itself, the guesses accepted in a row are those of "
            "greedy speculative decoding; each round yields one more token, the model's own.",
        )
    title = "Draft stages (DSpark)" if guesses > 1 else "Draft stage (MTP)"
    return build_table(title, ("", *named(result), "Change", "Change by noise"), rows, notes)


def _shares(sides: Sides, key: str) -> tuple[str, ...]:
    found = []
    for side in sides:
        value, error = getattr(side, key), getattr(side, f"{key}_stderr")
        told = value is not None and error is not None
        found.append(f"{100 * value:.2f} ± {100 * error:.2f} %" if told else percent(value))
    return tuple(found)


def _positions(sides: Sides, key: str, label: str) -> list[tuple[str, ...]]:
    """One row a guess of a block."""
    before, after = (getattr(side, key) for side in sides)
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


def _points(draft: Draft, key: str) -> str:
    """A change of a share, in percentage points."""
    moved, error = getattr(draft, key), getattr(draft, f"{key}_stderr")
    return "" if moved is None else f"{100 * moved:+.2f} ± {100 * (error or 0):.2f} points"


def _with_error(values: Draft | DraftShares, key: str) -> str:
    return with_error(getattr(values, key), getattr(values, f"{key}_stderr"))
