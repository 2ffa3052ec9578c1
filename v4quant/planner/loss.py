"""What is known about a scheme's loss, and from where: this model, the tiny one, or other people.

Best is a measurement of this very model (an `evaluate --json` file of a conversion). Without one
the built-in tiny model's rows stand in, which order schemes and solvers rightly and whose sizes of
KL are their own. Schemes nobody measured lie between their neighbours by bits per weight, and are
called an estimate. For Flash there are also figures that others published of files by another
quantizer; they stand beside ours, with the part of them that no rounding of experts explains.
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

from v4quant_formats.model_config import read_json_object
from v4quant_kernels.scheme import SCHEMES

Basis = Literal["exact", "this model", "tiny model", "estimate", "unknown"]
_MOST_BYTES = 64 * 2**20


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
    scheme: str, solver: str, exact: bool, model: Sequence[Measured] = (), flash: bool = False
) -> KnownLoss:
    """What is known of experts in `scheme`, coded by `solver` (as in quality.json).

    model: measurements of this model. flash: whether published figures of Flash apply.
    """
    published = _published(scheme) if flash else ""
    if exact:
        return KnownLoss("exact", 0.0, 1.0)
    for row in model:
        if row.scheme == scheme:
            return KnownLoss("this model", row.kl, row.top1, published)
    tiny = [r for r in tiny_rows() if r.solver == solver]
    for row in tiny:
        if row.scheme == scheme:
            return KnownLoss("tiny model", row.kl, row.top1, published)
    found = _between(SCHEMES[scheme].bits_per_weight, tiny)
    return KnownLoss("unknown" if found is None else "estimate", found, None, published)


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
    return tuple(Measured(r["scheme"], r["solver"], r["kl"], r["top1"]) for r in table)


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
