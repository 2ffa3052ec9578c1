"""Products of operands rounded to BF16, summed in float32.

torch's own product of BF16 tensors rounds its result to BF16 as well, which is a hundred times what
a product of exact operands loses. Three ways lead around it, to the same numbers but for the order
of their sums:

* CUDA: BF16 operands, float32 asked for as the result.
* A CPU with BF16 units (AVX512_BF16, AMX): float32 operands that oneDNN is allowed to take as BF16.
* Any other CPU: the ordinary float32 product of rounded operands. It is no faster than an exact
  one, but measures the same thing.

A product of two BF16 numbers is exact in float32. So where both operands hold BF16 values anyway
(weights in MXFP4 or FP8, inputs rounded to E4M3), all of this is one more order of summing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

# Below this many multiplications oneDNN is not asked, and would not have rounded.
_LARGE = 1 << 20


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b of operands rounded to BF16: `[..., m, k]` and `[k, n]`, or `[g, m, k]` and
    `[g, k, n]`."""
    if a.is_cuda:
        return _cuda_product(a.bfloat16(), b.bfloat16())
    a = rounded(a)
    if not has_units():
        return a @ rounded(b)
    # oneDNN rounds a large matrix itself, to nearest: no need of a pass of ours over a weight.
    large = b.dim() == 2 and a.numel() * b.shape[-1] >= _LARGE
    with _units_allowed():
        return a @ (b if large else rounded(b))


def rounded(x: Tensor) -> Tensor:
    """float32 x rounded to BF16 values, to nearest, ties to even."""
    return x.bfloat16().float()


@cache
def has_units() -> bool:
    """Whether this CPU multiplies BF16 faster than float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = (getattr(torch.cpu, name, None) for name in names)
    return any(bool(supported()) for supported in found if supported is not None)


@contextmanager
def _units_allowed() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _cuda_product(a: Tensor, b: Tensor) -> Tensor:
    if b.dim() == 3:
        return torch.bmm(a, b, out_dtype=torch.float32)
    flat = torch.mm(a.flatten(0, -2), b, out_dtype=torch.float32)
    return flat.view(*a.shape[:-1], b.shape[-1])
