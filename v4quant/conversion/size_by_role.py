"""Byte classes: which kind of tensor takes how much of a conversion, before and after.

The manifest carries this table, so that a model card can tell where the bytes are without opening
a shard.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from v4quant.conversion.plan import Plan
from v4quant_formats.deepseek_v4 import parse_name, role_of

_LOG = logging.getLogger(__name__)
_NOTABLE = 1.01


@dataclass
class ByteClass:
    """Tensors of one role. `weights` counts logical elements, scales not among them."""

    role: str
    weights: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


def byte_classes(plan: Plan) -> list[ByteClass]:
    """All units of a plan by role, the largest output first."""
    classes: dict[str, ByteClass] = {}
    for unit in plan.units:
        first = unit.sources[0].first
        role = role_of(parse_name(first.name))
        found = classes.setdefault(role, ByteClass(role))
        found.weights += sum(math.prod(s.shape) for s in unit.sources)
        found.bytes_in += unit.bytes_in
        found.bytes_out += unit.bytes_out
    return sorted(classes.values(), key=lambda c: (-c.bytes_out, c.role))


def warn_of_growth(plan: Plan) -> None:
    """Tell, as a warning, that the output will be larger than the source, and what grows most."""
    before, after = sum(u.bytes_in for u in plan.units), sum(u.bytes_out for u in plan.units)
    if after <= _NOTABLE * before:
        return
    most = max(byte_classes(plan), key=lambda c: c.bytes_out - c.bytes_in)
    _LOG.warning(
        "the output, %.3g GB, will be larger than the source, %.3g GB (%s grows most, from %.3g to "
        "%.3g GB); --scheme, and --dense for gguf, choose smaller codes",
        after / 1e9, before / 1e9, most.role, most.bytes_in / 1e9, most.bytes_out / 1e9,
    )  # fmt: skip
