"""The one table from a scheme to the functions that carry it out.

`quantize` is also the gate: what passes it is a finite matrix, so the formats below need not ask.
NaN or infinity in a weight means a damaged file, and no format here could carry it on faithfully
(E2M1 and the integers have no code for it), so it is refused, never clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from v4quant_kernels import ggml, native
from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e4m3, e8m0, fp8_block, intq, mx, nvfp4
from v4quant_kernels.scheme import Element, ScaleFormat, Scheme

# Codes from which a compiled loop is worth loading a compiler's libraries.
_COMPILED_FROM = 1 << 16
_E4M3_NAN = 0x7F  # the magnitude bits of both codes that are NaN


class _Functions(NamedTuple):
    quantize: Callable[..., QTensor]
    dequantize: Callable[[QTensor], Tensor]
    rescale: Callable[[QTensor, Tensor], QTensor] | None = None


def _quantize_bf16(x: Tensor, scheme: Scheme) -> QTensor:
    """Round to bfloat16, to nearest; a finite weight that would round to infinity is refused."""
    codes = x.to(torch.bfloat16)
    _require_finite(codes, "rounded to bfloat16")
    return QTensor(scheme, (x.shape[0], x.shape[1]), codes)


def _dequantize_bf16(q: QTensor) -> Tensor:
    return q.codes.float()


def _quantize_ggml(x: Tensor, scheme: Scheme, importance: Tensor | None = None) -> QTensor:
    """Blocks of GGUF; `importance`, float32 `[K]`, weighs each column's squared error."""
    return QTensor(scheme, (x.shape[0], x.shape[1]), ggml.encode(x, scheme.name, importance))


def _dequantize_ggml(q: QTensor) -> Tensor:
    return ggml.decode(q.codes, q.scheme.name)


def _rescale_ggml(q: QTensor, factor: Tensor) -> QTensor:
    return replace(q, codes=ggml.rescale(q.codes, q.scheme.name, factor))


_MX = _Functions(mx.quantize, mx.dequantize)
_NVFP4 = _Functions(nvfp4.quantize, nvfp4.dequantize)
_FP8 = _Functions(fp8_block.quantize, fp8_block.dequantize)
_INT = _Functions(intq.quantize, intq.dequantize, intq.rescale)
_BF16 = _Functions(_quantize_bf16, _dequantize_bf16)

_TABLE: dict[tuple[Element, ScaleFormat], _Functions] = {
    ("e2m1", "e8m0"): _MX,
    ("e2m1", "e4m3"): _NVFP4,
    ("e4m3", "e8m0"): _FP8,
    ("e4m3", "f32"): _FP8,
    ("int", "bf16"): _INT,
    ("bf16", "none"): _BF16,
    ("ggml", "none"): _Functions(_quantize_ggml, _dequantize_ggml, _rescale_ggml),
}


def _functions(scheme: Scheme) -> _Functions:
    # MXFP8 and tiled FP8 differ only in the block: one row shares a scale, or many.
    if (scheme.element, scheme.scale) == ("e4m3", "e8m0") and scheme.block[0] == 1:
        return _MX
    try:
        return _TABLE[scheme.element, scheme.scale]
    except KeyError:
        raise UnsupportedScheme(
            f"scheme '{scheme.name}': no format has {scheme.element} elements with "
            f"{scheme.scale} scales"
        ) from None


def _require_finite(x: Tensor, state: str) -> None:
    if x.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(x)):
        raise NonFiniteWeight(f"the weight {list(x.shape)} holds NaN or infinity {state}")


def quantize(x: Tensor, scheme: Scheme, **options: Tensor | torch.dtype | None) -> QTensor:
    """Code a matrix `[N, K]` (any floating dtype) by `scheme`.

    `options` go to the format's own function: `scale` (all but bf16 and GGUF's types),
    `global_scale` (nvfp4), `scale_dtype` (fp8), `importance` (GGUF's types). Raises NonFiniteWeight
    for NaN or infinity in `x` or in a given scale, and
    UnsupportedScheme when `x` is not a matrix or its columns are not whole groups.
    """
    if x.ndim != 2:
        raise UnsupportedScheme(
            f"scheme '{scheme.name}' codes matrices, not the shape {list(x.shape)}"
        )
    _require_finite(x, "as it was read")
    return _functions(scheme).quantize(x, scheme, **options)


def dequantize(q: QTensor) -> Tensor:
    """float32 `[N, K]` of any coded matrix."""
    if q.codes.is_cpu and q.codes.numel() >= _COMPILED_FROM and native.available():
        from v4quant_kernels.native import decode

        if decode.decodes(q.scheme):
            return decode.decode(q)
    return _functions(q.scheme).dequantize(q)


def rescale(q: QTensor, factor: Tensor) -> QTensor:
    """A coded matrix whose rows' scales are multiplied by `factor`, float64 `[N]`.

    Scales are rounded again as they are stored; codes stay, and so do rows of factor 1 and rows
    whose scales would leave their format's range. Raises UnsupportedScheme for formats whose scales
    are powers of two or shared by rows.
    """
    function = _functions(q.scheme).rescale
    if function is None:
        raise UnsupportedScheme(f"scheme '{q.scheme.name}': rows have no scales of their own")
    return function(q, factor)


def holds_nan(codes: Tensor) -> bool:
    """Whether a NaN is among float8_e4m3fn codes (any shape)."""
    raw = codes.view(torch.uint8)
    if raw.is_cpu and raw.numel() >= _COMPILED_FROM and native.available():
        from v4quant_kernels.native.decode import holds

        return holds(raw.contiguous().numpy(), _E4M3_NAN)
    return bool(((raw & _E4M3_NAN) == _E4M3_NAN).any())


def widen(q: QTensor) -> Tensor:
    """bfloat16 `[N, K]`, every value exact, of a matrix for which `widens_exactly` said so."""
    assert q.scale is not None and fp8_block.widens_exactly(q.scale)
    if not (q.codes.is_cpu and native.available()):
        return dequantize(q).bfloat16()
    from v4quant_kernels.native.widen import widen as loop

    out = torch.empty(q.shape, dtype=torch.bfloat16)
    codes = q.codes.contiguous().view(torch.uint8).numpy()
    own = e4m3.decode(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
    table = own.bfloat16().view(torch.int16)
    exponent = e8m0.exponents(q.scale).contiguous()
    loop(codes, exponent.numpy(), q.scheme.block, table.numpy(), out.view(torch.int16).numpy())
    return out
