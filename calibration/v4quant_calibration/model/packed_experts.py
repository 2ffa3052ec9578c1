"""The routed experts multiplied as they are stored, by the kernels that would serve them.

The other way, `experts.py`, decodes one expert and multiplies it in float32 or BF16. Here a few of
the experts that some token chose are stacked, laid out once for the tensor cores of their device,
and multiplied by `dispatch.moe` with all rows of the layer that chose them, whatever sequence they
belong to: on CUDA the Triton kernel, elsewhere its torch twin. So an evaluation judges the bytes
*and* the kernels.

Beyond float32's order of sums three roundings are added, all of which served models have: the
input and each expert's hidden rows are rounded to BF16 (in official mode before E4M3), and so is
the sum of each group's contributions to a token, to half a unit in the last place each. Groups do
not depend on memory, so neither do figures. Inputs and outputs of single experts do not exist, so
observers see the routing and nothing of the experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from v4quant_calibration.model.numerics import require_finite, roundings
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import PackedParams, Params
from v4quant_calibration.model.router import Routing
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels import dispatch
from v4quant_kernels.errors import UnsupportedScheme, V4QuantError
from v4quant_kernels.experts import Activations, ExpertWeights, stack_experts
from v4quant_kernels.runtime import RuntimeExperts
from v4quant_kernels.twins.moe import ACTIVATION_BLOCK

GROUP = 8
"""Experts stacked at a time: bounds memory, and decides where sums are rounded."""

ROWS = 2048
"""Tokens of one call: bounds the rows of their slots."""


def add_routed_experts(
    x: Tensor,
    routing: Routing,
    output: Tensor,
    params: Params,
    layer: str,
    config: ModelConfig,
    options: ForwardOptions,
) -> None:
    """Add the routed experts' contributions for x `[T, hidden]` to `output`, float32 both.

    Raises UnsupportedScheme for experts that no kernel multiplies.
    """
    if options.official and roundings(config).linear != ACTIVATION_BLOCK:
        raise V4QuantError(
            f"--products kernels: the kernels round inputs in blocks of {ACTIVATION_BLOCK}, this "
            f"release in blocks of {roundings(config).linear}; use --products f32"
        )
    activations: Activations = "e4m3" if options.official else "bf16"
    limit = config.swiglu_limit or math.inf
    ids, weights = routing.expert_ids, routing.weights.float()
    active = torch.unique(ids).tolist()
    for begin in range(0, len(active), GROUP):
        chosen = active[begin : begin + GROUP]
        rows_of = torch.full((config.n_routed_experts,), -1, device=x.device)
        rows_of[chosen] = torch.arange(len(chosen), device=x.device)
        experts = _arranged(params, layer, chosen, activations)
        tokens = (rows_of[ids] >= 0).any(-1).nonzero().squeeze(1)
        for rows in torch.split(tokens, min(ROWS, options.row_chunk)):
            added = dispatch.moe(
                x[rows].bfloat16(), ids[rows], weights[rows], experts, limit, rows_of, activations
            ).float()
            require_finite(added, f"{layer}.ffn.experts.{chosen[0]} to {chosen[-1]}")
            output.index_add_(0, rows, added)


def _arranged(
    params: Params, layer: str, chosen: list[int], activations: Activations
) -> ExpertWeights | RuntimeExperts:
    if not isinstance(params, PackedParams):
        raise V4QuantError(
            "--products kernels: these weights are not stored in a file, so no kernel can "
            "multiply them; use f32 or bf16"
        )

    def matrix(expert: int, name: str) -> str:
        return f"{layer}.ffn.experts.{expert}.{name}"

    try:
        stacked = stack_experts(
            [
                (params.packed(matrix(e, "w1")), params.packed(matrix(e, "w3")),
                 params.packed(matrix(e, "w2")))
                for e in chosen
            ]
        )  # fmt: skip
        return dispatch.arrange(stacked, activations)
    except UnsupportedScheme as error:
        raise UnsupportedScheme(
            f"--products kernels cannot multiply the experts of {layer} ({error}); use f32 or bf16"
        ) from None
