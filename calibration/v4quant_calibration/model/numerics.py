"""The few operations every part of the model shares.

Everything between matrix products is float32. Products take their operands in
`ForwardOptions.matmul_dtype` and give float32. Inputs of quantized linears pass through
`quantized_input` first: the rounding belongs to the input, not to the product, so that one rounded
input can feed several linears, as in the release's code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels import dispatch
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.twins.activation import (
    fake_quant_e2m1,
    fake_quant_e2m1_e4m3,
    fake_quant_e4m3,
    hadamard,
)


@dataclass(frozen=True)
class Roundings:
    """What a release rounds activations to.

    linear, window: columns of a block of E4M3, of linears' inputs and of KV entries.
    rope_too: whether the rope part of KV entries is rounded as well. entries_fp4: whether
    compressed entries are in E2M1 (groups of 16, E4M3 scales) and not like the window's.
    rotates_index: whether index vectors are rotated (Hadamard) before they are rounded to E2M1.
    """

    linear: int
    window: int
    rope_too: bool
    entries_fp4: bool
    rotates_index: bool


_V4 = Roundings(128, 64, rope_too=False, entries_fp4=False, rotates_index=True)
_V41 = Roundings(32, 32, rope_too=True, entries_fp4=True, rotates_index=False)


def roundings(config: ModelConfig) -> Roundings:
    """The roundings of a model's release."""
    return _V4 if config.v41 is None else _V41


class NonFiniteActivation(V4QuantError):
    """A layer computed NaN or infinity: some weight or scale it read is broken."""


def require_finite(x: Tensor, module: str) -> None:
    """Raise NonFiniteActivation naming `module` when its output `x` holds NaN or infinity."""
    # Both extremes of a tensor with a NaN are NaN; far cheaper than isfinite of every element.
    low, high = x.aminmax()
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise NonFiniteActivation(
            f"{module}: the output holds NaN or infinity; a weight or scale of it is damaged"
        )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dim, times `weight` if given. Float32."""
    scale = inverse_rms(x, eps)
    return x * scale if weight is None else (x * scale).mul_(weight)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dim, which is kept with length 1."""
    # x * x, because torch's square() and pow() are several times slower on a CPU.
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def quantized_input(x: Tensor, config: ModelConfig, options: ForwardOptions) -> Tensor:
    """The input of an FP8 or FP4 linear: E4M3 per block in official mode, else unchanged."""
    return fake_quant_e4m3(x, roundings(config).linear) if options.official else x


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product of operands rounded to `dtype`, float32 or bfloat16; sums are float32."""
    if dtype == torch.float32:
        return dispatch.float32_product(a, b)
    assert dtype == torch.bfloat16, dtype
    return dispatch.bf16_product(a, b)


def linear(x: Tensor, weight: Tensor, options: ForwardOptions) -> Tensor:
    """x `[..., in]` times weight `[out, in]` transposed, in the options' operand dtype."""
    return product(x, weight.mT, options.matmul_dtype)


def round_window_(entries: Tensor, config: ModelConfig, options: ForwardOptions) -> None:
    """Round the window's KV entries `[..., head_dim]` in place, as the release caches them."""
    if options.rounds_kv:
        rules = roundings(config)
        part = entries if rules.rope_too else entries[..., : -config.qk_rope_head_dim]
        part.copy_(fake_quant_e4m3(part.contiguous(), rules.window))


def round_compressed_(entries: Tensor, config: ModelConfig, options: ForwardOptions) -> None:
    """Round compressed KV entries `[..., head_dim]` in place, as the release caches them."""
    if options.rounds_kv and roundings(config).entries_fp4:
        entries.copy_(fake_quant_e2m1_e4m3(entries))
    else:
        round_window_(entries, config, options)


def rounded_index(x: Tensor, config: ModelConfig, options: ForwardOptions) -> Tensor:
    """Index queries or keys `[..., index_head_dim]` as the release scores them."""
    if not options.rounds_index:
        return x
    return fake_quant_e2m1(hadamard(x) if roundings(config).rotates_index else x)


def top_k_lowest_index(scores: Tensor, top_k: int, what: str) -> Tensor:
    """Indices of the `top_k` largest of each row, ascending; equal scores go to lower indices.

    scores `[rows, n]` with top_k <= n; int64 `[rows, top_k]`. torch.topk breaks ties as it
    likes, which would make two runs of one model disagree. Rows may hold -inf. Raises
    NonFiniteActivation, naming `what`, when a score is NaN.
    """
    threshold = scores.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = scores > threshold
    level = scores == threshold
    room = top_k - above.sum(-1, keepdim=True)
    keep = above | (level & (level.cumsum(-1) <= room))
    found = keep.nonzero()[:, 1]
    if found.numel() != scores.shape[0] * top_k:
        raise NonFiniteActivation(
            f"{what}: the scores are not numbers; a weight or scale of this layer is damaged"
        )
    return found.view(scores.shape[0], top_k)
