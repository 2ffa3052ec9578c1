"""Needle: does the model still find one sentence in a long text, wherever it stands?

Mean figures of a long text hardly notice whether far positions can be read: most tokens follow from
their neighbourhood. So a sentence with random digits is put into the text at several depths, and at
the end the text asks for them. The loss of the answer's tokens says how well they were found, and
the same text without the sentence says what guessing costs. In a converted model the loss may rise
at some depths only, where the indexer's choice or the compressed entries were damaged.

The windows run with the others, so that weights are read once; figures of the text leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.corpus.errors import CorpusError
from v4quant_calibration.evaluation.divergence import TokenRecords

PART = "needle"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SENTENCE = "\nThe secret code of the archive is{code}. Remember it.\n"
_QUESTION = "\nWhat is the secret code of the archive? The secret code of the archive is"
_SEED = 20260424
_GROUPS = 3
# So many needles a depth as keep the probe at about this many tokens, at least one.
_TOKENS = 65536
_MOST_TRIALS = 4


@dataclass(frozen=True)
class Placement:
    """One window: where its needle stands (None: nowhere), and its answer's tokens."""

    depth: float | None
    start: int
    stop: int


@dataclass(frozen=True)
class Needles:
    """Windows of one length with needles, and where each window's answer is."""

    part: CorpusPart
    placements: tuple[Placement, ...]


def make_needles(corpus: Corpus, encode: Callable[[str], Tensor], bos: int) -> Needles:
    """Needles in the corpus' own text, in windows as long as its longest.

    encode: text to int64 ids. Raises CorpusError when windows are too short.
    """
    length = max(len(window) for window in corpus.windows)
    hay = torch.cat([window[1:] for window in corpus.windows])
    windows: list[Tensor] = []
    placements: list[Placement] = []
    random = np.random.default_rng(_SEED)
    cases: tuple[float | None, ...] = (*DEPTHS, None)
    trials = min(_MOST_TRIALS, max(1, _TOKENS // (len(cases) * length)))
    for trial in range(trials):
        code = "".join(f" {n}" for n in random.integers(100, 1000, _GROUPS))
        sentence, answer = encode(_SENTENCE.format(code=code)), encode(code)
        end = torch.cat([encode(_QUESTION), answer])
        room = length - 1 - len(sentence) - len(end)
        if room < len(sentence):
            raise CorpusError(
                f"--needle needs windows of at least {1 + 2 * len(sentence) + len(end)} tokens, "
                f"these have {length}; give a longer --seq-len"
            )
        for depth in cases:
            text = _stretch(hay, trial * room, room + (len(sentence) if depth is None else 0))
            cut = len(text) if depth is None else round(depth * len(text))
            middle = sentence[:0] if depth is None else sentence
            windows.append(torch.cat([torch.tensor([bos]), text[:cut], middle, text[cut:], end]))
            placements.append(Placement(depth, length - len(answer), length))
    return Needles(CorpusPart(PART, windows), tuple(placements))


def needle_figures(
    needles: Needles, candidate: TokenRecords, floors: Sequence[TokenRecords]
) -> dict[str, Any]:
    """`needle` of the result: mean loss of the answers' tokens by depth, in nats per token.

    candidate, floors: records of the needles' windows alone, in order. The row whose depth is None
    is the text without a needle.
    """
    rows = []
    places = _answers(needles)
    for depth in (*DEPTHS, None):
        here = torch.cat(
            [p for p, at in zip(places, needles.placements, strict=True) if at.depth == depth]
        )
        row: dict[str, Any] = {"depth": depth, "tokens": len(here)}
        row["nll"] = float(candidate.nll[here].mean())
        if candidate.nll_reference is not None:
            row["reference_nll"] = float(candidate.nll_reference[here].mean())
            changes = [float(f.nll[here].mean()) - row["reference_nll"] for f in floors]
            row["floor_change"] = max(changes, key=abs)
        rows.append(row)
    return {"seq_len": len(needles.part.windows[0]), "depths": rows}


def _answers(needles: Needles) -> list[Tensor]:
    """By window, the places of its answer's tokens among all records."""
    places, first = [], 0
    for window, place in zip(needles.part.windows, needles.placements, strict=True):
        # Record i of a window is about its token i + 1.
        places.append(torch.arange(first + place.start - 1, first + place.stop - 1))
        first += len(window) - 1
    return places


def _stretch(hay: Tensor, start: int, length: int) -> Tensor:
    """`length` tokens from `start` on, from the front again where the text ends."""
    return hay[(torch.arange(length) + start) % len(hay)]
