"""What is known about a scheme's loss, and from where: this model, the tiny one, or other people.

Best is a measurement of this very model (an `evaluate --json` file of a conversion). Without one
the built-in tiny model's rows stand in, which order schemes and solvers rightly and whose sizes of
KL are their own. Schemes nobody measured lie on the integers' curve between their neighbours by
bits per weight, shifted by what the nearest measured type of their own family (codebooks) gains
over it, and are called an estimate. For Flash there are also figures that others published of files
by another quantizer; they stand beside ours, with the part of them that no rounding of experts
explains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from v4quant_formats.json_object import read_json_object
from v4quant_kernels.ggml_types import has_codebook
from v4quant_kernels.scheme import SCHEMES

Basis = Literal["exact", "this model", "tiny model", "estimate", "unknown"]
_MOST_BYTES = 64 * 2**20
# What scales searched without a text lose against those that a text weighs (docs/calibration.md).
_UNWEIGHED = 1.1
_WAYS = {"searched": "optimal", "solved": "propagated"}  # of types, as solvers are called


@dataclass(frozen=True)
class KnownLoss:
    """Mean KL from the source in nats per token, and how it is known.

    top1: share of tokens whose most probable next token stays. published: what others measured on
    a real release with another quantizer's files of this type, as a sentence.
    """

    basis: Basis
    kl: float | None
    top1: float | None = None
    published: str = ""

    @property
    def order(self) -> float:
        """For sorting, best first."""
        if self.basis == "exact":
            return 0.0
        return math.inf if self.kl is None else self.kl

    def sentence(self) -> str:
        """The same in words."""
        if self.basis == "exact":
            return "none: every weight of the experts is the source's"
        if self.kl is None:
            return "nobody measured it"
        where = {
            "this model": "measured on this model",
            "tiny model": "measured on the built-in tiny model, not on this one",
            "estimate": "estimated between neighbours measured on the tiny model",
        }[self.basis]
        kept = f", {100 * self.top1:.1f} % of top-1 tokens kept" if self.top1 is not None else ""
        return f"KL {self.kl:.4f} nats per token{kept}; {where}"


@dataclass(frozen=True)
class Measured:
    """One row: a scheme by a solver and what it cost."""

    scheme: str
    solver: str
    kl: float
    top1: float


def known_loss(
    scheme: str,
    solver: str,
    exact: bool = False,
    model: Sequence[Measured] = (),
    flash: bool = False,
) -> KnownLoss:
    """What is known of experts in `scheme`, coded by `solver` (as in quality.json, or `searched`).

    model: measurements of this model. flash: whether published figures of Flash apply.
    """
    published = _published(scheme) if flash else ""
    if exact:
        return KnownLoss("exact", 0.0, 1.0)
    for row in model:
        if row.scheme == scheme:
            return KnownLoss("this model", row.kl, row.top1, published)
    if solver == "searched":
        found = known_loss(scheme, "optimal").kl
        return KnownLoss("estimate", None if found is None else _UNWEIGHED * found, None, published)
    for row in tiny_rows():
        if (row.scheme, row.solver) == (scheme, solver):
            return KnownLoss("tiny model", row.kl, row.top1, published)
    found = _estimate(scheme, solver)
    return KnownLoss("unknown" if found is None else "estimate", found, None, published)


def with_dense(loss: KnownLoss, dense: str) -> KnownLoss:
    """A loss of experts with that of all other matrices in a type of GGUF.

    Losses of independent roundings add up; `q8_0` is what everybody takes, and counts as none.
    """
    rows = _data("quality-dense.json")["rows"]
    if dense not in rows or loss.kl is None:
        return loss
    added = float(rows[dense]["kl"])
    basis: Basis = "estimate" if loss.basis != "exact" else "tiny model"
    top1 = float(rows[dense]["top1"]) if loss.basis == "exact" else None
    return KnownLoss(basis, loss.kl + added, top1, loss.published)


def read_measured(path: Path) -> list[Measured]:
    """Rows of an `evaluate --json` file, one a candidate. Raises ConfigError for other files."""
    result = read_json_object(path, _MOST_BYTES)
    rows = []
    for part in (result, *_records(result.get("others"))):
        facts, kl, top1 = part.get("candidate"), part.get("kl_mean"), part.get("top1_agreement")
        scheme = facts.get("scheme") if isinstance(facts, dict) else None
        if isinstance(scheme, str) and isinstance(kl, int | float) and math.isfinite(kl):
            kept = float(top1) if isinstance(top1, int | float) else math.nan
            rows.append(Measured(scheme, "", float(kl), kept))
    return rows


@cache
def tiny_rows() -> tuple[Measured, ...]:
    """The tiny model's rows, experts alone converted, that ship with the package."""
    table = _data("quality.json")["full"]["rows"]
    types = _data("quality-types.json")["types"]
    return (
        *(Measured(r["scheme"], r["solver"], r["kl"], r["top1"]) for r in table),
        *(
            Measured(name, solver, row[way]["kl"], row[way]["top1"])
            for name, row in types.items()
            for way, solver in _WAYS.items()
            if way in row
        ),
    )


def _estimate(scheme: str, solver: str) -> float | None:
    """KL of a scheme that nobody measured; None where too little is measured for that."""
    bits = SCHEMES[scheme].bits_per_weight
    found = _between(bits, _integer_rows(solver))
    if found is None or not has_codebook(scheme):
        return found
    for way in (solver, "propagated"):  # what codebooks gain hardly depends on the solver
        alike = [r for r in tiny_rows() if r.solver == way and has_codebook(r.scheme)]
        if alike:
            near = min(alike, key=lambda r: abs(SCHEMES[r.scheme].bits_per_weight - bits))
            usual = _between(SCHEMES[near.scheme].bits_per_weight, _integer_rows(way))
            return found * near.kl / usual if usual else found
    return found


def _integer_rows(solver: str) -> list[Measured]:
    return [r for r in tiny_rows() if r.solver == solver and not SCHEMES[r.scheme].block_bytes]


def _between(bits: float, rows: Sequence[Measured]) -> float | None:
    """KL at `bits` per weight, its logarithm linear in bits between measured rows."""
    points = sorted((SCHEMES[r.scheme].bits_per_weight, math.log(r.kl)) for r in rows)
    if len(points) < 2:
        return None
    below = [p for p in points if p[0] <= bits] or points[:1]
    above = [p for p in points if p[0] > bits] or points[-1:]
    low, high = below[-1], above[0]
    if low[0] >= high[0]:  # outside all that was measured: the nearest two go on
        low, high = (points[0], points[1]) if bits < points[0][0] else (points[-2], points[-1])
    slope = (high[1] - low[1]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
    return math.exp(low[1] + slope * (bits - low[0]))


def _published(scheme: str) -> str:
    table = _data("published.json")
    row = table["rows"].get(scheme)
    if row is None:
        return ""
    return (
        f"{table['who']}: KL {row['kl']:.3f} at {row['gb']:.0f} GB, of which "
        f"{table['floor']['kl']:.3f} is there with the experts' own bits too"
    )


@cache
def _data(name: str) -> dict[str, Any]:
    text = files("v4quant").joinpath("data", "measured", name).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _records(value: object) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
