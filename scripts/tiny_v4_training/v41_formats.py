"""Which V4.1 tensor is stored in which format, and that rounding: FP4 rows, FP8 tiles and FP8 rows.

Own arithmetic rather than the kernels': the product reads these files back and must find in them
what another writer would have put there. A scale is the smallest power of two that keeps the
largest value of its block within the element's range.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
_FP8_MAX, _FP4_MAX = 448.0, 6.0
_FP8_LINEARS = (
    "attn.wq_a.weight",
    "attn.wq_b.weight",
    "attn.wkv.weight",
    "attn.wo_a.weight",
    "attn.wo_b.weight",
    "indexer.wq_b.weight",
    "engram.wkv.weight",
    "shared_experts.w1.weight",
    "shared_experts.w2.weight",
    "shared_experts.w3.weight",
    "main_proj.weight",
)
_F32_ENDINGS = (
    "attn_sink",
    "gate.bias",
    "gate.bias_vl",
    "_fn",
    "_base",
    "_scale",
    "e_score_correction_bias",
)


def kind(name: str) -> str:
    """fp4, fp8 (tiles), rows (FP8 rows), f32 or bf16, from a name of the model or the release."""
    if name.endswith(("gate_up_proj", "down_proj")) or ".experts." in name:
        return "fp4"
    if name.endswith("engram.embed.weight"):
        return "rows"
    if name.endswith(_FP8_LINEARS) and "compressor" not in name:
        return "fp8"
    return "f32" if name.endswith(_F32_ENDINGS) else "bf16"


def rounded_like_stored(name: str, weight: Tensor) -> Tensor | None:
    """`weight` as it reads back from the files; None where it is stored in float32."""
    match kind(name):
        case "fp4":
            codes, exponent = fp4(weight)
            return _spread(exponent) * E2M1[codes]
        case "rows":
            codes, exponent = fp8_rows(weight)
            return _spread(exponent) * codes.float()
        case "fp8":
            codes, exponent = fp8_tiles(weight)
            tall = torch.exp2(exponent.float()).repeat_interleave(BLOCK, 0)
            wide = tall.repeat_interleave(BLOCK, 1)
            return codes.float() * wide[: weight.shape[0], : weight.shape[1]]
        case "bf16":
            return weight.bfloat16().float()
    return None


# Values of the sixteen codes; bit 3 is the sign.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])
_BETWEEN = (E2M1[1:8] + E2M1[:7]) / 2


def fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 `[..., n]` (0 to 15) and exponents `[..., n / 32]`, nearest, ties to even."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    exponent = _exponent(blocks.abs().amax(-1), _FP4_MAX)
    x = torch.ldexp(blocks, -exponent.unsqueeze(-1))
    size = x.abs().contiguous()
    code = torch.bucketize(size, _BETWEEN)  # a tie goes to the lower code ...
    tie = (code < 7) & (size == _BETWEEN[code.clamp_max(6)])
    code = code + (tie & (code % 2 == 1))  # ... unless that is odd
    return (code + 8 * torch.signbit(x)).flatten(-2), exponent


def fp8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 `[rows, n]` and exponents `[rows, n / 32]`."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    exponent = _exponent(blocks.abs().amax(-1), _FP8_MAX)
    x = torch.ldexp(blocks, -exponent.unsqueeze(-1)).flatten(-2)
    return x.to(torch.float8_e4m3fn), exponent


def fp8_tiles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 `[o, i]` and exponents of its 32 x 32 tiles, the last of which may be partial."""
    o, i = weight.shape
    padded = F.pad(weight.float(), (0, -i % BLOCK, 0, -o % BLOCK))
    tiles = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    exponent = _exponent(tiles.abs().amax((1, 3)), _FP8_MAX)
    x = torch.ldexp(tiles, -exponent[:, None, :, None]).flatten(2).flatten(0, 1)
    return x[:o, :i].to(torch.float8_e4m3fn).contiguous(), exponent


def e8m0(exponent: Tensor) -> Tensor:
    """Exponents as the bytes that store them."""
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def _exponent(largest: Tensor, top: float) -> Tensor:
    """int32: the smallest e with `largest <= top * 2^e`; -127 for blocks of zeros."""
    mantissa, e = torch.frexp(largest / top)
    e = torch.where(mantissa == 0.5, e - 1, e)
    return torch.where(largest > 0, e, torch.full_like(e, -127)).clamp(-127, 127)


def _spread(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.float()).repeat_interleave(BLOCK, -1)
