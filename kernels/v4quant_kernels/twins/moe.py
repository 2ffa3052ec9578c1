"""The routed experts of DeepSeek-V4 in plain torch: what the Triton kernel must compute.

For a token `x` and each of its chosen experts, with routing weight `r` (the release's inference
code, `Expert` and `MoE`):

    gate = min(w1 x, limit)         up = clamp(w3 x, -limit, limit)
    h    = bf16(r * silu(gate) * up)                      y = sum over its experts of w2 h

The routing weight multiplies *before* h is rounded and before w2. Products and sums are float32;
only h and the final y are rounded to bfloat16. (The release also rounds the output of each GEMM to
bfloat16; keeping float32 there is closer to the exact sum and costs nothing.)

`activations="e4m3"` additionally rounds x and h to E4M3 in blocks of 128 channels, as the release
does before every quantized linear layer and as the model was trained; "bf16" is more precise than
the reference.

Only the experts that some token chose are decoded, one at a time, so memory stays at one expert's
three float32 matrices. `way` says how products are taken: in float32, or from BF16 operands, which
loses nothing (`bf16_product.exact_product`): the error bound is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v4quant_kernels.experts import (
    Activations,
    StackedExperts,
    check_moe_inputs,
    local_expert_ids,
)
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.twins.activation import fake_quant_e4m3
from v4quant_kernels.twins.bf16_product import Way, exact_product

ACTIVATION_BLOCK = 128
ChooseWay = Callable[[Tensor, QTensor], Way]
"""How to take the product of these inputs and weights."""


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    experts: StackedExperts,
    swiglu_limit: float,
    expert_map: Tensor | None = None,
    activations: Activations = "bf16",
    *,
    way: Way | ChooseWay = "f32",
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """Mixture of the routed experts, bfloat16 `[T, hidden]`.

    x: bfloat16 `[T, hidden]`. expert_ids: signed integer `[T, top_k]`. expert_weights: float32
    `[T, top_k]`. swiglu_limit: the clamp (10 in every release; `math.inf` for none).
    expert_map: signed integer `[all experts]`, the local row of each global expert or -1: slots of
    foreign experts add nothing. way: how products are taken, or who says so for each. multiply:
    takes those in float32.
    Raises V4QuantError for other shapes or dtypes.
    """
    check_moe_inputs(x, expert_ids, expert_weights, experts, expert_map)
    ids = local_expert_ids(expert_ids, experts.num_experts, expert_map).flatten()
    routing = expert_weights.flatten()
    tokens, top_k = expert_ids.shape
    x = _round_activations(x, activations).float()
    outputs = torch.zeros(tokens * top_k, experts.hidden_size, device=x.device)

    def by(inputs: Tensor, weight: QTensor) -> Tensor:
        chosen = way(inputs, weight) if callable(way) else way
        return exact_product(inputs, weight, chosen, multiply)

    for expert in torch.unique(ids[ids >= 0]).tolist():
        slots = (ids == expert).nonzero().squeeze(1)
        w1, w3, w2 = experts[expert]
        rows = x[slots // top_k]
        gate = by(rows, w1).clamp(max=swiglu_limit)
        up = by(rows, w3).clamp(-swiglu_limit, swiglu_limit)
        h = (routing[slots, None] * torch.nn.functional.silu(gate) * up).bfloat16()
        outputs[slots] = by(_round_activations(h, activations).float(), w2)
    return outputs.view(tokens, top_k, experts.hidden_size).sum(dim=1).bfloat16()


def _round_activations(x: Tensor, activations: Activations) -> Tensor:
    return fake_quant_e4m3(x, ACTIVATION_BLOCK) if activations == "e4m3" else x
