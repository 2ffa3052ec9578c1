"""Weight errors: every matrix of a conversion against its source, and the ones that stand out.

End results forgive much: an expert with doubled scales that few tokens visit hides below ordinary
rounding. Its weights do not hide. Each matrix is decoded from both files, one at a time, and its
error taken relative to its source, ||candidate - reference|| / ||reference||. Siblings (the same
projection of all experts of a layer) are coded alike and trained alike, so their errors agree
within some percent. A matrix is suspected when it lies far above its siblings (robust z-score) or
far above what its scheme costs, or carries more or less of its source than they do
(`weight_gains.py`), and reported when it also exceeds what coding *this* reference
matrix by the same scheme would cost: heavy tails and unlucky exponents explain themselves that way
and raise no alarm, and where a scheme holds the values exactly any difference is a finding. What
the defect looks like is asked of the suspects alone (`weight_defects.py`). What a conversion
recorded of its own errors is measured here in the same way, so a matrix whose error is another one
now was changed since, however small the change.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from v4quant_calibration.evaluation.coded_matrix import (
    NEGLIGIBLE,
    MatrixError,
    WeightShapeError,
    expected_error,
    measure,
)
from v4quant_calibration.evaluation.odd_gains import odd_gains, schemes_of
from v4quant_calibration.evaluation.other_tensors import differences
from v4quant_calibration.evaluation.weight_defects import explain
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import TensorName, parse_name
from v4quant_formats.weights import find_weight
from v4quant_kernels.progress import Progress

__all__ = ["NEGLIGIBLE", "WeightShapeError", "compare_weights", "expected_error", "robust_z"]

SUSPECT_Z = 6.0
# A suspect's error over that of coding its reference by plain rounding. Searches that weigh errors
# by importance, and GPTQ, stay below; a factor of two in a scale is far above.
_ABOVE_OWN = 1.5
_ABOVE_GROUP = 2.0
# Errors of siblings differ by some percent without any defect, however small their MAD comes out.
_NATURAL_SPREAD = 0.05
_MAD_TO_SIGMA = 1.4826
# How far an error may be from what the conversion recorded: sums in another order, on a GPU.
_RECORDED = 1e-3
_VOCABULARY = ("embed", "head")
# Suspects of one group that are examined: a file that is wrong throughout needs no more.
_MOST_CHECKED = 8


@dataclass(frozen=True)
class Finding:
    """A suspected defect: the module (or `...experts.*.w1` for all of a layer) and what it is."""

    where: str
    problem: str


@dataclass(frozen=True)
class SiblingErrors:
    """The errors of one projection over a layer's experts, or of one other matrix.

    mean, median, largest: relative errors; worst: the module with the largest. expected: relative
    error of coding the median matrix's reference by the same scheme; 0 when all are exact, None
    when the scheme cannot be repeated here.
    """

    stage: str
    where: str
    scheme: str
    matrices: int
    mean: float
    median: float
    largest: float
    worst: str
    expected: float | None


@dataclass(frozen=True)
class WeightComparison:
    """All sibling groups, and what does not fit."""

    groups: tuple[SiblingErrors, ...]
    findings: tuple[Finding, ...]


def compare_weights(
    reference: Checkpoint,
    candidates: Sequence[Checkpoint],
    progress: Progress,
    recorded: Sequence[Mapping[str, float]] = (),
) -> list[WeightComparison]:
    """Compare every linear matrix of the reference, its embedding and its head, with each
    candidate's, and find what else differs (`other_tensors.py`).

    Trunk and drafts; modules a candidate lacks (dropped drafts) are passed over. Each reference
    matrix is decoded once for the measurement. Memory: one matrix of the reference and one
    candidate, or 2^25 weights of a larger one, in float32.
    recorded: for each candidate, by module, the relative errors that its conversion from this
    reference wrote down; nothing where it is from elsewhere.
    Raises WeightShapeError and what reading a damaged weight raises.
    """
    names = _matrices(reference)
    held = [{n.module for spec in c if (n := parse_name(spec.name))} for c in candidates]
    siblings: list[defaultdict[str, list[MatrixError]]] = [defaultdict(list) for _ in candidates]
    progress.start("Weights", len(names), "matrix")
    for name in names:
        present = [i for i, modules in enumerate(held) if name.module in modules]
        measured = measure(reference, [candidates[i] for i in present], name)
        for i, error in zip(present, measured, strict=True):
            siblings[i][_group(name)].append(error)
        progress.advance(1)
    progress.finish()
    written = recorded or [{} for _ in candidates]
    return [
        _judge_all(groups, reference, candidate, errors)
        for groups, candidate, errors in zip(siblings, candidates, written, strict=True)
    ]


def robust_z(errors: Sequence[float]) -> list[float]:
    """Distance of each error from the median, in robust standard deviations.

    The deviation is 1.4826 times the median absolute deviation, at least 5 % of the median and
    NEGLIGIBLE, so that siblings which agree almost perfectly do not accuse each other.
    """
    median = statistics.median_low(errors)
    mad = statistics.median(abs(e - median) for e in errors)
    sigma = max(_MAD_TO_SIGMA * mad, _NATURAL_SPREAD * median, NEGLIGIBLE)
    return [(e - median) / sigma for e in errors]


def _matrices(reference: Checkpoint) -> list[TensorName]:
    """Linear modules, the embedding and the head, in the order of the files."""
    modules: dict[str, TensorName] = {}
    for spec in reference:
        name = parse_name(spec.name)
        if name is not None and (name.is_linear or name.module in _VOCABULARY):
            modules.setdefault(name.module, name)
    return list(modules.values())


def _judge_all(
    siblings: Mapping[str, list[MatrixError]],
    reference: Checkpoint,
    candidate: Checkpoint,
    recorded: Mapping[str, float],
) -> WeightComparison:
    groups, findings = [], []
    for where, members in siblings.items():
        group, found = _judge(where, members, reference, candidate)
        groups.append(group)
        findings += found
    named = {f.where for f in findings}
    findings += [Finding(*told) for told in odd_gains(siblings, named, reference, candidate)]
    named = {f.where for f in findings}
    for where, members in siblings.items():
        left = [m for m in members if not {where, m.name.module} & named]
        findings += _changed(where, left, recorded)
    findings += [Finding(*told) for told in differences(reference, candidate)]
    return WeightComparison(tuple(groups), tuple(findings))


def _changed(
    where: str, members: Sequence[MatrixError], recorded: Mapping[str, float]
) -> list[Finding]:
    """Matrices whose error is not what the conversion recorded; one finding if most are."""
    changed = [
        (m, recorded[m.name.module])
        for m in members
        if m.name.module in recorded
        and abs(m.relative_error - recorded[m.name.module])
        > _RECORDED * recorded[m.name.module] + NEGLIGIBLE
    ]
    together = len(changed) > 1 and 2 * len(changed) > len(members)
    findings = []
    for member, was in changed[:1] if together else changed[:_MOST_CHECKED]:
        told = f"in {len(changed)} of {len(members)} matrices, " if together else ""
        told += f"relative weight error {member.relative_error:.5g}, its conversion recorded "
        told += f"{was:.5g}: the file was changed since"
        findings.append(Finding(where if together else member.name.module, told))
    return findings


def _group(name: TensorName) -> str:
    if name.expert is None:
        return name.module
    return f"{name.stage}.ffn.experts.*.{name.projection}"


def _judge(
    where: str, members: list[MatrixError], reference: Checkpoint, candidate: Checkpoint
) -> tuple[SiblingErrors, list[Finding]]:
    """Statistics of one group, and findings about its members or about all of it."""
    errors = [m.relative_error for m in members]
    middle = min(members, key=lambda m: abs(m.relative_error - statistics.median_low(errors)))
    worst = max(members, key=lambda m: m.relative_error)
    expected: float | None = 0.0
    suspects: list[MatrixError] = []
    if worst.relative_error > NEGLIGIBLE:
        expected = _expected(reference, candidate, middle)
        bound = float("inf") if expected is None else _ABOVE_GROUP * expected + NEGLIGIBLE
        suspects = [
            m
            for m, z in zip(members, robust_z(errors), strict=True)
            if z > SUSPECT_Z or m.relative_error > bound
        ]
    group = SiblingErrors(
        stage=members[0].name.stage,
        where=where,
        scheme=schemes_of(members),
        matrices=len(members),
        mean=statistics.fmean(errors),
        median=statistics.median_low(errors),
        largest=worst.relative_error,
        worst=worst.name.module,
        expected=expected,
    )
    return group, _confirm(group, suspects, reference, candidate)


def _confirm(
    group: SiblingErrors, suspects: list[MatrixError], reference: Checkpoint, candidate: Checkpoint
) -> list[Finding]:
    """Suspects whose error their own reference does not explain; one finding if most are."""
    # A search beats plain rounding by the same share in all siblings, so it is asked of each.
    share = min(1.0, group.median / group.expected) if group.expected else 1.0
    suspects = sorted(suspects, key=lambda m: -m.relative_error)
    checked = suspects[:_MOST_CHECKED]
    confirmed: list[tuple[MatrixError, float | None]] = []
    for suspect in checked:
        own = _expected(reference, candidate, suspect)
        if own is None or suspect.relative_error > _ABOVE_OWN * share * own + NEGLIGIBLE:
            confirmed.append((suspect, own))
    # The worst speak for the rest.
    count = len(suspects) if len(confirmed) == len(checked) else len(confirmed)
    together = count > 1 and (2 * count > group.matrices or count > _MOST_CHECKED)
    findings = []
    for suspect, own in confirmed[:1] if together else confirmed:
        module = suspect.name.module
        others = [m.name.module for m, _ in confirmed if m.name.module != module]
        like = explain(reference, candidate, suspect.name, suspect.relative_error, others)
        told = _problem(group, suspect, own, count if together else 0)
        where = group.where if together else module
        findings.append(Finding(where, "; ".join(filter(None, (told, like)))))
    return findings


def _problem(group: SiblingErrors, suspect: MatrixError, own: float | None, count: int) -> str:
    told = f"relative weight error {suspect.relative_error:.3g}"
    if count:
        told = f"in {count} of {group.matrices} experts, {told} at worst"
    if own is not None:
        limit = f"about {own:.2g}" if own > NEGLIGIBLE else "nothing"
        told += f", plain rounding to {suspect.scheme} costs {limit}"
    if group.matrices > 1 and not count:
        told += f" (median of its {group.matrices} siblings: {group.median:.2g})"
    return told


def _expected(reference: Checkpoint, candidate: Checkpoint, member: MatrixError) -> float | None:
    module = member.name.module
    return expected_error(reference, module, find_weight(candidate, module))
