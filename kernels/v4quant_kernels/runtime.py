"""RuntimeExperts: a layer's experts in the order kernels read them, made once when loading.

`prepare_experts` rearranges what `ExpertWeights` holds and changes no value:

* codes become *words* (`words.py`), which decode with few instructions;
* gate and up rows alternate in blocks of eight in one matrix, so that one GEMM computes both and a
  program finds a channel's gate and up in its own registers;
* scales get one row per weight row, in the form the kernel multiplies by (`scale_forms.py`);
* whatever is common to a row (global scale, exponent shifts) becomes one float32 `row_scale`, which
  multiplies the finished sums.

`operand` chooses what tensor cores will multiply: "bf16" on any GPU; "fp8" where E4M3 activations
meet FP8 tensor cores (sm_89, sm_90) and the weights fit; "native" where the machine multiplies
block-scaled numbers of four and eight bits itself (sm_100), "native8" where only eight (sm_120). A
format that cannot serve an operand exactly is laid
out for "bf16", with the same result.

Everything carries the tag of its layout, `LAYOUT/code/scale`; kernels refuse a tag they do not
know. `RuntimeExperts[e]` undoes the arrangement for one expert and returns its QTensors, bit for
bit: that is how the torch twin reads it and how tests prove that nothing was lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme, V4QuantError
from v4quant_kernels.experts import ExpertQTensors, ExpertWeights, StackedMatrix
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1
from v4quant_kernels.ref.pack import pack_bits, unpack_bits
from v4quant_kernels.scale_forms import (
    BIAS,
    FP8_EXPONENTS,
    SCALE_CODES,
    from_pieces,
    from_ue5m3,
    in_pieces,
    scale_form,
    value_range,
    zero_groups,
)
from v4quant_kernels.scheme import Scheme
from v4quant_kernels.words import PIECES, SPREAD, columns_per_block, from_words, to_words

Operand = Literal["bf16", "fp8", "native", "native8"]
LAYOUT = "v4q3"

_ROWS = 8  # gate and up rows alternate in blocks of this many


@dataclass(frozen=True)
class RuntimeMatrix:
    """One or two projections of `E` experts as words.

    shape: `[N, K]` of each projection. R is `N` rounded up to eights, times the projections.
    words: int32 `[E, R, W]`. scale: uint8 or bfloat16 `[E, R, groups]`. row_scale: float32
    `[E, R]`. reference: int32 `[E, R]`. global_scale: float32 `[projections, E]`.
    """

    scheme: Scheme
    shape: tuple[int, int]
    code: str
    scale_code: str
    words: Tensor
    scale: Tensor
    row_scale: Tensor
    reference: Tensor
    global_scale: Tensor
    stored_scale: torch.dtype

    @property
    def tag(self) -> str:
        """What a kernel must know to read the words."""
        return f"{LAYOUT}/{self.code}/{self.scale_code}"

    @property
    def operand(self) -> Operand:
        """What tensor cores multiply: decided by the layout."""
        if self.scale_code == "e8m0" and self.scheme.group_size == 32:
            return "native8" if self.code == "t8" else "native"
        return "fp8" if self.code in {"t8", "b8"} else "bf16"

    @property
    def projections(self) -> int:
        """1, or 2 for gate and up together."""
        return self.global_scale.shape[0]

    @property
    def rows(self) -> int:
        """Rows of the words, those of all projections."""
        return self.words.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes a kernel reads when every expert is active."""
        parts = (self.words, self.scale, self.row_scale)
        return sum(p.numel() * p.element_size() for p in parts)

    def __getitem__(self, expert: int) -> list[QTensor]:
        """The QTensors of one expert, as they were before the arrangement."""
        codes = _separate(from_words(self.words[expert], self.code), self)
        scales = _separate(self._stored_scale(expert), self)
        return [
            _qtensor(self, c, s, g)
            for c, s, g in zip(codes, scales, self.global_scale[:, expert], strict=True)
        ]

    def _stored_scale(self, expert: int) -> Tensor:
        scale, reference = self.scale[expert], self.reference[expert].unsqueeze(-1)
        if self.code in SPREAD and self.scale_code != "none":
            group = self.scheme.group_size
            scale = from_pieces(scale, group, -(-self.shape[1] // group))
        if self.scale_code == "field":
            return scale.int() - BIAS[self.scheme.element] + reference
        return from_ue5m3(scale) if self.scale_code == "ue5m3" else scale


@dataclass(frozen=True)
class RuntimeExperts:
    """A layer's experts: gate and up as one matrix, and down."""

    gate_up: RuntimeMatrix
    down: RuntimeMatrix

    @property
    def num_experts(self) -> int:
        """Experts held here (under expert parallelism: the local ones)."""
        return self.down.words.shape[0]

    @property
    def hidden_size(self) -> int:
        """Channels that go in and come out."""
        return self.down.shape[0]

    @property
    def intermediate_size(self) -> int:
        """Channels between gate/up and down."""
        return self.down.shape[1]

    def __getitem__(self, expert: int) -> ExpertQTensors:
        """(w1, w3, w2) of one expert, unarranged."""
        w1, w3 = self.gate_up[expert]
        return w1, w3, self.down[expert][0]


def prepare_experts(experts: ExpertWeights, operand: Operand = "bf16") -> RuntimeExperts:
    """Arrange `experts` for kernels multiplying `operand`; the weights' device does the work.

    Raises NonFiniteWeight for NaN codes or scales, UnsupportedScheme for scales that no kernel here
    can apply exactly (more than 2^130 apart in one row, or float32 scales of tiled FP8 that are no
    powers of two).
    """
    return RuntimeExperts(
        _arrange([experts.w1, experts.w3], operand), _arrange([experts.w2], operand)
    )


def check_layout(matrix: RuntimeMatrix) -> None:
    """Raise V4QuantError unless this version's kernels can read the matrix."""
    known = [f"{LAYOUT}/{c}/{s}" for c in PIECES for s in SCALE_CODES]
    if matrix.tag not in known:
        raise V4QuantError(
            f"weights are laid out as '{matrix.tag}', which this version's kernels cannot read; "
            "prepare them again from the checkpoint"
        )


def _arrange(parts: list[StackedMatrix], operand: Operand) -> RuntimeMatrix:
    scheme = parts[0].scheme
    code, scale_code = layout_codes(scheme, operand)
    if scale_code == "relative" and not all(_fits_fp8(p) for p in parts):
        code, scale_code = layout_codes(scheme, "bf16")
    words, scales, factors, references = [], [], [], []
    for expert in range(parts[0].codes.shape[0]):
        codes = _interleave([_integer_codes(p, expert, code) for p in parts])
        spare = -codes.shape[1] % columns_per_block(code)
        words.append(to_words(pad(codes, (0, spare)), code))
        stored = _interleave([_row_scales(p, expert) for p in parts])
        zero = zero_groups(codes, scheme, stored.shape[1])
        scale, reference, factor = scale_form(stored, zero, scheme, scale_code)
        if code in SPREAD and scale_code != "none":
            scale = in_pieces(scale, scheme.group_size)
        globals_ = [p.global_scale[expert].expand(p.shape[0], 1) for p in parts]
        row_scale = factor * _interleave(globals_).squeeze(1)
        if not bool(torch.isfinite(row_scale).all()):
            raise NonFiniteWeight(f"a global scale of expert {expert} leaves float32's range")
        scales.append(scale)
        references.append(reference)
        factors.append(row_scale)
    return RuntimeMatrix(
        scheme,
        parts[0].shape,
        code,
        scale_code,
        torch.stack(words),
        torch.stack(scales),
        torch.stack(factors),
        torch.stack(references),
        torch.stack([p.global_scale for p in parts]),
        parts[0].scale.dtype,
    )


def layout_codes(scheme: Scheme, operand: Operand) -> tuple[str, str]:
    """(word code, scale code) of a scheme, if its values fit the operand.

    Raises UnsupportedScheme for a format that no kernel here multiplies.
    """
    if scheme.element not in {"e2m1", "e4m3", "int", "bf16"}:
        raise UnsupportedScheme(
            f"no kernel multiplies '{scheme.name}' weights; use backend='torch'"
        )
    if scheme.element == "bf16":
        return "w16", "none"
    if scheme.element == "int":
        return ("i8" if scheme.bits == 8 else "i4"), "bf16"
    if scheme.element == "e2m1" and scheme.scale == "e4m3":
        return "t16", "ue5m3"
    if operand in {"native", "native8"} and scheme.block == (1, 32):
        four_bits = "n4" if operand == "native" else "t8"
        return (four_bits if scheme.element == "e2m1" else "b8"), "e8m0"
    if operand != "bf16" and scheme.element == "e4m3" and scheme.group_size == 128:
        return "b8", "e8m0"
    if operand == "fp8" and scheme.element == "e2m1":
        return "t8", "relative"
    return ("t16" if scheme.element == "e2m1" else "e16"), "field"


def _fits_fp8(matrix: StackedMatrix) -> bool:
    """Whether in every row the exponents of groups that are not zero fit an FP8 number."""
    low, high = FP8_EXPONENTS
    for expert in range(matrix.codes.shape[0]):
        stored = _row_scales(matrix, expert)
        codes = _integer_codes(matrix, expert, "t8")
        zero = zero_groups(codes, matrix.scheme, stored.shape[1])
        least, most = value_range(stored, zero)
        if bool((most - least > high - low).any()):
            return False
    return True


def _integer_codes(matrix: StackedMatrix, expert: int, code: str) -> Tensor:
    """int32 `[N, K]` codes of one expert as the word code wants them."""
    stored, scheme = matrix.codes[expert], matrix.scheme
    if scheme.element == "e2m1":
        return e2m1.unpack(stored).int()
    if scheme.element == "bf16":
        return stored.view(torch.int16).int() & 0xFFFF
    if scheme.element == "e4m3":
        codes = stored.view(torch.uint8).int()
        if bool(((codes & 127) == 127).any()):
            raise NonFiniteWeight(f"expert {expert} holds E4M3 codes that are not numbers")
        return codes
    integers = unpack_bits(stored, scheme.bits, matrix.shape[1]).int()
    return integers + (128 if code == "i8" else 8)


def _row_scales(matrix: StackedMatrix, expert: int) -> Tensor:
    """Scales of one expert, a row per weight row; E8M0 and E4M3 as int32 bytes."""
    scale, rows = matrix.scale[expert], matrix.shape[0]
    if matrix.scheme.scale == "none":
        return torch.zeros(rows, 0, dtype=torch.int32, device=scale.device)
    if scale.dtype == torch.float32:
        bits = scale.view(torch.int32)
        if bool(((bits & -0x7F800001) != 0).any()):
            raise UnsupportedScheme(
                f"the float32 scales of expert {expert} are not all normal powers of two, and "
                "kernels multiply by nothing else; use backend='torch'"
            )
        scale = bits >> 23
    if scale.dtype == torch.uint8:
        scale = scale.int()
    if matrix.scheme.scale in {"e8m0", "e4m3"}:
        nan = 127 if matrix.scheme.scale == "e4m3" else 255
        if bool((scale >= nan).any()):
            raise NonFiniteWeight(f"expert {expert} has a scale that is NaN or negative")
    return scale.repeat_interleave(matrix.scheme.block[0], 0)[:rows]


def _interleave(parts: list[Tensor]) -> Tensor:
    """`[R, ...]` rows of `parts`, alternating in blocks of eight; missing rows are zeros."""
    spare = -parts[0].shape[0] % _ROWS
    padded = [pad(p, (0, 0, 0, spare)) for p in parts]
    blocks = [p.view(p.shape[0] // _ROWS, _ROWS, p.shape[1]) for p in padded]
    return torch.stack(blocks, dim=1).flatten(0, 2)


def _separate(rows: Tensor, matrix: RuntimeMatrix) -> list[Tensor]:
    """`[N, ...]` rows of each projection; the inverse of `_interleave`."""
    count = rows.shape[0] // (matrix.projections * _ROWS)
    blocks = rows.view(count, matrix.projections, _ROWS, rows.shape[1])
    return [blocks[:, i].flatten(0, 1)[: matrix.shape[0]] for i in range(matrix.projections)]


def _qtensor(matrix: RuntimeMatrix, codes: Tensor, scale: Tensor, global_scale: Tensor) -> QTensor:
    scheme, columns = matrix.scheme, matrix.shape[1]
    codes = codes[:, :columns]
    if scheme.element == "bf16":
        patterns = codes.contiguous().to(torch.int16)
        return QTensor(scheme, matrix.shape, patterns.view(torch.bfloat16))
    if scheme.element == "e2m1":
        stored = e2m1.pack(codes.to(torch.uint8))
    elif scheme.element == "e4m3":
        stored = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        integers = (codes - (128 if matrix.code == "i8" else 8)).to(torch.int8)
        stored = pack_bits(integers, scheme.bits)
    scale = scale[:: scheme.block[0]]
    if matrix.stored_scale == torch.float32:
        scale = (scale.int() << 23).view(torch.float32)
    elif scheme.scale in {"e8m0", "e4m3"}:
        dtype = torch.float8_e8m0fnu if scheme.scale == "e8m0" else torch.float8_e4m3fn
        scale = scale.to(torch.uint8).view(dtype)
    return QTensor(
        scheme, matrix.shape, stored, scale, global_scale if scheme.has_global_scale else None
    )
