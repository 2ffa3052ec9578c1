"""What a stored table keeps of one scored checkpoint, and when a figure counts as drifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Mean KL of a reduced run may differ by this much between machines before it counts as drift.
TOLERANCE = 0.15


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one candidate, of what `evaluate_checkpoint` found."""
    return {
        "kl": result["kl_mean"],
        "kl_stderr": result["kl_mean_stderr"],
        "perplexity": result["perplexity"],
        "top1": result["top1_agreement"],
        "parts": {part["name"]: part["kl_mean"] for part in result["corpora"]},
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
