"""What a stored table keeps of one scored checkpoint, and when a figure counts as drifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4quant import Evaluation

# Mean KL of a reduced run may differ by this much between machines before it counts as drift.
TOLERANCE = 0.15


def figures(one: Evaluation) -> dict[str, Any]:
    """The figures of one candidate."""
    assert one.distance is not None
    return {
        "kl": one.distance.kl_mean,
        "kl_stderr": one.distance.kl_mean_stderr,
        "perplexity": one.perplexity.value,
        "top1": one.distance.top1_agreement,
        "parts": {part.name: part.kl_mean for part in one.parts},
    }


def drift(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Rows (name -> figures) that are not the stored ones, or not near them, told one a line."""
    problems = [f"{name}: stored, but not measured now" for name in stored.keys() - found.keys()]
    for name, row in found.items():
        if name not in stored:
            problems.append(f"{name}: not stored; run the script without --check")
        elif abs(row["kl"] / stored[name]["kl"] - 1) > TOLERANCE:
            problems.append(f"{name}: mean KL {row['kl']:.5f}, stored {stored[name]['kl']:.5f}")
    return problems
