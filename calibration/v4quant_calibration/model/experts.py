"""The experts: clamped SwiGLU, one expert's weights in memory at a time.

Tokens of all sequences are sorted by expert, so that each active expert is decoded once per layer
however many sequences run, multiplied with its rows, and dropped. The clamp is one-sided for the
gate and two-sided for the other branch. The routing weight multiplies the hidden rows before w2,
as in the release, because there it passes through w2's activation rounding.

`ForwardOptions.expert_kernels` takes the routed experts elsewhere: `packed_experts.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from v4quant_calibration.model.numerics import linear, quantized_input, require_finite
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.packed_experts import add_routed_experts
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.router import Routing
from v4quant_formats.model_config import ModelConfig

# Rows of one product: bounds the hidden rows of an expert that very many tokens visit.
ROWS = 8192


def mixture_of_experts(
    x: Tensor,
    routing: Routing,
    params: Params,
    layer: str,
    config: ModelConfig,
    options: ForwardOptions,
    observer: Observer | None,
) -> Tensor:
    """Shared expert plus the weighted routed experts: x normalised `[T, hidden]`, same out."""
    module = f"{layer}.ffn.shared_experts"
    x = quantized_input(x, config, options)
    if observer is not None:
        observer.on_experts(layer, x, routing.expert_ids, routing.weights)
    shared = _shared_expert(x, params, module, config, options, observer)
    require_finite(shared, module)
    output = torch.zeros_like(x)  # the routed experts' first, as the release sums
    if options.expert_kernels:
        add_routed_experts(x, routing, output, params, layer, config, options)
        return output.add_(shared)
    top_k = routing.expert_ids.shape[1]
    flat = routing.expert_ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=config.n_routed_experts).tolist()
    start = 0
    for expert, count in enumerate(counts):
        slots = order[start : start + count]
        start += count
        if count:
            _routed_expert(
                x, slots // top_k, routing.weights.flatten()[slots], expert, output,
                params, layer, config, options, observer,
            )  # fmt: skip
    return output.add_(shared)


def _routed_expert(
    x: Tensor,
    tokens: Tensor,
    weights: Tensor,
    expert: int,
    output: Tensor,
    params: Params,
    layer: str,
    config: ModelConfig,
    options: ForwardOptions,
    observer: Observer | None,
) -> None:
    """Add one expert's contribution to its tokens' rows of `output`."""
    w1, w2, w3 = (params(f"{layer}.ffn.experts.{expert}.{w}") for w in ("w1", "w2", "w3"))
    for rows, scale in zip(torch.split(tokens, ROWS), torch.split(weights, ROWS), strict=True):
        inputs = x[rows]
        hidden = expert_hidden(inputs, w1, w3, config.swiglu_limit, options) * scale.unsqueeze(-1)
        hidden = quantized_input(hidden, config, options)
        if observer is not None:
            observer.on_expert_input(layer, expert, inputs)
            observer.on_expert_hidden(layer, expert, hidden)
        added = linear(hidden, w2, options)
        require_finite(added, f"{layer}.ffn.experts.{expert}")
        if observer is not None:
            observer.on_expert_output(layer, expert, rows, added)
        output.index_add_(0, rows, added)


def _shared_expert(
    x: Tensor,
    params: Params,
    module: str,
    config: ModelConfig,
    options: ForwardOptions,
    observer: Observer | None,
) -> Tensor:
    w1, w2, w3 = (params(f"{module}.{w}") for w in ("w1", "w2", "w3"))
    limit = config.swiglu_limit if options.shared_clamp else 0.0
    parts = []
    for rows in torch.split(x, ROWS):
        hidden = expert_hidden(rows, w1, w3, limit, options)
        hidden = quantized_input(hidden, config, options)
        if observer is not None:
            observer.on_linear(f"{module}.w1", rows)
            observer.on_linear(f"{module}.w2", hidden)
        parts.append(linear(hidden, w2, options))
    return torch.cat(parts)


def expert_hidden(
    x: Tensor, w1: Tensor, w3: Tensor, limit: float, options: ForwardOptions
) -> Tensor:
    """silu(min(w1 x, limit)) * clamp(w3 x, +-limit); a limit of 0 means no clamp.

    x `[n, hidden]`, w1 and w3 `[intermediate, hidden]`; `[n, intermediate]` out.
    """
    gate, up = linear(x, w1, options), linear(x, w3, options)
    if limit:
        gate.clamp_(max=limit)
        up.clamp_(-limit, limit)
    return silu(gate, inplace=True).mul_(up)
