"""Float64 references with error bounds, to judge kernels by.

Nothing here shares code with what it judges: number formats are tables written from their
definitions, roundings work on the exponents that `frexp` returns. Slow and plain on purpose.

A reference returns `(value, bound)`. `bound` is how far a correct float32 computation may be from
`value`, element by element:

* a sum of K products may err by `(8 sqrt(K) + K/8 + 16) 2^-24 sum |a| |b|`. The first term is the
  probabilistic bound of Higham and Mary (2019, theorem 2.4) with lambda = 8, which rounding errors
  exceed once in 10^13; the second allows for tensor cores, which truncate where they add the 16
  products of one instruction to the sum;
* FP8 tensor cores of sm_89 and sm_90 keep 13 bits behind the point while they add the 32 products
  of an instruction to a sum of at most 128: `4 * 2^-13 sum |a| |b|` more, where they are used;
* where an intermediate is rounded (h to bfloat16, then perhaps to E4M3), a correct kernel may land
  on the neighbouring number if the exact value lies within its error of a rounding boundary. Those
  elements, and only those, contribute their possible step, summed like the errors above;
* the final rounding to bfloat16 adds half a unit in the last place.

So a single wrong weight, scale or slot stands out, while legitimate differences in order do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from v4quant_kernels.experts import Activations, ExpertWeights
from v4quant_kernels.qtensor import QTensor

F32_UNIT = 2.0**-24
_E2M1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), dtype=torch.float64)
_E4M3_MAX = 448.0
_FP8_SUM_ERROR = 4 * 2.0**-13
_LAMBDA = 8.0  # standard deviations that independent errors of random sign are granted


def e4m3_table() -> Tensor:
    """float64 `[256]`: the value of each E4M3 code by its definition; NaN at 127 and 255."""
    values = []
    for code in range(256):
        sign = -1.0 if code & 128 else 1.0
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 0:
            values.append(sign * mantissa * 2.0**-9)
        else:
            values.append(sign * (8 + mantissa) * 2.0 ** (exponent - 10))
    values[127] = values[255] = float("nan")
    return torch.tensor(values, dtype=torch.float64)


def e2m1_values(packed: Tensor) -> Tensor:
    """float64 `[..., 2n]` values of uint8 `[..., n]` bytes, low nibble first."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    return _E2M1[codes & 7] * (1.0 - 2.0 * (codes >> 3))


def e8m0_values(stored: Tensor) -> Tensor:
    """float64 values of E8M0 bytes; NaN for 255."""
    byte = stored.view(torch.uint8).double()
    return torch.where(byte == 255, torch.nan, torch.exp2(byte - 127))


def decode64(matrix: QTensor) -> Tensor:
    """float64 `[N, K]`: the exact weight."""
    rows, columns = matrix.shape
    element = matrix.scheme.element
    if element == "bf16":
        return matrix.codes.double()
    if element == "e2m1":
        values = e2m1_values(matrix.codes)
    elif element == "e4m3":
        values = e4m3_table()[matrix.codes.view(torch.uint8).long()]
    else:
        bits = matrix.scheme.bits
        stream = ((matrix.codes.unsqueeze(-1) >> torch.arange(8)) & 1).view(rows, -1, bits)
        values = (stream * 2 ** torch.arange(bits)).sum(-1).double() - 2 ** (bits - 1)
    assert matrix.scale is not None
    scale = matrix.scale
    scales = e8m0_values(scale) if scale.dtype == torch.float8_e8m0fnu else scale.double()
    if scale.dtype == torch.float8_e4m3fn:
        scales = e4m3_table()[scale.view(torch.uint8).long()]
    block_rows, block_columns = matrix.scheme.block
    spread = scales.repeat_interleave(block_rows, 0).repeat_interleave(block_columns, 1)
    weight = values * spread[:rows, :columns]
    return weight if matrix.global_scale is None else weight * matrix.global_scale.double()


def _round_to_step(value: Tensor, mantissa_bits: int, min_exponent: int) -> tuple[Tensor, Tensor]:
    """(nearest number, ties to even; spacing there) of a float with these parameters."""
    _, exponent = torch.frexp(value)  # |value| in [2^(exponent-1), 2^exponent)
    step = torch.exp2((exponent - 1).clamp(min=min_exponent).double() - mantissa_bits)
    return torch.round(value / step) * step, step


def round_bf16(value: Tensor) -> Tensor:
    """float64 rounded to bfloat16's grid."""
    return _round_to_step(value, 7, -126)[0]


def e4m3_scale(value: Tensor, block: int = 128) -> Tensor:
    """float64, shaped like `value`: the release's activation scale of each element's block."""
    padded = torch.nn.functional.pad(value.abs(), (0, -value.shape[-1] % block))
    amax = padded.view(*padded.shape[:-1], -1, block).amax(-1).clamp(min=1e-4).float()
    mantissa, exponent = torch.frexp(amax * torch.tensor(1 / _E4M3_MAX, dtype=torch.float32))
    scale = torch.exp2((exponent - (mantissa == 0.5).int()).double())
    return scale.repeat_interleave(block, -1)[..., : value.shape[-1]]


def round_e4m3(value: Tensor, scale: Tensor) -> Tensor:
    """float64 `value / scale` clamped and rounded to E4M3, times `scale`."""
    return _round_to_step((value / scale).clamp(-_E4M3_MAX, _E4M3_MAX), 3, -6)[0] * scale


def _sum_error(terms: int) -> float:
    """Error of a float32 sum of products, relative to the sum of their magnitudes."""
    return (_LAMBDA * math.sqrt(terms) + terms / 8 + 16) * F32_UNIT


def _product(weight: Tensor, x: Tensor, fp8_sums: bool) -> tuple[Tensor, Tensor]:
    """x @ weight.T and what accumulation may add to it."""
    unit = _sum_error(x.shape[-1]) + (_FP8_SUM_ERROR if fp8_sums else 0.0)
    return x @ weight.T, unit * (x.abs() @ weight.abs().T)


def _rounded_h(h: Tensor, error: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """h as the kernel stores it, and the step by which a correct kernel may differ."""
    low, middle, high = round_bf16(h - error), round_bf16(h), round_bf16(h + error)
    if activations == "bf16":
        return middle, high - low
    large = torch.where(middle.abs() >= low.abs(), middle, low)
    large = torch.where(high.abs() > large.abs(), high, large)
    crosses_zero = low * high <= 0
    small = torch.where(low.abs() < high.abs(), low, high).masked_fill(crosses_zero, 0.0)
    scales = e4m3_scale(small), e4m3_scale(large)
    every = torch.stack([round_e4m3(v, s) for v in (low, high) for s in scales])
    return round_e4m3(middle, e4m3_scale(middle)), every.amax(0) - every.amin(0)


def _sum_of_steps(step: Tensor, weight: Tensor) -> Tensor:
    """How far steps of h, of either sign, carry through `weight`."""
    worst = step @ weight.abs().T
    likely = _LAMBDA * (step.square() @ weight.square().T).sqrt()
    return torch.minimum(worst, likely) * (1 + 2**-10)


def moe64(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    experts: ExpertWeights,
    swiglu_limit: float,
    activations: Activations = "bf16",
    *,
    fp8_sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """(value, bound), float64 `[T, hidden]`, for local expert ids; -1 is skipped.

    fp8_sums: allow for the short accumulator of FP8 tensor cores.
    """
    tokens, top_k = expert_ids.shape
    value = torch.zeros(tokens, top_k, experts.hidden_size, dtype=torch.float64)
    error = torch.zeros_like(value)
    x = x.double()
    if activations == "e4m3":
        x = round_e4m3(x, e4m3_scale(x))
    for expert in sorted(set(expert_ids[expert_ids >= 0].tolist())):
        w1, w3, w2 = (decode64(q) for q in experts[expert])
        token, choice = (expert_ids == expert).nonzero(as_tuple=True)
        routing = expert_weights[token, choice].double().unsqueeze(1)
        gate, gate_error = _product(w1, x[token], fp8_sums)
        up, up_error = _product(w3, x[token], fp8_sums)
        gate = gate.clamp(max=swiglu_limit)
        up = up.clamp(-swiglu_limit, swiglu_limit)
        silu = gate * torch.sigmoid(gate)
        h = routing * silu * up
        # |silu'| < 1.1; exp itself errs in proportion to its argument.
        h_error = routing.abs() * (1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error)
        h_error += (16 + 4 * gate.abs()) * F32_UNIT * h.abs() + 2.0**-126
        h, step = _rounded_h(h, h_error, activations)
        y, y_error = _product(w2, h, fp8_sums)
        value[token, choice] = y
        error[token, choice] = y_error + _sum_of_steps(step, w2)
    total = value.sum(1)
    bound = error.sum(1) + (top_k + 2) * F32_UNIT * value.abs().sum(1)
    return total, bound + _round_to_step(total.abs() + bound, 7, -126)[1] / 2


def indexer64(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    positions: Tensor,
    *,
    fp8_sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """(value, bound), float64 `[T, S]`, without rounding of products; -inf where not visible.

    fp8_sums: allow for the short accumulator of FP8 tensor cores.
    """
    half = q_codes.shape[-1]
    query = e2m1_values(q_codes) * e8m0_values(q_scale).repeat_interleave(32, -1)
    keys = e2m1_values(k_packed[:, :half])
    keys = keys * e8m0_values(k_packed[:, half:].contiguous()).repeat_interleave(32, -1)
    weights = head_weights.double().unsqueeze(-1)
    value = (weights * (query @ keys.T).clamp(min=0)).sum(1)
    size = (weights.abs() * (query.abs() @ keys.abs().T)).sum(1)
    unit = _sum_error(2 * half) + (_FP8_SUM_ERROR if fp8_sums else 0.0)
    bound = (unit + _sum_error(q_codes.shape[1])) * size
    hidden = torch.arange(keys.shape[0]) >= ((positions + 1) // 4).unsqueeze(-1)
    return value.masked_fill(hidden, -torch.inf), bound.masked_fill(hidden, 0.0)
