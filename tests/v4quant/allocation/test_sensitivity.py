"""Errors of types that are slow to search: found on a part, as good as on all of it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from v4quant.allocation import sensitivity
from v4quant.allocation.sensitivity import Sample, errors, rounded, yardstick
from v4quant.builtin import TINY_V4, resolve_source
from v4quant.targets import Place
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.progress import SilentProgress

SOURCE = Path(resolve_source(TINY_V4))
PLACE = ("layers.4", "down")
SHAPES = {f"layers.4.ffn.experts.{e}.w2": (256, 256) for e in range(16)}
SCHEMES = ["iq2_xxs", "q2_0", "q2_k"]


@dataclass
class Looked:
    """What was encoded, and as what."""

    rows: dict[str, int] = field(default_factory=dict)


def _found(sample: Sample, wanted: list[str]) -> dict[str, float]:
    places: dict[Place, list[str]] = {PLACE: wanted}
    with open_checkpoint(SOURCE) as checkpoint:
        return errors(checkpoint, SHAPES, places, None, sample, SilentProgress())[PLACE]


def test_a_part_stands_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's 32 rows instead of four times 128, the same every time, within a tenth."""
    looked = Looked()

    def counted(values: torch.Tensor, scheme: str, importance: torch.Tensor | None) -> torch.Tensor:
        looked.rows[scheme] = looked.rows.get(scheme, 0) + len(values)
        return rounded(values, scheme, importance)

    monkeypatch.setattr(sensitivity, "rounded", counted)
    part = _found(Sample(4, 128), SCHEMES)
    assert looked.rows == {"iq2_xxs": 32, "q2_0": 4 * 128 + 32, "q2_k": 4 * 128}
    assert part == _found(Sample(4, 128), SCHEMES)
    whole = _found(Sample(4, 128, 4, 128), SCHEMES)
    assert part["iq2_xxs"] == pytest.approx(whole["iq2_xxs"], rel=0.1)
    assert part["iq2_xxs"] != whole["iq2_xxs"]
    assert {s: part[s] for s in SCHEMES[1:]} == {s: whole[s] for s in SCHEMES[1:]}


def test_the_part_is_scaled_by_the_yardstick() -> None:
    """By the definition, from the rows that are looked at."""
    seed = secrets.randbits(32)
    rows = 1 + seed % 7
    found = _found(Sample(16, 8, 1, rows), SCHEMES)
    with open_checkpoint(SOURCE) as checkpoint:
        x = read_dense(checkpoint, "layers.4.ffn.experts.8.w2").float()[:8]
    x = x[[(2 * i + 1) * 8 // (2 * rows) for i in range(rows)]]

    def noise(scheme: str) -> float:
        energy = float(x.double().square().sum())
        return float((rounded(x, scheme, None) - x).double().square().sum()) / energy

    expected = noise("iq2_xxs") * found["q2_0"] / noise("q2_0")
    assert found["iq2_xxs"] == pytest.approx(expected, rel=1e-9), seed


def test_nothing_larger_than_what_is_exact() -> None:
    found = _found(Sample(1, 8), ["iq1_s", "q2_k", "mxfp4", "q8_0"])
    assert list(found) == ["iq1_s", "q2_k", "mxfp4"] and found["mxfp4"] == 0.0
    assert found["iq1_s"] > found["q2_k"] > 0


def test_the_yardstick_is_quick_where_one_loses() -> None:
    assert yardstick({"iq1_s": 3.0, "q2_0": 2.0, "q2_k": 1.0}) == "q2_0"
    assert yardstick({"iq1_s": 3.0, "iq2_s": 2.0, "q2_k": 0.0}) == "iq1_s"
    assert yardstick({"int2-g64": 1.0, "int2-g128": 2.0}) == "int2-g128"
