"""The result of an evaluation as a typed tree, for programs; `as_dict()` is the JSON of reports.

Figures are computed as plain values (they go to JSON, to step caches and back); this gives those
that programs ask for names and types, and checks that they are what they should be. `as_dict()` has
every figure that docs/evaluation.md explains, these among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from v4quant_kernels.errors import V4QuantError


class ResultError(V4QuantError):
    """An object that is not an evaluation."""


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
    corpus left out because they cannot be read."""

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
    _figures: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def candidates(self) -> tuple[Evaluation, ...]:
        """This one and the others, smallest file first."""
        return tuple(sorted((self, *self.others), key=lambda one: one.candidate.bytes))

    @property
    def is_damaged(self) -> bool:
        """Whether some candidate holds matrices that look damaged."""
        return any(one.findings for one in (self, *self.others))

    def as_dict(self) -> dict[str, Any]:
        """All figures: the object that `--json` prints and that reports are made of."""
        return dict(self._figures)


def evaluation_from_dict(figures: Mapping[str, Any]) -> Evaluation:
    """The tree of an evaluation's figures. Raises ResultError naming the figure that is missing."""
    try:
        return _evaluation(figures, figures.get("reference"), figures.get("noise_floor"))
    except KeyError as error:
        raise ResultError(f"this is not an evaluation: {error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise ResultError(f"this is not an evaluation: {error}") from None


def _evaluation(figures: Mapping[str, Any], reference: Any, floor: Any) -> Evaluation:
    compared = "kl_mean" in figures
    verdict, found = figures.get("verdict"), figures.get("findings")
    return Evaluation(
        candidate=_facts(figures["candidate"]),
        reference=None if reference is None else _facts(reference),
        tokens=int(figures["tokens"]),
        perplexity=_perplexity(figures, "perplexity"),
        reference_perplexity=_perplexity(figures, "reference_perplexity") if compared else None,
        distance=_distance(figures) if compared else None,
        floor=_distance(floor) if floor is not None else None,
        verdict=None if verdict is None else _judgement(verdict),
        findings=None if found is None else tuple(map(_defect, found)),
        parts=tuple(map(_part, figures.get("corpora", ()))),
        others=tuple(_evaluation(other, reference, floor) for other in figures.get("others", ())),
        skipped_rows=int(figures.get("skipped_rows", 0)),
        _figures=figures,
    )


def _facts(table: Mapping[str, Any]) -> ModelFacts:
    bits = table["expert_bits_per_weight"]
    return ModelFacts(
        str(table["path"]), str(table["scheme"]), int(table["bytes"]),
        None if bits is None else float(bits),
    )  # fmt: skip


def _perplexity(table: Mapping[str, Any], name: str) -> Perplexity:
    return Perplexity(float(table[name]), float(table[f"{name}_stderr"]))


def _distance(table: Mapping[str, Any]) -> Distance:
    return Distance(**{name: float(table[name]) for name in Distance.__dataclass_fields__})


def _part(table: Mapping[str, Any]) -> TextPart:
    kl, top1 = (table.get(key) for key in ("kl_mean", "top1_agreement"))
    return TextPart(
        str(table["name"]), int(table["tokens"]), float(table["perplexity"]),
        None if kl is None else float(kl), None if top1 is None else float(top1),
    )  # fmt: skip


def _judgement(table: Mapping[str, Any]) -> Judgement:
    return Judgement(str(table["grade"]), table["above_floor"], str(table["text"]))


def _defect(table: Mapping[str, Any]) -> Defect:
    return Defect(str(table["where"]), str(table["problem"]))
