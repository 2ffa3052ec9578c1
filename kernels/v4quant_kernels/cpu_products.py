"""What this CPU's matrix library does, found out by asking it for products instead of for flags.

A flag says what a processor could do, not what the library does with it: oneDNN takes float32
operands as BF16 on processors with AMX, and on those with AVX512_BF16 alone it ignores the
permission. So the first product that wants to know runs a few small ones, some hundredths of a
second in all; the answer is kept for the process. Nothing runs when this module is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from v4quant_kernels.twins.bf16_product import Way, product_of_bf16

_ROWS, _K, _COLUMNS = 128, 1024, 1024
_TRIES = 5
_WORTH = 0.9  # of the time of float32: a smaller gain may be chance


@cache
def has_bf16_units() -> bool:
    """Whether products by "units" are taken from BF16 operands here, and sooner than in float32."""
    return takes_bf16() and _is_faster("units", "rounded")


def takes_bf16() -> bool:
    """Whether the library rounds operands to BF16 once it may.

    Each product of the probe is 1 + 2^-10, which is no BF16 number and rounds to 1.
    """
    a, b = torch.ones(_ROWS, _K), torch.full((_COLUMNS, _K), 1 + 2.0**-10)
    return bool((product_of_bf16(a, b.T, "units") == _K).all())


def _is_faster(way: Way, other: Way) -> bool:
    """Whether a product takes less time one way than the other, the best of a few turns each."""
    a, b = torch.ones(_ROWS, _K), torch.ones(_COLUMNS, _K)
    ways = (way, other)
    best = [float("inf")] * 2
    for _ in range(_TRIES):
        for i, each in enumerate(ways):
            best[i] = min(best[i], _seconds(product_of_bf16, a, b.T, each))
    return best[0] < _WORTH * best[1]


def _seconds(product: Callable[..., Tensor], *operands: object) -> float:
    start = time.perf_counter()
    product(*operands)
    return time.perf_counter() - start
