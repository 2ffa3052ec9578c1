"""ExpertWeights: the routed experts of one layer, stacked the way a grouped kernel reads them.

A checkpoint holds three small matrices per expert; a grouped GEMM wants one tensor per projection
with the expert as its first dimension, so that a program finds its matrix by one multiplication.
Nothing is repacked here: the bytes of every expert are those of its `QTensor`; `runtime.py` makes
the kernels' layout of them. Scale formats that kernels cannot take as arguments (E8M0; E4M3 before
sm_89) are kept as the bytes they are.

The names follow the release: `w1` is the gate, `w3` the up and `w2` the down projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from v4quant_kernels.errors import UnsupportedScheme, V4QuantError
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import Scheme

Activations = Literal["bf16", "e4m3"]
"""bf16: activations as they come. e4m3: rounded to E4M3 per 128 before each GEMM (the release)."""

ExpertQTensors = tuple[QTensor, QTensor, QTensor]
"""(w1, w3, w2) of one expert."""

_TORCH_SCALE = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class StackedMatrix:
    """One projection of `E` experts.

    codes
        uint8 `[E, N, row_bytes]`, or bfloat16 `[E, N, K]` for the scheme bf16.
    scale
        uint8 (bytes of E8M0 or E4M3), bfloat16 or float32 `[E, N/rows, K/columns]`, rounded up;
        an empty tensor for bf16.
    global_scale
        float32 `[E]`, ones where the scheme has none.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    global_scale: Tensor

    @property
    def scale_format(self) -> str:
        """The scheme's, except that `fp8` of the Base releases holds its powers of two in f32."""
        return "f32" if self.scale.dtype == torch.float32 else self.scheme.scale

    def __getitem__(self, expert: int) -> QTensor:
        """The QTensor of one expert (views, no copy)."""
        codes, scale = self.codes[expert], self.scale[expert]
        if self.scheme.element == "bf16":
            return QTensor(self.scheme, self.shape, codes)
        if self.scheme.element == "e4m3":
            codes = codes.view(torch.float8_e4m3fn)
        if scale.dtype == torch.uint8:
            scale = scale.view(_TORCH_SCALE[self.scheme.scale])
        global_scale = self.global_scale[expert] if self.scheme.has_global_scale else None
        return QTensor(self.scheme, self.shape, codes, scale, global_scale)


class StackedExperts(Protocol):
    """What functions on a layer's experts ask for, however the experts are laid out."""

    @property
    def num_experts(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    def __getitem__(self, expert: int, /) -> ExpertQTensors: ...


@dataclass(frozen=True)
class ExpertWeights:
    """`E` experts: gate `w1` and up `w3` are [intermediate, hidden], down `w2` the transpose."""

    w1: StackedMatrix
    w3: StackedMatrix
    w2: StackedMatrix

    @property
    def num_experts(self) -> int:
        """Experts stacked here (under expert parallelism: the local ones)."""
        return self.w1.codes.shape[0]

    @property
    def hidden_size(self) -> int:
        """Channels that go in and come out."""
        return self.w1.shape[1]

    @property
    def intermediate_size(self) -> int:
        """Channels between gate/up and down."""
        return self.w1.shape[0]

    def __getitem__(self, expert: int) -> ExpertQTensors:
        """(w1, w3, w2) of one expert."""
        return self.w1[expert], self.w3[expert], self.w2[expert]


def stack_experts(experts: Sequence[ExpertQTensors]) -> ExpertWeights:
    """Stack (w1, w3, w2) of each expert, in order; copies the data.

    `w1` and `w3` share one scheme (every engine fuses them); `w2` may have another.
    Raises V4QuantError when there is no expert or their shapes do not fit, UnsupportedScheme when
    their schemes differ or the columns are not whole groups of the scheme (tiles may be cut).
    """
    if not experts:
        raise V4QuantError("no experts to stack: give at least one (w1, w3, w2)")
    w1 = _stack([expert[0] for expert in experts], "w1")
    w3 = _stack([expert[1] for expert in experts], "w3")
    w2 = _stack([expert[2] for expert in experts], "w2")
    if w1.scheme != w3.scheme:
        raise UnsupportedScheme(
            f"w1 is {w1.scheme.name} and w3 is {w3.scheme.name}; quantize both with one scheme"
        )
    if w3.shape != w1.shape or w2.shape != w1.shape[::-1]:
        raise V4QuantError(
            f"expert shapes do not fit: w1 {w1.shape}, w3 {w3.shape}, w2 {w2.shape}; "
            "w3 must equal w1, and w2 must be its transpose"
        )
    return ExpertWeights(w1, w3, w2)


def _stack(matrices: list[QTensor], name: str) -> StackedMatrix:
    first = matrices[0]
    tile_rows, group = first.scheme.block
    if tile_rows == 1 and first.shape[1] % group:
        raise UnsupportedScheme(
            f"{name} has {first.shape[1]} columns, which are not whole groups of {group} as "
            f"{first.scheme.name} has them; choose a scheme whose groups fit"
        )
    for index, matrix in enumerate(matrices):
        if matrix.scheme != first.scheme:
            raise UnsupportedScheme(
                f"expert {index} has {name} in {matrix.scheme.name}, expert 0 in "
                f"{first.scheme.name}; the experts of a layer must share a scheme"
            )
        if matrix.shape != first.shape:
            raise V4QuantError(
                f"expert {index} has {name} of shape {matrix.shape}, expert 0 {first.shape}"
            )
    codes = torch.stack([_raw(m.codes) for m in matrices])
    if first.scale is None:
        scale = codes.new_empty((len(matrices), 0, 0))
    else:
        scale = torch.stack([_raw(m.scale) for m in matrices if m.scale is not None])
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    global_scale = torch.stack(
        [one if m.global_scale is None else m.global_scale.float().reshape(()) for m in matrices]
    )
    return StackedMatrix(first.scheme, first.shape, codes, scale, global_scale)


def _raw(tensor: Tensor) -> Tensor:
    """Eight-bit floats as their bytes; everything else as it is."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def local_expert_ids(expert_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """int32 `[T, top_k]` rows of the stacked weights, -1 where an expert is not here.

    `expert_map` (int `[all experts]`, -1 = another rank's) translates global ids; without it ids
    are rows already. Ids outside the map, such as the -1 of a padding token, give -1 too. No
    value is read on the host.
    """
    ids = expert_ids.long()
    if expert_map is not None:
        inside = (ids >= 0) & (ids < expert_map.shape[0])
        ids = torch.where(inside, expert_map.long()[ids.where(inside, 0)], -1)
    inside = (ids >= 0) & (ids < num_experts)
    return ids.where(inside, -1).int()


_SIGNED = {torch.int8, torch.int16, torch.int32, torch.int64}
"""What ids may be: -1 must be one of the numbers."""


def check_moe_inputs(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    experts: StackedExperts,
    expert_map: Tensor | None = None,
) -> None:
    """Raise V4QuantError unless shapes and dtypes are those `moe` documents."""
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] != experts.hidden_size:
        raise V4QuantError(
            f"moe: x must be bfloat16 [tokens, {experts.hidden_size}], "
            f"not {x.dtype} {list(x.shape)}"
        )
    ids = expert_ids
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.dtype not in _SIGNED:
        raise V4QuantError(
            f"moe: expert_ids must be signed integers [{x.shape[0]}, top_k], "
            f"not {ids.dtype} {list(ids.shape)}"
        )
    if expert_map is not None and (expert_map.ndim != 1 or expert_map.dtype not in _SIGNED):
        raise V4QuantError(
            "moe: expert_map must be signed integers [experts of the model], "
            f"not {expert_map.dtype} {list(expert_map.shape)}"
        )
    if expert_weights.shape != expert_ids.shape or expert_weights.dtype != torch.float32:
        raise V4QuantError(
            f"moe: expert_weights must be float32 {list(expert_ids.shape)}, "
            f"not {expert_weights.dtype} {list(expert_weights.shape)}"
        )
