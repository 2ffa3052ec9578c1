"""What to decide: a grade and a sentence for each candidate, who is dominated, whom to take.

A candidate is dominated when another one is no larger and no worse, and better in one of both. What
is left is the Pareto front: for every size the best that fits. One with suspected defects is never
recommended, whatever its KL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from v4quant.evaluation.figures import Figures
from v4quant.evaluation.report.text import size, text
from v4quant_calibration.evaluation.verdict import GRADES, Grade

SHORT: dict[Grade, str] = {
    "identical": "identical",
    "indistinguishable": "indistinguishable",
    "undecided": "undecided",
    "small": "small loss",
    "clear": "clearly worse",
    "damaged": "damaged",
    "damaged in places": "damaged in places",
}


def grade_text(grade: str) -> str:
    """A grade in few words; one of another version as it stands."""
    told = text(grade)
    return next((SHORT[g] for g in GRADES if g == told), told)


@dataclass(frozen=True)
class Decision:
    """One candidate. grade: in words; sentence: why. size, kl: infinite where not known.

    dominated_by: the name of a candidate that is no larger and no worse, "" where there is none.
    """

    name: str
    grade: str
    sentence: str
    size: float
    kl: float
    defects: int
    dominated_by: str = ""


def decisions(result: Figures) -> list[Decision]:
    """All candidates of a run, smallest first."""
    parts = [result, *result.others]
    names = distinct_names([text(p.candidate.path) for p in parts])
    found = [_decision(part, name) for part, name in zip(parts, names, strict=True)]
    return sorted((_beside(d, found) for d in found), key=lambda d: (d.size, d.kl))


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as it takes to tell them apart."""
    parts = [PurePath(path.replace("\\", "/")).parts or ("checkpoint",) for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(p) for p in parts]


def recommendations(found: Sequence[Decision]) -> list[str]:
    """A sentence for each member of the Pareto front, largest room first."""
    front = [d for d in found if not d.dominated_by and not d.defects and math.isfinite(d.size)]
    lines = []
    for index in range(len(front) - 1, -1, -1):
        one = front[index]
        above = size(front[index + 1].size) if index + 1 < len(front) else ""
        room = f"With room for {size(one.size)}" + (f" but not for {above}" if above else "")
        lines.append(f"{room}: {one.name} ({one.grade}).")
    return lines


def _decision(part: Figures, name: str) -> Decision:
    verdict, facts = part.verdict, part.candidate
    nbytes, kl = facts.bytes, part.kl_mean
    defects = len(part.findings or ())
    grade = grade_text(verdict.grade)
    sentence = text(verdict.text)
    if defects:
        grade = "suspected defects"
    return Decision(
        name, grade, sentence, math.inf if nbytes is None else nbytes,
        math.inf if kl is None or math.isnan(kl) else kl, defects,
    )  # fmt: skip


def _beside(one: Decision, everyone: Sequence[Decision]) -> Decision:
    for other in everyone:
        no_worse = other.size <= one.size and other.kl <= one.kl
        better = other.size < one.size or other.kl < one.kl
        if no_worse and better and not other.defects:
            return Decision(**{**vars(one), "dominated_by": other.name})
    return one
