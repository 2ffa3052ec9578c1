"""Codes field by field: what holds for every dataclass of tensors `[B, ..., N]`, whatever it means.

`gptq.Codes` and `block_codes.BlockCodes` are two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")


def each(codes: C, function: Callable[[Tensor], Tensor]) -> C:
    """Codes with a function applied to every tensor."""
    return replace(codes, **{f.name: function(getattr(codes, f.name)) for f in fields(codes)})


def choose(mask: Tensor, codes: C, others: C) -> C:
    """`codes` in the rows where mask (`[B, N]`) holds, `others` elsewhere."""
    where = mask.unsqueeze(1)
    pairs = {f.name: (getattr(codes, f.name), getattr(others, f.name)) for f in fields(codes)}
    return replace(codes, **{name: torch.where(where, *pair) for name, pair in pairs.items()})


def put(some: Callable[[Tensor, Tensor], object], codes: C, new: C) -> None:
    """Call `some(tensor of codes, tensor of new)` for every field."""
    for field in fields(codes):
        some(getattr(codes, field.name), getattr(new, field.name))


def differing_rows(codes: C, others: C) -> Tensor:
    """bool `[B, N]`: rows where any field differs."""
    found = [(getattr(codes, f.name) != getattr(others, f.name)).any(1) for f in fields(codes)]
    return torch.stack(found).any(0)
