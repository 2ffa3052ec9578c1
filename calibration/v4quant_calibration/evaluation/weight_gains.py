"""Weight gains: how much of its source a coded matrix still carries, and where that is odd.

The error of two bits is a third of a matrix and hides a great deal: everything scaled by 1.02, or a
row whose sign is flipped, hardly changes it. The gain <candidate, reference> / <reference,
reference> does not hide them. Rounding errors are independent of the weights and cancel in it, so
that a scheme's gain is the same in every layer to a part in a thousand, and the gains of a matrix's
rows scatter by its error over the root of their length. A factor on one layer, one matrix or one
row therefore stands out from its peers, however coarse the codes are. Peers are needed: what is
alone of its kind is not judged.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MAD_TO_SIGMA = 1.4826
# Of peers as of each other: how far apart in robust deviations, and at least by how much.
_ODD_Z = 8.0
_ODD_GAIN = 0.01
_LEAST_SIGMA = 5e-4
# Layers differ by this share of what they lost, because a solver weighs columns as its text asks.
_LAYERS_SHARE = 0.25
_FEWEST_PEERS = 4
_ODD_ROW_Z, _ODD_ROW_GAIN = 12.0, 0.4
# Rows this much smaller than the usual one share scales with others and may vanish beside them.
_FAINT = 1e-3
_STAGE = re.compile(r"^(layers|mtp)\.\d+\.")


@dataclass(frozen=True)
class Gain:
    """Of one matrix: its gain, and the row whose own is farthest from the others', if it is odd.

    odd_row: -1 where none is.
    """

    value: float
    odd_row: int = -1
    row_value: float = 0.0


class GainSums:
    """Collects a matrix piece by piece."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._dots: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, mine: Tensor, right: Tensor) -> None:
        """The next rows, `[N, K]` float32."""
        self._dots.append(_row_dots(mine, right))
        self._norms.append(_row_dots(right, right))

    def result(self) -> Gain:
        """The gain of what was added."""
        dots, norms = torch.cat(self._dots), torch.cat(self._norms)
        total = float(norms.sum())
        value = float(dots.sum()) / total if total else 1.0
        row = _odd_row(dots, norms)
        return Gain(value) if row is None else Gain(value, row, float(dots[row] / norms[row]))


def gain_of(mine: Tensor, right: Tensor) -> Gain:
    """The gain of a matrix at hand; `[N, K]` float32."""
    sums = GainSums()
    sums.add(mine, right)
    return sums.result()


def odd_layers(gains: Sequence[float]) -> list[int]:
    """Which layers have a gain unlike the others'; `output_gains` sees what solving hides here."""
    lost = abs(1 - statistics.median(gains)) if gains else 0.0
    return odd_ones(gains, _LAYERS_SHARE * lost)


def odd_ones(gains: Sequence[float], natural: float = 0.0) -> list[int]:
    """Which of some peers have a gain unlike the others'; none where there are few.

    natural: how far apart they are without a reason to worry.
    """
    if len(gains) < _FEWEST_PEERS:
        return []
    median = statistics.median(gains)
    mad = statistics.median(abs(g - median) for g in gains)
    least = max(_ODD_Z * max(_MAD_TO_SIGMA * mad, _LEAST_SIGMA), _ODD_GAIN, natural)
    return [i for i, g in enumerate(gains) if abs(g - median) > least]


def is_odd(gain: float, own: float) -> bool:
    """Whether a gain is not that of plain rounding either."""
    return abs(gain - own) > _ODD_GAIN


def is_odd_row(gain: float, own: float) -> bool:
    """The same of one row."""
    return abs(gain - own) > _ODD_ROW_GAIN


def peers(places: Sequence[tuple[str, str]]) -> Iterator[list[int]]:
    """Indices of places, (module, scheme), that are the same one in other layers."""
    alike: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, (where, scheme) in enumerate(places):
        if _STAGE.match(where):
            alike[_STAGE.sub(r"\1.", where), scheme].append(index)
    yield from alike.values()


def _odd_row(dots: Tensor, norms: Tensor) -> int | None:
    usual = float(norms.median())
    seen = (norms > _FAINT * usual).nonzero().flatten()
    if len(seen) < _FEWEST_PEERS or usual <= 0:
        return None
    gains = dots[seen] / norms[seen]
    away = (gains - gains.median()).abs()
    least = max(_ODD_ROW_Z * _MAD_TO_SIGMA * float(away.median()), _ODD_ROW_GAIN)
    worst = int(away.argmax())
    return int(seen[worst]) if float(away[worst]) > least else None


def _row_dots(a: Tensor, b: Tensor, rows: int = 512) -> Tensor:
    parts = (x.double() * y.double() for x, y in zip(a.split(rows), b.split(rows), strict=True))
    return torch.cat([p.sum(1) for p in parts])
