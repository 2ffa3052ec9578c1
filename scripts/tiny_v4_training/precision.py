"""Which dtype this processor multiplies faster.

With BF16 units a product in BF16 takes half the time of one in float32; without them torch emulates
it, 20 to 35 times slower than float32 (seen with AVX2). No flag of torch tells the two apart on
every kind of processor, so both are timed once.
"""

from __future__ import annotations

import time
from functools import cache

import torch


@cache
def product_dtype() -> torch.dtype:
    """bfloat16 where its products are faster, else float32."""
    return min((torch.float32, torch.bfloat16), key=_seconds)


def _seconds(dtype: torch.dtype, rounds: int = 3) -> float:
    """CPU time of the fastest of a few products."""
    a, b = torch.ones(512, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    taken = []
    for _ in range(rounds + 1):  # the first prepares
        began = time.process_time()
        torch.mm(a, b)
        taken.append(time.process_time() - began)
    return min(taken)
