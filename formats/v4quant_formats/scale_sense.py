"""Whether a matrix's scales make weights of it: reciprocals do not.

Some tools divide by their scales, others multiply, and nothing in a file says which. But a weight
of a trained network is small: the largest of a group lies near 0.1, hardly ever above 2. Read the
wrong way round, the same scales make values of 50 to 10 million. Beyond what a half-precision
number holds they are refused wherever they are read; below, a matrix whose typical group is out of
all proportion is named, as no network was trained to it.

`odd_scales` looks at a sample of the bytes before work begins: of up to `MATRICES` matrices the
first scales. Powers of two are looked at, too: the release multiplies by them, and tools that
convert them have mistaken the sign of an exponent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import is_linear
from v4quant_formats.spec import TensorSpec, torch_dtype
from v4quant_formats.weights import SCALE_PARTS, StoredWeight
from v4quant_kernels.late import torch
from v4quant_kernels.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = 4096
_SAMPLE = 4096  # bytes of scales looked at of a matrix
HALF_MAX = 65504.0
_PROPORTION = 16.0
_COMMON_CODE = 6.0  # what E2M1 was cast from has no larger codes, whatever the type can hold
_LARGEST_CODE = {"e2m1": 6.0, "e4m3": 448.0}


@dataclass(frozen=True)
class OddScales:
    """What is wrong with a module's scales; beyond: reading them is refused."""

    module: str
    problem: str
    beyond: bool


def largest_code(scheme: Scheme) -> float:
    """The largest magnitude of a scheme's codes: what a scale is multiplied by."""
    if scheme.is_packed_integer:
        return float(1 << (scheme.bits - 1))
    return _LARGEST_CODE.get(scheme.element, 1.0)


def beyond_half(scheme: Scheme, scale: Tensor, global_scale: Tensor | None) -> float | None:
    """The largest value that scales make, where no half-precision number holds it."""
    if (scheme.scale != "f32" and global_scale is None) or not scale.numel():
        return None  # powers of two may be anything, and their values are told as they are
    largest = largest_code(scheme) * float(scale.float().abs().max())
    largest *= 1.0 if global_scale is None else abs(float(global_scale))
    return largest if largest > HALF_MAX else None


def said_beyond(module: str, largest: float) -> str:
    """What to say of such scales."""
    return (
        f"'{module}' would reach {largest:.3g}, which no weight does; its scales are stored as "
        "reciprocals, or the file is damaged"
    )


def odd_scales(checkpoint: Checkpoint, stored: Mapping[str, StoredWeight]) -> Iterator[OddScales]:
    """The modules whose scales make no weights, as far as a sample tells.

    Only of files that lie here: a repository is not asked for thousands of pieces.
    """
    if not checkpoint.shards.is_local:
        return
    coded = [
        weight.base or weight for module, weight in stored.items() if _is_coded(module, weight)
    ]
    for weight in coded[:: -(-len(coded) // MATRICES) or 1]:
        if (found := _judged(checkpoint, weight)) is not None:
            yield found


def _is_coded(module: str, weight: StoredWeight) -> bool:
    """Whether it is a matrix under scales; tables that are looked up may hold any numbers."""
    return (weight.base or weight).scheme is not None and is_linear(module)


def _judged(checkpoint: Checkpoint, weight: StoredWeight) -> OddScales | None:
    scheme = weight.scheme
    part = next((weight.parts[p] for p in ("scales", *SCALE_PARTS) if p in weight.parts), None)
    if part is None or scheme is None:
        return None
    scale = _sampled(checkpoint, part, scheme)
    second = _second(checkpoint, weight)
    if scale is None or not bool(torch.isfinite(scale).all()):
        return None  # whoever reads it says what it is
    beyond = beyond_half(scheme, scale, second)
    if beyond is not None:
        return OddScales(weight.module, said_beyond(weight.module, beyond), True)
    used = scale[scale != 0].abs()
    if not used.numel():
        return None
    typical = min(_COMMON_CODE, largest_code(scheme)) * float(used.median())
    typical *= 1.0 if second is None else abs(float(second))
    if typical <= _PROPORTION or not math.isfinite(typical):
        return None
    problem = f"weights of its groups reach about {typical:.3g}, where trained ones are below 1; "
    problem += "its scales may be stored as reciprocals"
    return OddScales(weight.module, problem, False)


def _sampled(checkpoint: Checkpoint, spec: TensorSpec, scheme: Scheme | None) -> Tensor | None:
    """float32 of the first numbers of a tensor; None of a file that shrank."""
    count = min(spec.nbytes, _SAMPLE)
    (data,) = checkpoint.shards.slices(spec.file, [spec.offset], count)
    if len(data) < count or not count:
        return None
    value = torch.frombuffer(bytearray(data), dtype=torch_dtype(spec.dtype))
    if scheme is not None and scheme.scale == "e8m0" and value.dtype == torch.uint8:
        value = value.view(torch.float8_e8m0fnu)
    return value.float()


def _second(checkpoint: Checkpoint, weight: StoredWeight) -> Tensor | None:
    """The multiplier of a whole matrix; compressed-tensors stores its reciprocal."""
    if "weight_global_scale" in weight.parts:
        value = _sampled(checkpoint, weight.parts["weight_global_scale"], None)
        return None if value is None else value.reciprocal()
    if "weight_scale_2" in weight.parts:
        return _sampled(checkpoint, weight.parts["weight_scale_2"], None)
    return None
