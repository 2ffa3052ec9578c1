"""How many workers a conversion may have within a cap on memory."""

from __future__ import annotations

import math

from v4quant.conversion.plan import Plan
from v4quant.sizes import SizeError
from v4quant_formats.system import current_rss_bytes

# Interpreter, torch and its libraries, measured; thread pools and buffers included.
_BASE_BYTES = 450 * 2**20


_THREAD_BYTES = 100 * 2**20


_TEMPORARY_BYTES = 200 * 2**20


_FLOAT_BYTES = 12  # a weight's, in float32 three times


def worker_bytes(plan: Plan) -> int:
    """Memory one worker needs for the largest unit of a plan.

    A worker holds the three matrices of an expert as stored, one of them as coded and as written,
    and chunk temporaries; those and dense pieces are bounded by a constant. What is stored in no
    scheme of ours is held in float32 as well: its values, their magnitudes, and what is left.
    """
    bits = max(s.bits_per_weight for s in plan.recipe.expert_schemes)
    largest = 0.0
    for unit in plan.units:
        if unit.action == "experts":
            weights = max(math.prod(s.shape) for s in unit.sources)
            floats = any(s.scheme is None or s.base or s.scheme.is_plain for s in unit.sources)
            each = 2 * bits / 8 + (_FLOAT_BYTES if floats else 0)
            largest = max(largest, unit.bytes_in + each * weights)
    return int(largest) + _TEMPORARY_BYTES


def fit_workers(plan: Plan, wanted: int, cap: int | None) -> int:
    """The number of workers that fits `cap` bytes, at most `wanted`. Raises SizeError.

    What the process already holds is counted as it is: a plan of Pro's 145,116 tensors alone takes
    200 MB.
    """
    if cap is None:
        return wanted
    base = max(_BASE_BYTES, current_rss_bytes() + _THREAD_BYTES)
    fitting = (cap - base) // worker_bytes(plan)
    if fitting < 1:
        least = base + worker_bytes(plan)
        raise SizeError(
            f"--max-memory {cap / 1e9:.2f} GB is too little: one worker of this conversion needs "
            f"{least / 1e9:.2f} GB"
        )
    return min(wanted, fitting)
