"""odd_gains: layers, matrices and rows that carry more or less of their source than their peers.

Each suspect is compared with plain rounding of its own source, so that what a scheme does to
unusual weights accuses nobody.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from v4quant_calibration.evaluation.coded_matrix import (
    NEGLIGIBLE,
    MatrixError,
    coded_as,
    pieces,
    read_piece,
)
from v4quant_calibration.evaluation.weight_gains import (
    GainSums,
    gain_of,
    is_odd,
    is_odd_row,
    odd_layers,
    odd_ones,
    peers,
)
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.weights import find_weight
from v4quant_kernels.errors import UnsupportedScheme

_MOST_CHECKED = 8  # of one group

Told = tuple[str, str]
"""A module, or all of a layer, and what is odd."""


@dataclass(frozen=True)
class OwnGain:
    """What plain rounding carries of a matrix and of one row of it."""

    value: float
    row: float


def odd_gains(
    siblings: Mapping[str, Sequence[MatrixError]],
    named: Set[str],
    reference: Checkpoint,
    candidate: Checkpoint,
) -> Iterator[Told]:
    """What is odd in groups of siblings, by where they are; `named` are told of already."""
    coarse = {w: m for w, m in siblings.items() if w not in named and _is_coarse(m)}
    layers = dict(_odd_layers(coarse, reference, candidate))
    yield from layers.items()
    for where, members in coarse.items():
        left = [m for m in members if m.name.module not in named]
        yield from _odd_members(left, where in layers, reference, candidate)


def _odd_layers(
    groups: Mapping[str, Sequence[MatrixError]], reference: Checkpoint, candidate: Checkpoint
) -> Iterator[Told]:
    places = [(where, schemes_of(members)) for where, members in groups.items()]
    # The median: one bad matrix is told of by itself.
    middles = [statistics.median(m.gain.value for m in members) for members in groups.values()]
    for alike in peers(places):
        usual = statistics.median(middles[i] for i in alike)
        for i in (alike[k] for k in odd_layers([middles[k] for k in alike])):
            where = places[i][0]
            first = groups[where][0]
            if is_odd(first.gain.value, _own_gain(reference, candidate, first).value):
                factor = middles[i] / usual if usual else 0.0
                yield where, f"looks multiplied by {factor:.4g} beside the other layers"


def _odd_members(
    members: Sequence[MatrixError],
    layer_is_odd: bool,
    reference: Checkpoint,
    candidate: Checkpoint,
) -> Iterator[Told]:
    gains = [m.gain.value for m in members]
    odd = {members[i].name.module for i in odd_ones(gains)}
    suspects = [m for m in members if m.name.module in odd or m.gain.odd_row >= 0]
    for member in suspects[:_MOST_CHECKED]:
        module, gain = member.name.module, member.gain
        own, usual = _own_gain(reference, candidate, member), statistics.median(gains)
        if gain.odd_row >= 0 and is_odd_row(gain.row_value, own.row):
            flipped = "; its sign looks flipped" if gain.row_value < -gain.value / 2 else ""
            yield (
                module,
                f"row {gain.odd_row} carries {gain.row_value:.2g} of its source, the others "
                f"{gain.value:.2g}{flipped}",
            )
        elif module in odd and not layer_is_odd and is_odd(gain.value, own.value):
            factor = gain.value / usual if usual else 0.0
            yield module, f"looks multiplied by {factor:.4g} beside its siblings"


def schemes_of(members: Sequence[MatrixError]) -> str:
    """How a group is stored, in words."""
    return ", ".join(sorted({m.scheme for m in members}))


def _is_coarse(members: Sequence[MatrixError]) -> bool:
    """Whether a group is rounded: where it is exact, any difference is found without gains."""
    return statistics.median_low([m.relative_error for m in members]) > NEGLIGIBLE


def _own_gain(reference: Checkpoint, candidate: Checkpoint, member: MatrixError) -> OwnGain:
    """What plain rounding of the reference's matrix carries, of all and of the member's odd row."""
    module = member.name.module
    target = find_weight(candidate, module)
    sums, first, row_value = GainSums(), 0, 1.0
    try:
        for piece in pieces(find_weight(reference, module).shape):
            dense = read_piece(reference, module, piece)
            coded = coded_as(reference, module, target, dense, piece)
            sums.add(coded, dense)
            row = member.gain.odd_row - first
            if 0 <= row < len(dense):
                row_value = gain_of(coded[row : row + 1], dense[row : row + 1]).value
            first += len(dense)
    except UnsupportedScheme:
        return OwnGain(1.0, 1.0)
    return OwnGain(sums.result().value, row_value)
