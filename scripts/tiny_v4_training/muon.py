"""Muon: momentum whose update is made orthogonal, for the matrices; AdamW for everything else.

A gradient matrix has a few large singular values and many small ones, so a plain step learns few
directions. Muon (Jordan et al., 2024) replaces the momentum matrix by the nearest one whose
singular values are all about 1, with five steps of an odd polynomial iteration that needs matrix
products only. Small models trained for minutes gain a factor in tokens from it. Embeddings, head,
norms, routers and hyper-connections are not maps between hidden spaces and keep AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tiny_v4_training.precision import product_dtype

MUON_RATE = 0.02
ADAM_RATE = 3e-3
SETTLED_RATE = 1e-3
TABLE_RATE = 0.3  # a row of a lookup table is seen seldom, and is sixteen in size
# Coefficients of the published iteration: steep at 0, so that small singular values grow fast.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ADAM_NAMES = (
    "embed",
    "head.weight",
    "norm",
    "_hc.",
    "hc_",
    "q_weight",
    "k_weight",
    "gate.weight",
    "sinks",
    "position_bias",
)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Parameters are `[..., rows, columns]`.

    A group's `parts` says how many matrices lie stacked along the rows (2 for fused gate and up).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient, momentum = parameter.grad, group["momentum"]
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(state["momentum"], momentum)
        *outer, rows, columns = parameter.shape
        stacked = ahead.reshape(*outer, group["parts"], rows // group["parts"], columns)
        step = orthogonalise(stacked) * max(1.0, stacked.shape[-2] / columns) ** 0.5
        parameter.sub_(step.reshape(parameter.shape), alpha=group["lr"])


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """`U V^T` of each matrix `[..., m, n]`, roughly: singular values end between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    x: Tensor = matrices.to(product_dtype())
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimisers(
    model: nn.Module, settled: Callable[[str], bool] = lambda name: False
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of `model`, AdamW for the rest of its trainable parameters.

    Parameters whose names are `settled` come trained from elsewhere and have to adapt only: AdamW
    at a low rate does that, at a tenth of what Muon costs.
    """
    matrices: list[Tensor] = []
    adapting: list[Tensor] = []
    tables: list[Tensor] = []
    fused: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if settled(name):
            adapting.append(parameter)
        elif "engram.embed" in name:
            tables.append(parameter)
        elif parameter.ndim < 2 or any(part in name for part in _ADAM_NAMES):
            others.append(parameter)
        else:
            (fused if "gate_up_proj" in name else matrices).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": fused, "parts": 2}]
    matrix_groups = [g for g in groups if g["params"]]
    chosen: list[torch.optim.Optimizer] = [Muon(matrix_groups, MUON_RATE)] if matrix_groups else []
    for parameters, rate in ((others, ADAM_RATE), (adapting, SETTLED_RATE), (tables, TABLE_RATE)):
        if parameters:
            chosen.append(
                torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
            )
    return chosen
