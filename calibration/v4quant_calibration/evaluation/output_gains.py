"""Output gains: layers whose experts answer louder or softer than their peers', on a text.

The weights of solved codes do not tell small factors: a solver trades errors of one column for
those of another as its text asks, so that the share of the source that a layer's weights carry
differs by layer, at two bits by a percent. What it holds fixed is the answer. The share of the
reference's output that experts still give on the same input, <candidate, reference> / <reference,
reference>, is alike in all layers of a scheme to half a percent even there, and a factor of 1.02 on
an expert's three matrices is one of 1.05 in it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# From its peers: how far in their standard deviations, or in its own sample's where that is more;
# at least by how much, and by which share of what the scheme loses anyway.
_ODD_Z, _ODD_GAIN, _NATURAL_SHARE = 5.0, 0.02, 0.25
_MAD_TO_SIGMA = 1.4826
_FEWEST_PEERS = 4


@dataclass(frozen=True)
class OutputGain:
    """Of one layer's experts on a sample of tokens: the gain of all, and its standard error."""

    value: float
    stderr: float


def odd_outputs(
    gains: Mapping[str, OutputGain], schemes: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(experts of a layer, what is odd), layers compared with those of the same scheme.

    Both are by layer; schemes: how its experts are stored, in words.
    """
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for layer in gains:
        if layer in schemes:
            alike[schemes[layer]].append(layer)
    for layers in alike.values():
        if len(layers) >= _FEWEST_PEERS:
            yield from _odd_among(layers, [gains[layer] for layer in layers])


def _odd_among(layers: Sequence[str], gains: Sequence[OutputGain]) -> Iterator[tuple[str, str]]:
    for index, (layer, gain) in enumerate(zip(layers, gains, strict=True)):
        others = [*gains[:index], *gains[index + 1 :]]
        middle = statistics.median(g.value for g in others)
        spread = statistics.median(abs(g.value - middle) for g in others)
        sigma = max(_MAD_TO_SIGMA * spread, gain.stderr)
        least = max(_ODD_Z * sigma, _ODD_GAIN, _NATURAL_SHARE * abs(1 - middle))
        if abs(gain.value - middle) > least:
            yield (
                f"{layer}.ffn.experts.*",
                f"their outputs carry {gain.value:.4g} of the reference's, the other layers' "
                f"{middle:.4g}; check this layer's scales",
            )
