"""Needles: where they are put, and whose tokens the figures are about."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.support.conversion import TINY
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.corpus.errors import CorpusError
from v4quant_calibration.evaluation.divergence import TokenRecords
from v4quant_calibration.evaluation.evaluate import Measures, evaluate_all
from v4quant_calibration.evaluation.needle import DEPTHS, make_needles, needle_figures
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

HAY = 300


def encode(text: str) -> Tensor:
    """Bytes as tokens."""
    return torch.tensor(list(text.encode()))


def corpus_of(count: int, length: int) -> Corpus:
    """Hay is token 300 only, after a BOS."""
    return Corpus([CorpusPart("hay", [torch.tensor([0] + [HAY] * (length - 1))] * count)])


@pytest.mark.parametrize("length", [260, 1000])
def test_needles_stand_where_they_should(length: int) -> None:
    needles = make_needles(corpus_of(2, length), encode, 0)
    assert len(needles.placements) == 4 * 6
    codes = set()
    for window, place in zip(needles.part.windows, needles.placements, strict=True):
        assert len(window) == length and window[0] == 0
        body = bytes(t if t < 256 else 0 for t in window[1:].tolist())
        answer = bytes(window[place.start : place.stop].tolist()).decode()
        codes.add(answer)
        assert place.stop == length
        at = body.find(f"The secret code of the archive is{answer}. ".encode())
        if place.depth is None:
            assert at == -1 and body.count(answer.encode()) == 1
            continue
        hay_before = int((window[: at + 1] == HAY).sum())
        hay = int((window == HAY).sum())
        assert hay_before == pytest.approx(place.depth * hay, abs=1)
    assert len(codes) == 4  # a trial's depths share a code


def test_short_windows_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"at least \d+ tokens, these have 200"):
        make_needles(corpus_of(2, 200), encode, 0)


def test_figures_are_of_the_answers() -> None:
    needles = make_needles(corpus_of(1, 260), encode, 0)
    nll, base = [], []
    for place in needles.placements:
        depth = 9.0 if place.depth is None else place.depth
        # Record i is about token i + 1.
        answer = [place.start <= i + 1 < place.stop for i in range(259)]
        nll += [depth if hit else 100.0 for hit in answer]
        base += [depth - 0.5 if hit else 100.0 for hit in answer]
    where = torch.zeros(len(nll), dtype=torch.int64)
    records = TokenRecords(
        torch.tensor(nll).double(), where, where, nll_reference=torch.tensor(base).double()
    )
    found = needle_figures(needles, records, [records])
    assert [row["depth"] for row in found["depths"]] == [*DEPTHS, None]
    for row in found["depths"]:
        depth = 9.0 if row["depth"] is None else row["depth"]
        assert row["nll"] == depth and row["reference_nll"] == depth - 0.5
        assert row["floor_change"] == 0.5
        assert row["tokens"] == 4 * 12
    assert found["seq_len"] == 260


def test_needles_run_beside_the_text_and_leave_its_figures_alone(
    generator: torch.Generator,
) -> None:
    windows = [torch.randint(1, 384, (230,), generator=generator) for _ in range(2)]
    corpus = Corpus([CorpusPart("text", windows)])
    needles = make_needles(corpus, encode, 0)
    few = type(needles)(CorpusPart("needle", needles.part.windows[:6]), needles.placements[:6])
    results = []
    for measures in (Measures(), Measures(needles=few)):
        with open_checkpoint(TINY) as mine, open_checkpoint(TINY) as base:
            (found,) = evaluate_all(
                [mine], base, corpus, ForwardOptions(), SilentProgress(), measures=measures
            )
        results.append(json.loads(json.dumps(found)))
    alone, both = results
    assert [row["depth"] for row in both["needle"]["depths"]] == [*DEPTHS, None]
    for row in both["needle"]["depths"]:
        assert row["nll"] == row["reference_nll"] > 0
    assert both["tokens"] == alone["tokens"] == 2 * 229
    assert both["nll"] == pytest.approx(alone["nll"], rel=1e-6)
    assert [part["name"] for part in both["corpora"]] == ["text"]
