"""The result of an evaluation for programs: the figures that they ask for, under names.

What a run compared is there or None, and nothing else is taken for an evaluation. `figures` has all
that docs/evaluation.md explains, `as_dict()` the same as the JSON that `--json` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from v4quant.evaluation.figures import (
    Facts,
    Figures,
    FloorScores,
    PartScores,
    ResultError,
    Scores,
    VerdictFigures,
    figures_from_dict,
)


@dataclass(frozen=True)
class ModelFacts:
    """A checkpoint: its name, schemes of its experts, bytes of its files."""

    path: str
    scheme: str
    bytes: int
    expert_bits_per_weight: float | None


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss in nats per token, with its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Distance:
    """How far predictions moved: KL in nats per token, shares of tokens whose best guess (or best
    five) stayed, and the ratio of perplexities."""

    kl_mean: float
    kl_mean_stderr: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float


@dataclass(frozen=True)
class Judgement:
    """The verdict: grade in one word, whether above the noise floor (None: cannot be told), and the
    sentence for people."""

    grade: str
    above_floor: bool | None
    text: str


@dataclass(frozen=True)
class Defect:
    """A matrix that looks damaged, and why."""

    where: str
    problem: str


@dataclass(frozen=True)
class TextPart:
    """One file of the text: tokens scored, perplexity, and with a reference mean KL, in nats per
    token, and top-1 agreement."""

    name: str
    tokens: int
    perplexity: float
    kl_mean: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. distance, floor and verdict are None without a reference; findings
    are None where weights were not compared. parts: the files of the text that are long enough for
    figures of their own. others: further candidates of the same run. skipped_rows: rows of the
    corpus left out because they cannot be read. figures: all that was measured, typed, under the
    JSON's names."""

    candidate: ModelFacts
    reference: ModelFacts | None
    tokens: int
    perplexity: Perplexity
    reference_perplexity: Perplexity | None
    distance: Distance | None
    floor: Distance | None
    verdict: Judgement | None
    findings: tuple[Defect, ...] | None
    parts: tuple[TextPart, ...] = ()
    others: tuple[Evaluation, ...] = ()
    skipped_rows: int = 0
    figures: Figures = field(default=Figures(), repr=False, compare=False)
    _json: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def candidates(self) -> tuple[Evaluation, ...]:
        """This one and the others, smallest file first."""
        return tuple(sorted((self, *self.others), key=lambda one: one.candidate.bytes))

    @property
    def is_damaged(self) -> bool:
        """Whether some candidate holds matrices that look damaged."""
        return any(one.findings for one in (self, *self.others))

    def as_dict(self) -> dict[str, Any]:
        """All figures: the object that `--json` prints."""
        return dict(self._json)


def evaluation_from_dict(table: Mapping[str, Any]) -> Evaluation:
    """The evaluation that its JSON tells. Raises ResultError naming what is wrong with it."""
    try:
        figures = figures_from_dict(table)
        found = [_evaluation(one) for one in figures.everyone]
    except ResultError as error:
        raise ResultError(f"this is not an evaluation: {error}") from None
    others = [
        replace(one, _json=told)
        for one, told in zip(found[1:], table.get("others") or (), strict=True)
    ]
    return replace(found[0], others=tuple(others), figures=figures, _json=table)


def _evaluation(one: Figures) -> Evaluation:
    compared, floor, verdict = one.kl_mean is not None, one.noise_floor, one.verdict
    findings = one.findings
    return Evaluation(
        candidate=_facts(one.candidate),
        reference=None if one.reference == Facts() else _facts(one.reference),
        tokens=int(_known(one.tokens, "tokens")),
        perplexity=_perplexity(one, "perplexity"),
        reference_perplexity=_perplexity(one, "reference_perplexity") if compared else None,
        distance=_distance(one) if compared else None,
        floor=None if floor == FloorScores() else _distance(floor),
        verdict=None if verdict == VerdictFigures() else _judgement(verdict),
        findings=None if findings is None else tuple(Defect(f.where, f.problem) for f in findings),
        parts=tuple(map(_part, one.corpora)),
        skipped_rows=int(one.skipped_rows or 0),
        figures=one,
    )


def _known(value: float | None, name: str) -> float:
    if value is None:
        raise ResultError(f"'{name}' is missing")
    return value


def _facts(facts: Facts) -> ModelFacts:
    if not facts.path:
        raise ResultError("'path' of a checkpoint is missing")
    nbytes = int(_known(facts.bytes, "bytes"))
    return ModelFacts(facts.path, facts.scheme, nbytes, facts.expert_bits_per_weight)


def _perplexity(scores: Scores, name: str) -> Perplexity:
    value, error = (getattr(scores, key) for key in (name, f"{name}_stderr"))
    return Perplexity(_known(value, name), _known(error, f"{name}_stderr"))


def _distance(scores: Scores) -> Distance:
    return Distance(**{n: _known(getattr(scores, n), n) for n in Distance.__dataclass_fields__})


def _judgement(verdict: VerdictFigures) -> Judgement:
    return Judgement(verdict.grade, verdict.above_floor, verdict.text)


def _part(part: PartScores) -> TextPart:
    tokens, perplexity = _known(part.tokens, "tokens"), _known(part.perplexity, "perplexity")
    return TextPart(part.name, int(tokens), perplexity, part.kl_mean, part.top1_agreement)
