"""What a conversion may end in: records of what became of a module, and refusals.

Dense tensors and experts (convert_dense.py, convert_experts.py) state their results through these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from v4quant.conversion.plan import Plan
from v4quant.conversion.records import Disposition, TensorRecord
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.weights import StoredWeight
from v4quant_kernels.errors import NonFiniteWeight, V4QuantError
from v4quant_kernels.scale_search import QuantizedMatrix
from v4quant_kernels.scheme import Scheme


class InexactCast(V4QuantError):
    """A cast would change values and the recipe says to refuse."""


class ScaleNotPowerOfTwo(V4QuantError):
    """A float32 scale that E8M0 cannot hold."""


def refuse_inexact(plan: Plan, stored: StoredWeight, altered: int, target: str) -> None:
    """Raise InexactCast where the recipe wants exact casts only."""
    if altered and plan.recipe.on_inexact == "refuse":
        raise InexactCast(
            f"{plan.checkpoint.path}: '{stored.module}' does not fit {target} exactly: {altered} "
            "values would change; --on-inexact nearest takes the nearest and counts them"
        )


def refuse_overflow(checkpoint: Checkpoint, stored: StoredWeight, values: Tensor) -> None:
    """Raise NonFiniteWeight: finite codes and finite scales may still multiply beyond float32."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteWeight(
            f"{checkpoint.path}: '{stored.module}' holds values beyond float32's range; "
            "the file is damaged or was converted wrongly, download it again"
        )


def storage_name(stored: StoredWeight) -> str:
    """How the source holds a module: its scheme, or the dtype of a plain tensor."""
    return stored.scheme.name if stored.scheme else next(iter(stored.parts.values())).dtype.lower()


def make_record(
    stored: StoredWeight, disposition: Disposition, target: str, altered: int = 0
) -> TensorRecord:
    """The record of a module that lost nothing, or `altered` elements that it counts."""
    return TensorRecord(
        stored.module, disposition, storage_name(stored), target, math.prod(stored.shape), altered
    )


def lossy_record(
    stored: StoredWeight,
    scheme: Scheme,
    loss: QuantizedMatrix,
    disposition: Disposition,
    altered: int,
) -> TensorRecord:
    """The record of a module with a measured loss."""
    return TensorRecord(
        stored.module,
        disposition,
        storage_name(stored),
        scheme.name,
        math.prod(stored.shape),
        altered,
        relative_rms=loss.relative_rms,
        max_error=loss.max_error,
    )
