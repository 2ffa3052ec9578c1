"""Sub-blocks onto a codebook with error feedback: compiled loops on the CPU, torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels import dispatch
from v4quant_kernels.ref import codebook_fit as ref
from v4quant_kernels.ref.ggml_fields import Codebook


def fit(
    values: Tensor,
    factor: Tensor,
    step: Tensor,
    codebook: Codebook,
    bound: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round values `[B, size, N]` to the best of steps `[B, steps, N]` times a codebook's vectors.

    factor: `[B, size, size]`, upper; size a multiple of 8. Returns the step chosen, int64 `[B, N]`;
    q and the errors over the pivots, float32 `[B, size, N]`; what it costs, `[B, N]`.
    bound: `[B, N]`; rows that no step serves for less have infinite cost, and 0 for the rest.
    """
    weighing = ref.weigh(factor, codebook)
    if not dispatch.uses_loops(values):
        return ref.fit(values, weighing, step, bound)
    from v4quant_kernels.native.ggml import codebook_fit as loops

    cost = ref.bounds(values, bound)
    choice = torch.zeros_like(cost, dtype=torch.int64)
    q, errors = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(len(values)):
        loops.fit(
            values[b].numpy(), weighing, b, step[b].numpy(), choice[b].numpy(), q[b].numpy(),
            errors[b].numpy(), cost[b].numpy(),
        )  # fmt: skip
    return choice, q, errors, cost
