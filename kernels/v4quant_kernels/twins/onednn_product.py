"""float32 products by oneDNN, where torch's own go to another library.

torch gives float32 products to MKL, which on processors of others than Intel keeps to AVX2. oneDNN,
which torch brings as well, takes what the processor has. Both sum in float32 over the whole of K;
they differ in the order of the sums. The operation is the one that torch's compiler calls for a
linear layer; it knows no gradients and is not in every build.
"""

from __future__ import annotations

import torch
from torch import Tensor


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b: `[..., m, k]` and `[k, n]`, or `[g, m, k]` and `[g, k, n]`."""
    if b.dim() == 2:
        if not (b.is_contiguous() or b.mT.is_contiguous()):
            b = b.contiguous()  # a part of a wider matrix takes a loop a thousand times slower
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
        return result
    return torch.stack([onednn_product(one, other) for one, other in zip(a, b, strict=True)])
