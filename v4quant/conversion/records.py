"""Records: what became of every source tensor, and what it cost. The manifest is made of these.

Dense tensors and experts (`dense.py`, `experts.py`) state their results and refusals through them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from v4quant.conversion.plan import Plan
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME, ManifestError
from v4quant_formats.weights import StoredWeight
from v4quant_kernels.errors import NonFiniteWeight, V4QuantError
from v4quant_kernels.scale_search import QuantizedMatrix
from v4quant_kernels.scheme import Scheme

Disposition = Literal["copied", "cast", "quantized"]
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("module", "disposition", "source", "target", "grid", "scales"), (str,)),
    **dict.fromkeys(("elements", "altered"), (int,)),
    **dict.fromkeys(("relative_rms", "relative_rms_in_use", "max_error"), (int, float)),
}


@dataclass(frozen=True)
class TensorRecord:
    """The fate of one module (a weight with its scales).

    copied: byte for byte. cast: re-encoded, `altered` elements changed value (0 means bit-exact).
    quantized: re-gridded, with relative RMS and largest absolute error against the source values.
    grid: the scheme whose numbers the source's values turned out to be, where it stores them
    otherwise; the work then began from those codes. scales: what BF16 does not tell of the source's
    (scale_hints.py). relative_rms_in_use: of a table's rows, each weighted by how often the
    calibration text used it.
    """

    module: str
    disposition: Disposition
    source: str
    target: str
    elements: int
    altered: int = 0
    relative_rms: float = 0.0
    max_error: float = 0.0
    grid: str = ""
    scales: str = ""
    relative_rms_in_use: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the output holds exactly the source's values."""
        return self.disposition in ("copied", "cast") and self.altered == 0

    def as_dict(self) -> dict[str, Any]:
        """JSON form: fields that say nothing are left out."""
        plain = {k: v for k, v in asdict(self).items() if v not in (0, 0.0, "")}
        return {**plain, "exact": self.exact}


def record_from_dict(table: Any) -> TensorRecord:
    """Inverse of `as_dict`. Raises ManifestError for a table of another form."""
    if not isinstance(table, dict):
        raise ManifestError(f"{MANIFEST_NAME}: a record is not as written")
    values = {"elements": 0, **{k: v for k, v in table.items() if k != "exact"}}
    for key, value in values.items():
        kinds = _KINDS.get(key)
        if kinds is None or isinstance(value, bool) or not isinstance(value, kinds):
            raise ManifestError(f"{MANIFEST_NAME}: {str(key)[:80]!r} in a record is not as written")
    for key in ("module", "disposition", "source", "target"):
        if key not in values:
            raise ManifestError(f"{MANIFEST_NAME}: a record lacks '{key}'")
    if values["disposition"] not in get_args(Disposition):
        raise ManifestError(f"{MANIFEST_NAME}: a record's 'disposition' is none that there is")
    return TensorRecord(**values)


class InexactCast(V4QuantError):
    """A cast would change values and the recipe says to refuse."""


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


def make_record(
    stored: StoredWeight, disposition: Disposition, target: str, altered: int = 0
) -> TensorRecord:
    """The record of a module that lost nothing, or `altered` elements that it counts."""
    return TensorRecord(
        stored.module, disposition, stored.coding, target, math.prod(stored.shape), altered
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
        stored.coding,
        scheme.name,
        math.prod(stored.shape),
        altered,
        relative_rms=loss.relative_rms,
        max_error=loss.max_error,
    )
