"""The mean-square-optimal scale of every integer group, exactly, in about one pass over the bytes.

Rounding to amax / 7 wastes accuracy: a slightly smaller scale that clips the largest element, one
whose grid meets the source's own points, or a negative one (the grid has one more integer below
zero than above) has a lower error. For MXFP4 sources the search is exact over *all* bfloat16 scales
of a window (the argument is in v4quant_kernels.ref.lattice): each group is reduced to a histogram
of its 16 codes, which gives the error of every rounding assignment at its own best scale. Nothing
is decoded and no BF16 copy is made. With calibration statistics the histogram is weighted by the
second moment of each input channel, which turns weight error into expected output error (the
diagonal of the layer-wise objective of Optimal Brain Quantization, Frantar & Alistarh 2022,
arXiv 2208.11580).

On the CPU the search is a compiled loop (v4quant_kernels.native.lattice), elsewhere torch
(lattice_search.py); both find the same bits. Sources that are not MXFP4 (FP8 experts of the Base
releases) are searched over a grid of scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_kernels import native
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0
from v4quant_kernels.ref.lattice_search import search_part
from v4quant_kernels.ref.mx import GROUP
from v4quant_kernels.ref.pack import pack_bits, packed_bytes
from v4quant_kernels.scheme import MXFP4, Scheme

# Blocks of 32 the torch search handles at a time; the temporaries are about 300 floats a block.
_BLOCKS = 1 << 15
# Scales an octave tried for sources that are not MXFP4, from amax/(2 qmax) to amax/(qmax/2); below
# 4 bits from amax/(4 qmax), where clipping more pays. The usual amax/qmax is among them, so the
# search never does worse.
_PER_OCTAVE = 48


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix with its unweighted error against the source values.

    squared_error, squared_norm: sums over all elements; max_error: largest absolute error.
    """

    tensor: QTensor
    squared_error: float
    squared_norm: float
    max_error: float

    @property
    def relative_rms(self) -> float:
        """Root of error energy over source energy (0 for a matrix of zeros)."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


def can_search(q: QTensor, scheme: Scheme) -> bool:
    """Whether every scale of a window can be listed: MXFP4 onto integers of four bits or fewer."""
    return q.scheme == MXFP4 and scheme.is_packed_integer and scheme.bits <= 4


def search_mxfp4(q: QTensor, scheme: Scheme, importance: Tensor | None = None) -> QuantizedMatrix:
    """Quantize an MXFP4 matrix [N, K] to 2 to 4-bit integers with each group's optimal scale.

    importance: float [K], the weight of each input channel's squared error (second moment of the
        input); None weighs all alike. The result is on `q`'s device. Raises UnsupportedScheme when
        K is not a multiple of the group.
    """
    assert can_search(q, scheme) and q.scale is not None
    rows, columns = q.shape
    _check_columns(columns, scheme)
    device = q.codes.device
    codes = torch.empty(
        (rows, packed_bytes(columns, scheme.bits)), dtype=torch.uint8, device=device
    )
    scale = torch.empty((rows, columns // scheme.group_size), dtype=torch.bfloat16, device=device)
    weights = None if importance is None else channel_weights(importance, scheme.group_size)
    if device.type == "cpu" and native.available():
        loss = _search_compiled(q, scheme, weights, codes, scale)
    else:
        loss = _search_torch(q, scheme, weights, codes, scale)
    return QuantizedMatrix(QTensor(scheme, q.shape, codes, scale), *loss)


def _check_columns(columns: int, scheme: Scheme) -> None:
    if columns % scheme.group_size:
        raise UnsupportedScheme(
            f"{columns} columns are not a multiple of group_size {scheme.group_size}"
        )


def _search_compiled(
    q: QTensor, scheme: Scheme, weights: Tensor | None, codes: Tensor, scale: Tensor
) -> tuple[float, float, float]:
    from v4quant_kernels.native.lattice import quantize_mxfp4

    assert q.scale is not None
    return quantize_mxfp4(
        q.codes.contiguous().numpy(),
        e8m0.exponents(q.scale).contiguous().numpy(),
        scheme.group_size // GROUP,
        scheme.bits,
        None if weights is None else weights.numpy(),
        codes.numpy(),
        scale.view(torch.uint16).numpy(),
    )


def _search_torch(
    q: QTensor, scheme: Scheme, weights: Tensor | None, codes: Tensor, scale: Tensor
) -> tuple[float, float, float]:
    assert q.scale is not None
    rows, columns = q.shape
    exponents = e8m0.exponents(q.scale)
    error = norm = largest = 0.0
    step = max(1, _BLOCKS // (columns // GROUP))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found = search_part(q.codes[part], exponents[part], scheme, weights)
        codes[part] = pack_bits(found.integers, scheme.bits)
        scale[part] = found.scale
        error, norm = error + found.squared_error, norm + found.squared_norm
        largest = max(largest, found.max_error)
    return error, norm, largest


def channel_weights(importance: Tensor, group_size: int) -> Tensor:
    """Weights with mean 1 inside each group, as multiples of 2^-14: float64 [K] on the CPU.

    Only ratios inside a group matter to its scale. A small floor keeps every channel in the game:
    a channel that calibration saw as zero may still carry input later. A group nobody feeds falls
    back to ones. The coarse grid makes all sums of the search exact.
    """
    grouped = importance.detach().cpu().double().clamp_min(0).view(-1, group_size)
    mean = grouped.mean(1, keepdim=True)
    relative = torch.where(mean > 0, grouped / mean.clamp_min(1e-300), 1.0)
    return torch.round(relative.view(-1) * 2**14).clamp_min_(2).div_(2**14)


def search_dense(x: Tensor, scheme: Scheme, importance: Tensor | None = None) -> QuantizedMatrix:
    """Quantize float32 values [N, K] to integer groups, each scale the best of a grid.

    The grid holds bfloat16-rounded scales in geometric steps, 48 an octave, between amax/(2 qmax)
    (below 4 bits amax/(4 qmax)) and amax/(qmax/2), and their negatives. (Devices sum in different
    orders and may choose differently among scales whose errors agree to float32 rounding.) Raises
    UnsupportedScheme when K is not a multiple of the group.
    """
    rows, columns = x.shape
    group = scheme.group_size
    _check_columns(columns, scheme)
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    grouped = x.contiguous().view(-1, group)
    weights = torch.ones(columns)
    if importance is not None:
        weights = channel_weights(importance, group).float()
    weights = weights.view(-1, group)
    first = -1 if scheme.bits >= 4 else -2
    ratios = torch.logspace(first, 1, (1 - first) * _PER_OCTAVE + 1, base=2.0) / high
    if x.is_cpu and native.available():
        from v4quant_kernels.native.grid import best_scales

        found = best_scales(grouped.numpy(), weights.numpy(), ratios.numpy(), scheme.bits)
        scale = torch.from_numpy(found)
    else:
        scale = _grid_scales(grouped, weights.to(x.device).repeat(rows, 1), ratios, low, high)
    integers = torch.round(grouped / scale.unsqueeze(1)).clamp_(low, high)
    difference = (integers * scale.unsqueeze(1) - grouped).double()
    packed = pack_bits(integers.to(torch.int8).view(rows, columns), scheme.bits)
    tensor = QTensor(scheme, (rows, columns), packed, scale.bfloat16().view(rows, -1))
    return QuantizedMatrix(
        tensor,
        float(difference.square().sum()),
        float(x.double().square().sum()),
        float(difference.abs().max()),
    )


def _grid_scales(grouped: Tensor, weights: Tensor, ratios: Tensor, low: int, high: int) -> Tensor:
    """The meaning of `native.grid.best_scales`."""
    amax = grouped.abs().amax(1).clamp_min(2.0**-100)
    best = torch.full_like(amax, float("inf"))
    scale = amax.clone()
    for ratio in (*ratios.tolist(), *(-ratios).tolist()):
        candidate = (amax * ratio).bfloat16().float()
        rounded = torch.round(grouped / candidate.unsqueeze(1)).clamp_(low, high)
        error = rounded.mul_(candidate.unsqueeze(1)).sub_(grouped).square_().mul_(weights).sum(1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
    return scale
