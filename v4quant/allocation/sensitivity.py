"""sensitivity: how much each place would lose in each scheme.

The loss of a place in a scheme is `effect * error`. The *error* is the output's relative noise: for
a matrix W [N, K] with inputs of second moments h [K],

    e = sum_ij h_j (W - Q(W))_ij^2 / sum_ij h_j W_ij^2,

with h = 1 where nothing was calibrated; over a layer's experts numerator and denominator are summed
with each expert's share of tokens. A place has the sum of its matrices' e: noise in gate and up
reaches their product independently, and to first order adds relative to it, as down's does. Where
a layer's experts are one place, all three matrices' are summed.

The *effect* is what relative noise in this place does to predictions. Unmeasured it is 1 for all:
layers count alike. Measured, it is KL / e with only this place rounded, to the scheme of the most
error, on some text; KL grows with the square of a perturbation, as e does, so one measurement tells
the others. Draft stages decide no token, only speed; theirs is the least effect of the trunk.

Errors come from the real encoders on a sample: evenly spaced experts of a layer and the first rows
of a matrix, the same in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant.targets import Place, place_among
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.kl_sensitivity import measure_effects
from v4quant_calibration.rounding.solvers import optimal
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import TensorName, parse_name
from v4quant_formats.weight_reading import read_dense_rows
from v4quant_kernels import codec
from v4quant_kernels.progress import Progress
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import MXFP4, SCHEMES


@dataclass(frozen=True)
class Sample:
    """How much is looked at: experts of a layer, rows of a matrix."""

    experts: int = 4
    rows: int = 256


@dataclass(frozen=True)
class Matrix:
    """A matrix of a place, its shape and its inputs' second moments [K]; its weight in sums."""

    module: str
    rows: int
    columns: int
    importance: Tensor | None
    share: float
    summed_with: str


def errors(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[Place, Sequence[str]],
    stats: Stats | None,
    sample: Sample,
    progress: Progress,
) -> dict[Place, dict[str, float]]:
    """The error of every place in the schemes wanted for it, up to the first that is exact.

    shapes: logical shape of each module. wanted: schemes by size, the smallest
    first. Raises what reading and encoding raise.
    """
    members = _matrices(shapes, set(wanted), stats, sample)
    progress.start("Error of each scheme", len(wanted), "place")
    found: dict[Place, dict[str, float]] = {}
    for place, schemes in wanted.items():
        found[place] = _place_errors(checkpoint, members[place], schemes, sample.rows)
        progress.advance(1)
    progress.finish()
    return found


def _matrices(
    shapes: Mapping[str, tuple[int, ...]], places: set[Place], stats: Stats | None, sample: Sample
) -> dict[Place, list[Matrix]]:
    names: dict[Place, list[TensorName]] = {place: [] for place in places}
    for module in shapes:
        name = parse_name(f"{module}.weight")
        if name is not None and (place := place_among(name, names)) is not None:
            names[place].append(name)
    return {
        place: [_matrix(n, shapes[n.module], stats) for n in _sampled(members, sample.experts)]
        for place, members in names.items()
    }


def _sampled(members: list[TensorName], count: int) -> list[TensorName]:
    """The matrices of `count` evenly spaced experts; of dense places all."""
    experts = sorted({n.expert for n in members if n.expert is not None})
    if len(experts) <= count:
        return members
    chosen = {experts[(2 * i + 1) * len(experts) // (2 * count)] for i in range(count)}
    return [n for n in members if n.expert in chosen]


def _matrix(name: TensorName, shape: tuple[int, ...], stats: Stats | None) -> Matrix:
    if name.expert is None:
        return Matrix(name.module, shape[0], shape[1], None, 1.0, name.module)
    importance, share = None, 1.0
    if stats is not None and name.stage in stats.stages:
        importance = stats.importance(name.module)
        # Nobody is left out: text to come may send tokens where the corpus sent none.
        share = float(stats.stages[name.stage].tokens[name.expert]) + 1.0
    assert name.projection is not None
    return Matrix(name.module, shape[0], shape[1], importance, share, name.projection)


def _place_errors(
    checkpoint: Checkpoint, members: Sequence[Matrix], schemes: Sequence[str], most_rows: int
) -> dict[str, float]:
    values = [
        read_dense_rows(checkpoint, m.module, 0, min(m.rows, most_rows)).float() for m in members
    ]
    signal = _summed(members, values)
    found: dict[str, float] = {}
    for scheme in schemes:
        differences = [
            rounded(v, scheme, m.importance) - v for m, v in zip(members, values, strict=True)
        ]
        noise = _summed(members, differences)
        found[scheme] = sum(noise[part] / total for part, total in signal.items() if total)
        if not found[scheme]:
            break  # whatever is larger cannot lose less
    return found


def _summed(members: Sequence[Matrix], values: Sequence[Tensor]) -> dict[str, float]:
    """Sum of h_j v_ij^2 in float64, by what is summed together, experts by their share."""
    found: dict[str, float] = {}
    for m, value in zip(members, values, strict=True):
        squares = value.double().square().sum(0)
        if m.importance is not None:
            squares = squares * m.importance.double()
        found[m.summed_with] = found.get(m.summed_with, 0.0) + m.share * float(squares.sum())
    return found


def rounded(values: Tensor, scheme: str, importance: Tensor | None) -> Tensor:
    """Float32 [N, K] as the export would hold it."""
    known = SCHEMES.get(scheme)
    found = None if known is None else known.fitting(values.shape[1])
    if found is None or found.is_plain:
        return values if scheme == "f32" else values.bfloat16().float()
    if not found.coder:
        return codec.dequantize(codec.quantize(values, found))
    return codec.dequantize(optimal(_as_released(values), found, importance).tensor)


def _as_released(values: Tensor) -> QTensor | Tensor:
    """MXFP4 for what it is, so that searches which know it may list its values."""
    coded = codec.quantize(values, MXFP4)
    return coded if torch.equal(codec.dequantize(coded), values) else values


def measure_kl(
    checkpoint: Checkpoint,
    found: Mapping[Place, Mapping[str, float]],
    corpus: Corpus,
    stats: Stats | None,
    progress: Progress,
) -> dict[Place, float]:
    """The effect of every place of the trunk that can lose anything, others the least of these."""
    places = [p for p in found if not p[0].startswith("mtp.") and max(found[p].values()) > 0]
    worst = {p: max(found[p], key=lambda s: found[p][s]) for p in places}

    def alter(place: Place, base: str, value: Tensor) -> Tensor:
        if place_among(parse_name(f"{base}.weight"), (place,)) is None:
            return value
        return rounded(value, worst[place], stats.importance(base) if stats else None)

    alters = [lambda base, value, p=p: alter(p, base, value) for p in places]
    kls = measure_effects(checkpoint, corpus, alters, progress)
    effects = {p: kl / found[p][worst[p]] for p, kl in zip(places, kls, strict=True)}
    least = min(effects.values(), default=1.0)
    return {p: effects.get(p, least) for p in found}
