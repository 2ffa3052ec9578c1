"""Layout: what a container's files look like, as pure functions of schemes and shapes.

A layout answers four questions: which tensors an expert's matrix becomes (names and shapes before
any data is read, data afterwards), what happens to the dense FP8 matrices, and what config.json
says. The planner and the job know layouts only through this interface; the table of layouts is in
layouts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import Scheme

# Suffix -> (safetensors dtype, shape).
Parts = dict[str, tuple[str, tuple[int, ...]]]

# copy: byte for byte (a Base release's float32 powers of two become the same numbers in E8M0).
# bf16: dequantized FP8, exact (4 significant bits fit in 8). f32_scale: codes byte for byte, E8M0
# scales widened to float32 powers of two, exact.
DenseRule = Literal["copy", "bf16", "f32_scale"]


@dataclass(frozen=True)
class Layout:
    """A container format for converted checkpoints.

    expert_parts(scheme, (N, K)) -> suffix -> (dtype, shape) of one expert matrix.
    expert_tensors(q, input_amax) -> suffix -> data for those suffixes; `input_amax` is the largest
        input magnitude the matrix must expect, for layouts that store an activation scale.
    dense(scheme) -> what happens to FP8 matrices outside the routed experts.
    config(raw, scheme, kept) -> the output's config.json object, from the source's; `kept` are
        stages whose experts stay in the source format.
    stores_input_scale: whether `expert_tensors` uses `input_amax` (0 is passed otherwise).
    can_keep: whether the format can say that some stages' experts are in the source format.
    engines: what loads it, for people.
    """

    name: str
    schemes: tuple[str, ...]
    expert_parts: Callable[[Scheme, tuple[int, int]], Parts]
    expert_tensors: Callable[[QTensor, float], dict[str, Tensor]]
    dense: Callable[[Scheme], DenseRule]
    config: Callable[[Mapping[str, Any], Scheme, Sequence[str]], dict[str, Any]]
    engines: str
    serve: str
    can_keep: bool = False
    stores_input_scale: bool = False
