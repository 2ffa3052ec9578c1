"""Products of operands rounded to BF16, summed in float32.

torch's own product of BF16 tensors rounds its result to BF16 as well, which is a hundred times what
a product of exact operands loses. Three ways lead around it, to the same numbers but for the order
of their sums; `dispatch` knows which suits a device:

* "cuda": BF16 operands, float32 asked for as the result.
* "units": on a CPU whose BF16 units oneDNN uses (AMX), float32 operands that it is allowed to take
  as BF16. It treats that as a hint, and which shapes it follows it for is its own affair, so
  operands are rounded before: whether it does or not, the product is the same.
* "rounded": anywhere, the ordinary float32 product of rounded operands. It is no faster than an
  exact one, but measures the same thing.

A product of two BF16 numbers is exact in float32, and all three sum in float32 over the whole of K,
so nothing is gained by cutting K into pieces. Where both operands hold BF16 values anyway (weights
in MXFP4 or FP8, inputs rounded to E4M3), all of this is one more order of summing. `exact_product`
carries that to weights that are not BF16 numbers: an integer times a BF16 scale has at most 16
significant bits, which are the sum of two BF16 numbers, so two products do. The bound of float32
sums then holds for every scheme.

The units take BF16 subnormals for zeros and flush float32 ones. `exact_product` therefore takes
BF16 only where no product can be smaller than 2^-100, and float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from v4quant_kernels.codec import dequantize
from v4quant_kernels.qtensor import QTensor

Way = Literal["f32", "cuda", "units", "rounded"]
"""How a product is taken; "f32" multiplies the operands as they are."""

_NORMAL = 2.0**-126
_LEAST_PRODUCT = 2.0**-100  # what flushing may lose is then below a rounding of any product
_SPLIT = {("e2m1", "e8m0"), ("e2m1", "e4m3"), ("e4m3", "e8m0"), ("int", "bf16"), ("bf16", "none")}
_LEAST_CODE = {"e2m1": 0.5, "e4m3": 2.0**-9, "int": 2.0**-8, "bf16": 1.0}
"""Least magnitude of what a scale multiplies; of integers, of the smaller term's last bit."""


def bf16_product(a: Tensor, b: Tensor, way: Way) -> Tensor:
    """float32 a @ b of operands rounded to BF16: `[..., m, k]` and `[k, n]`, or `[g, m, k]` and
    `[g, k, n]`. way: any but "f32"."""
    if way == "cuda":
        return _cuda_product(a.bfloat16(), b.bfloat16())
    return product_of_bf16(rounded(a), rounded(b), way)


def product_of_bf16(a: Tensor, b: Tensor, way: Way) -> Tensor:
    """float32 a @ b of float32 operands that hold BF16 values, shaped as for `bf16_product`."""
    if way == "cuda":
        return _cuda_product(a.bfloat16(), b.bfloat16())
    if way == "units":
        with _units_allowed():
            return a @ b
    return a @ b


def exact_product(
    x: Tensor,
    weight: QTensor,
    way: Way,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """float32 x @ weight.T, `[m, N]`, nothing rounded but sums, by BF16 products where they can.

    x: float32 `[m, K]` of BF16 values. Schemes whose weights are not a sum of two BF16 numbers, and
    numbers so small that units would take them for zero, are multiplied in float32 whatever `way`
    says. multiply: takes products in float32.
    """
    if way == "f32" or not _splits(weight) or not _stays_normal(x, weight):
        return multiply(x, dequantize(weight).T)
    factor = weight.global_scale
    if factor is not None:
        weight = replace(weight, global_scale=torch.ones_like(factor))
    matrix = dequantize(weight)
    if weight.scheme.element == "int":
        large = rounded(matrix)
        out = product_of_bf16(x, large.T, way)
        out += product_of_bf16(x, matrix.sub_(large).T, way)
    else:
        out = product_of_bf16(x, matrix.T, way)
    return out if factor is None else out.mul_(factor)


def rounded(x: Tensor) -> Tensor:
    """float32 x rounded to BF16 values, to nearest, ties to even."""
    return x.bfloat16().float()


def _splits(weight: QTensor) -> bool:
    """Whether the weights, without a global scale, are sums of at most two BF16 numbers."""
    float_scale = weight.scale is not None and weight.scale.dtype == torch.float32
    return (weight.scheme.element, weight.scheme.scale) in _SPLIT and not float_scale


def _stays_normal(x: Tensor, weight: QTensor) -> bool:
    """Whether all nonzero operands are normal BF16 numbers and no product is below 2^-100."""
    numbers = weight.codes if weight.scale is None else weight.scale
    least = _least_magnitude(numbers) * _LEAST_CODE[weight.scheme.element]
    least_x = _least_magnitude(x)
    return min(least, least_x) >= _NORMAL and least * least_x >= _LEAST_PRODUCT


def _least_magnitude(x: Tensor) -> float:
    """The least nonzero magnitude, 1 if there is none, NaN if there is a NaN."""
    magnitude = x.float().abs()
    magnitude = magnitude.masked_fill_(magnitude == 0, torch.inf)
    least = float(magnitude.amin()) if magnitude.numel() else torch.inf
    return 1.0 if least == torch.inf else least


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
