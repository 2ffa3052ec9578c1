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
error among those quick to find, on some text; KL grows with the square of a perturbation, as e
does, so one measurement tells the others. Draft stages decide no token, only speed; theirs is the
least effect of the trunk.

Errors come from the real encoders on a sample: evenly spaced experts of a layer and the first rows
of a matrix, the same in every run. Types with a codebook take thirty times as long to search, and
what they lose differs from layer to layer as that of every type does. They are measured on fewer
experts and rows out of the same, evenly spaced, and their error is scaled by what the sample makes
of the yardstick, the quick type that loses most: e(whole) / e(part) of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant.allocation.findings import Findings
from v4quant.targets import Place, place_among, place_name
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.kl_sensitivity import measure_effects
from v4quant_calibration.rounding.solvers import optimal
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import TensorName, parse_name
from v4quant_formats.weight_reading import read_dense_rows
from v4quant_kernels import codec
from v4quant_kernels.ggml_types import has_codebook
from v4quant_kernels.progress import Progress
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import MXFP4, SCHEMES


@dataclass(frozen=True)
class Sample:
    """How much is looked at: experts of a layer, rows of a matrix; of these, for types with a
    codebook, slow_experts and slow_rows."""

    experts: int = 4
    rows: int = 256
    slow_experts: int = 1
    slow_rows: int = 32


@dataclass(frozen=True)
class Matrix:
    """A matrix of a place, its shape and its inputs' second moments [K]; its weight in sums."""

    module: str
    expert: int | None
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
    known: Findings | None = None,
) -> dict[Place, dict[str, float]]:
    """The error of every place in the schemes wanted for it, up to the first that is exact.

    shapes: logical shape of each module. wanted: schemes by size, the smallest
    first. known: what was found earlier. Raises what reading and encoding raise.
    """
    members = _matrices(shapes, set(wanted), stats, sample)
    progress.start("Error of each scheme", len(wanted), "place")
    found: dict[Place, dict[str, float]] = {}
    known = known or Findings()
    for place, schemes in wanted.items():
        name = f"error of {place_name(place)} in {','.join(schemes)}"
        if name not in known:
            whole = _read(checkpoint, members[place], sample.rows)
            known.add(name, _place_errors(whole, schemes, sample))
        found[place] = known.numbers(name)
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
    chosen = {experts[i] for i in _spaced(len(experts), count)}
    return [n for n in members if n.expert in chosen]


def _spaced(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly spaced and as far from the ends as from each other."""
    if length <= count:
        return list(range(length))
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _matrix(name: TensorName, shape: tuple[int, ...], stats: Stats | None) -> Matrix:
    if name.expert is None:
        return Matrix(name.module, name.expert, shape[0], shape[1], None, 1.0, name.module)
    importance, share = None, 1.0
    if stats is not None and name.stage in stats.stages:
        importance = stats.importance(name.module)
        # Nobody is left out: text to come may send tokens where the corpus sent none.
        share = float(stats.stages[name.stage].tokens[name.expert]) + 1.0
    assert name.projection is not None
    return Matrix(name.module, name.expert, shape[0], shape[1], importance, share, name.projection)


def _read(checkpoint: Checkpoint, members: Sequence[Matrix], most_rows: int) -> _Part:
    rows = ((m.module, min(m.rows, most_rows)) for m in members)
    return _Part(members, [read_dense_rows(checkpoint, m, 0, n).float() for m, n in rows])


@dataclass(frozen=True)
class _Part:
    """Matrices of a place and those of their rows that are looked at, float32 `[rows, K]`."""

    members: Sequence[Matrix]
    values: Sequence[Tensor]

    def error(self, scheme: str) -> float:
        """The summed relative noise in a scheme."""
        held = (
            rounded(v, scheme, m.importance) for m, v in zip(self.members, self.values, strict=True)
        )
        noise = self._summed([q - v for q, v in zip(held, self.values, strict=True)])
        signal = self._summed(self.values)
        return sum(noise[part] / total for part, total in signal.items() if total)

    def thinned(self, sample: Sample) -> _Part:
        """What types with a codebook are measured on."""
        experts = sorted({m.expert for m in self.members if m.expert is not None})
        kept = {None, *(experts[i] for i in _spaced(len(experts), sample.slow_experts))}
        pairs = [
            (m, v[_spaced(len(v), sample.slow_rows)])
            for m, v in zip(self.members, self.values, strict=True)
            if m.expert in kept
        ]
        return _Part([m for m, _ in pairs], [v for _, v in pairs])

    def _summed(self, values: Sequence[Tensor]) -> dict[str, float]:
        """Sum of h_j v_ij^2 in float64, by what is summed together, experts by their share."""
        found: dict[str, float] = {}
        for m, value in zip(self.members, values, strict=True):
            squares = value.double().square().sum(0)
            if m.importance is not None:
                squares = squares * m.importance.double()
            found[m.summed_with] = found.get(m.summed_with, 0.0) + m.share * float(squares.sum())
        return found


def _place_errors(whole: _Part, schemes: Sequence[str], sample: Sample) -> dict[str, float]:
    """The error in each scheme, by size, up to the first that is exact."""
    found: dict[str, float] = {}
    for scheme in schemes:
        if is_slow(scheme):
            continue
        found[scheme] = whole.error(scheme)
        if not found[scheme]:
            schemes = schemes[: schemes.index(scheme) + 1]  # what is larger cannot lose less
            break
    if slow := [s for s in schemes if is_slow(s)]:
        part = whole.thinned(sample)
        ratio = _ratio(found, part)
        found |= {s: ratio * part.error(s) for s in slow}
    return {s: found[s] for s in schemes}


def _ratio(quick: Mapping[str, float], part: _Part) -> float:
    """The yardstick's error on all that is looked at over its error on a part; 1 without one."""
    if not any(quick.values()):
        return 1.0
    scheme = yardstick(quick)
    own = part.error(scheme)
    return quick[scheme] / own if own else 1.0


def yardstick(found: Mapping[str, float]) -> str:
    """The scheme that loses most, one that is quick to find if any of those loses anything."""
    quick = {s: e for s, e in found.items() if not is_slow(s) and e}
    return max(quick or found, key=lambda s: found[s])


def is_slow(scheme: str) -> bool:
    """Whether weights are searched in a codebook."""
    return has_codebook(scheme)


def held_as(scheme: str, columns: int) -> str:
    """The scheme that rows of `columns` get where this one is asked for."""
    if scheme not in SCHEMES:
        return scheme
    found = SCHEMES[scheme].fitting(columns)
    return "bf16" if found is None else found.name


def rounded(values: Tensor, scheme: str, importance: Tensor | None) -> Tensor:
    """Float32 [N, K] as the export would hold it."""
    found = SCHEMES.get(held_as(scheme, values.shape[1]))
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
    known: Findings | None = None,
) -> dict[Place, float]:
    """The effect of every place of the trunk that can lose anything, others the least of these.

    known: what was found earlier.
    """
    places = [p for p in found if not p[0].startswith("mtp.") and max(found[p].values()) > 0]
    worst = {p: yardstick(found[p]) for p in places}

    def alter(place: Place, base: str, value: Tensor) -> Tensor:
        if place_among(parse_name(f"{base}.weight"), (place,)) is None:
            return value
        return rounded(value, worst[place], stats.importance(base) if stats else None)

    known = known or Findings()
    names = {p: f"KL of {place_name(p)} in {worst[p]}" for p in places}
    missing = [p for p in places if names[p] not in known]
    alters = [lambda base, value, p=p: alter(p, base, value) for p in missing]
    measure_effects(
        checkpoint, corpus, alters, progress, lambda i, kl: known.add(names[missing[i]], kl)
    )
    effects = {p: known.number(names[p]) / found[p][worst[p]] for p in places}
    least = min(effects.values(), default=1.0)
    return {p: effects.get(p, least) for p in found}
