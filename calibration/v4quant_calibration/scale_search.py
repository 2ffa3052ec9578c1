"""The mean-square-optimal scale of every integer group, exactly, in about one pass over the bytes.

Rounding to amax / 7 wastes accuracy: a slightly smaller scale that clips the largest element, or
one whose grid meets the source's own points, has a lower error. For MXFP4 sources the search is
exact over *all* bfloat16 scales of a window (the argument is in v4quant_kernels.ref.lattice): each
group is reduced to a histogram of its 16 codes, and two small matrix products give the error of
every rounding assignment at its own best scale. Nothing is decoded and no BF16 copy is made.
With calibration statistics the histogram is weighted by the second moment of each input channel,
which turns weight error into expected output error (the diagonal of the layer-wise objective of
Optimal Brain Quantization, Frantar & Alistarh 2022, arXiv 2208.11580).

Sources that are not MXFP4 (FP8 experts of the Base releases) are searched over a grid of scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1, e8m0
from v4quant_kernels.ref.cast import GROUP
from v4quant_kernels.ref.lattice import DEPTHS, IntegerLattice, integer_lattice
from v4quant_kernels.ref.pack import pack_bits
from v4quant_kernels.scheme import Scheme

# Blocks of 32 handled at a time: the temporaries (about 200 floats a block) stay near the cache.
_BLOCKS = 1 << 15
# Added to B, far below its rounding, so that A / B of a group of zeros is 0.
_NEVER_ZERO = 1e-30
# Blocks whose error is looked at before the rest is ruled out by it.
_FEW_BLOCKS = 64
# Scales tried per group for sources that are not MXFP4, between amax/(2 qmax) and amax/(0.5 qmax).
# Odd, so that the middle one is the usual amax/qmax and the search never does worse.
_GRID = 97


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


def search_mxfp4(q: QTensor, scheme: Scheme, importance: Tensor | None = None) -> QuantizedMatrix:
    """Quantize an MXFP4 matrix [N, K] to `int4-gG` with the optimal bfloat16 scale of each group.

    importance: float [K], the weight of each input channel's squared error (second moment of the
        input); None weighs all alike. Raises UnsupportedScheme when K is no multiple of G.
    """
    assert q.scheme.name == "mxfp4" and q.scale is not None
    assert scheme.element == "int" and scheme.bits == 4
    rows, columns = q.shape
    if columns % scheme.group_size:
        raise UnsupportedScheme(
            f"{columns} columns are no multiple of group_size {scheme.group_size}"
        )
    lattice = integer_lattice(scheme.bits, scheme.group_size // GROUP)
    byte_table = lattice.byte_table()
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8)
    scale = torch.empty((rows, columns // scheme.group_size), dtype=torch.bfloat16)
    weights = None if importance is None else _channel_weights(importance, scheme.group_size)
    exponents = e8m0.exponents(q.scale)
    error = norm = largest = 0.0
    step = max(1, _BLOCKS // (columns // GROUP))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        search = _Search(lattice, scheme, q.codes[part], exponents[part])
        chosen = search.stored(search.best_scale(weights))
        codes[part] = search.encode(chosen, byte_table)
        scale[part] = search.bf16_scale(chosen)
        sums = search.errors(chosen, largest)
        error, norm, largest = error + sums[0], norm + sums[1], max(largest, sums[2])
    return QuantizedMatrix(QTensor(scheme, q.shape, codes, scale), error, norm, largest)


class _Search:
    """One chunk of rows: histograms, the best t of every group, and the codes it gives."""

    def __init__(
        self, lattice: IntegerLattice, scheme: Scheme, codes: Tensor, exponents: Tensor
    ) -> None:
        self.lattice = lattice
        self.codes = codes  # uint8 [n, K/2]
        self.rows = codes.shape[0]
        self.blocks = scheme.group_size // GROUP
        self.index = codes.int()  # lookups want int32
        self.histogram = _histogram(self.index)  # float32 [blocks, 16]
        # Blocks of zeros are exact under any scale and must not push the others out.
        empty = self.histogram[:, 0] + self.histogram[:, 8] == GROUP
        exponents = exponents.reshape(-1).masked_fill(empty, e8m0.MIN_EXPONENT)
        exponents = self._double_small_blocks(exponents, empty)
        grouped = exponents.view(-1, self.blocks)
        self.top = grouped.amax(1)  # int32 per group, exponent of S
        self.depth = (self.top.unsqueeze(1) - grouped).view(-1)  # int32 per block
        self.clipped = self.depth.clamp(max=DEPTHS - 1)
        self.sums = self._sums(self.histogram)

    def _double_small_blocks(self, exponents: Tensor, empty: Tensor) -> Tensor:
        """The same values with a code of 2 or more in every block; returns the new exponents.

        The window counts from the largest block scale, so a block that uses only codes up to 1.5
        would put it too high. Quantizers leave no such block, but a file may: its codes are doubled
        and its exponent lowered, at most twice.
        """
        for _ in range(2):
            small = (self.histogram @ _TWO_OR_MORE == 0) & ~empty
            if not bool(small.any()):
                break
            blocks = self.codes.clone().view(-1, GROUP // 2)
            blocks[small] = _DOUBLED[blocks[small].int()]
            self.codes = blocks.view(self.codes.shape)
            self.index = self.codes.int()
            self.histogram = _histogram(self.index)
            exponents = exponents - small.int()
        return exponents

    def best_scale(self, weights: Tensor | None) -> Tensor:
        """The optimal t of every group, float32 [groups], exactly representable in bfloat16."""
        a, b = self.sums
        if weights is not None:
            a, b = self._sums(_weighted_histogram(self.codes, weights))
        low, high = self.lattice.lowest_scale, self.lattice.highest_scale
        t = torch.div(a, b).clamp_(low, high).bfloat16().float()
        gain = torch.mul(t, b).sub_(a, alpha=2).mul_(t)  # err - E, <= 0 at any optimum
        # A minimum with index is slow across rows; comparing with the minimum finds t as well.
        best = gain.amin(0)
        return t.mul_(gain == best).amax(0)

    def _sums(self, histogram: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of every assignment and group: float32 [n, groups] each."""
        if self.blocks == 1:
            features, depths = histogram, 1
        else:
            depths = DEPTHS
            # The deepest row also takes blocks below it: all their codes round to 0 alike.
            features = torch.zeros(len(self.top) * DEPTHS, 16, dtype=histogram.dtype)
            group = torch.arange(len(self.top), dtype=torch.int32).repeat_interleave(self.blocks)
            features.index_add_(0, group * DEPTHS + self.clipped, histogram)
            features = features.view(-1, DEPTHS * 16)
        a = self.lattice.va[: depths * 16].T @ features.T
        b = self.lattice.qq[: depths * 16].T @ features.T
        return a, b.add_(_NEVER_ZERO)

    def _assignment(self, t: Tensor) -> Tensor:
        """Index of the assignment that holds at each t, int32: a lookup by t's bfloat16 bits."""
        table, first = self.lattice.assignment_table()
        bits = t.view(torch.int32).bitwise_right_shift(16).sub_(first)
        return torch.index_select(table, 0, bits.clamp_(0, len(table) - 1))

    def encode(self, t: Tensor, byte_table: Tensor) -> Tensor:
        """Packed 4-bit codes [n, K/2]: nearest integers at scale t, one lookup per source byte."""
        assignments = len(self.lattice.breakpoints) + 1
        row = self._assignment(t)
        if self.blocks > 1:
            row = row.repeat_interleave(self.blocks) + self.clipped * assignments
        index = self.index.view(-1, GROUP // 2).add_(row.mul_(256).unsqueeze(1))
        return torch.index_select(byte_table, 0, index.view(-1)).view(self.codes.shape)

    def bf16_scale(self, t: Tensor) -> Tensor:
        """t * 2^top as bfloat16 [n, K/G]; exact but for bfloat16 subnormals (below 2^-126)."""
        unit = e8m0.power_of_two_f64(self.top)
        return (t.double() * unit).bfloat16().view(self.rows, -1)

    def stored(self, t: Tensor) -> Tensor:
        """The t that `bf16_scale` really stores: the same, but for bfloat16 subnormals."""
        unit = e8m0.power_of_two_f64(self.top)
        return (self.bf16_scale(t).view(-1).double() / unit).float()

    def errors(self, t: Tensor, largest: float) -> tuple[float, float, float]:
        """Unweighted sums of squared error and squared value, and the largest error (or `largest`).

        The sums are the parabola E - 2tA + t^2 B of the assignment that holds at t, in float64.
        """
        row = self._assignment(t).long().unsqueeze(0)
        a, b = (x.gather(0, row).squeeze(0).double() for x in self.sums)
        unit = e8m0.power_of_two_f64(self.top)
        depth = e8m0.power_of_two_f64(-2 * self.depth)
        energy = (self.histogram @ self.lattice.energy).double() * depth
        energy = energy.view(-1, self.blocks).sum(1)
        wide = t.double()
        error = (energy + wide * (wide * b - 2 * a)).clamp_min_(0) * unit.square()
        norm = energy * unit.square()
        return float(error.sum()), float(norm.sum()), self._largest_error(t, unit, largest)

    def _largest_error(self, t: Tensor, unit: Tensor, largest: float) -> float:
        """Exact largest |v - t q| of the chunk, looking only at blocks that could exceed `largest`.

        A block's error is at most t/2, or what clipping its largest magnitude to qmax * t leaves.
        """
        high = 2 ** (self.lattice.bits - 1) - 1
        sixes = self.histogram[:, 7] + self.histogram[:, 15]
        magnitude = torch.where(sixes > 0, 6.0, 4.0)
        magnitude *= e8m0.power_of_two_f64(-self.depth).float()
        per_block = t.repeat_interleave(self.blocks)
        units = unit.repeat_interleave(self.blocks)
        bound = torch.maximum(per_block / 2, magnitude - high * per_block).double() * units
        rest = (bound > largest).nonzero().squeeze(1)
        if len(rest) > _FEW_BLOCKS:
            first = bound.topk(_FEW_BLOCKS).indices
            largest = max(largest, self._exact_largest(first, per_block, units))
            rest = rest[bound[rest] > largest]
        return max(largest, self._exact_largest(rest, per_block, units))

    def _exact_largest(self, blocks: Tensor, t: Tensor, units: Tensor) -> float:
        """Largest error over the codes present in the given blocks."""
        if not len(blocks):
            return 0.0
        t, depth = t[blocks], self.depth[blocks]
        assignment = self._assignment(t).long()
        value = e2m1.VALUES.double() * e8m0.power_of_two_f64(-depth).unsqueeze(1)
        rounded = self.lattice.quantized[self.clipped[blocks].long(), assignment].double()
        error = (value - rounded * t.double().unsqueeze(1)).abs_()
        present = error.masked_fill_(self.histogram[blocks] == 0, 0).amax(1)
        return float((present * units[blocks]).max())


def _make_doubled() -> Tensor:
    """uint8 [256]: both codes of a byte doubled, for magnitudes up to 1.5 (0 elsewhere)."""
    code = torch.arange(16)
    double = torch.tensor([0, 2, 4, 5, 0, 0, 0, 0])[code & 7] | (code & 8)
    byte = torch.arange(256)
    return (double[byte & 15] | (double[byte >> 4] << 4)).to(torch.uint8)


_DOUBLED = _make_doubled()
_TWO_OR_MORE = (e2m1.VALUES.abs() >= 2).float()


def _histogram(index: Tensor) -> Tensor:
    """Count the 16 codes in every block: float32 [blocks, 16] from int32 bytes [n, K/2].

    Each byte looks up 8 one-byte counters packed in a 64-bit word, once for codes 0-7 and once for
    8-15; adding words adds all counters at once (a block has 32 elements, so none overflows).
    """
    halves = [
        torch.index_select(counters, 0, index.view(-1)).view(-1, GROUP // 2).sum(1)
        for counters in _COUNTERS
    ]
    return torch.stack(halves, 1).view(torch.uint8).float()


def _make_counters() -> tuple[Tensor, Tensor]:
    byte = torch.arange(256)
    counters = torch.zeros(256, 16, dtype=torch.uint8)
    counters[byte, byte & 15] += 1
    counters[byte, byte >> 4] += 1
    words = counters.view(torch.int64)
    return words[:, 0].contiguous(), words[:, 1].contiguous()


_COUNTERS = _make_counters()


def _weighted_histogram(codes: Tensor, weights: Tensor) -> Tensor:
    """Sum channel weights per code: [blocks, 16]; weights float32 [K] in column order."""
    identity = torch.eye(16, dtype=weights.dtype)
    total: Tensor | None = None
    for nibble, parity in ((codes & 15, 0), (codes >> 4, 1)):
        index = nibble.int().view(-1, GROUP // 2)
        per_sample = weights[parity::2].repeat(codes.shape[0]).view(-1, GROUP // 2)
        part = torch.nn.functional.embedding_bag(
            index, identity, mode="sum", per_sample_weights=per_sample
        )
        total = part if total is None else total + part
    assert total is not None
    return total


def _channel_weights(importance: Tensor, group_size: int) -> Tensor:
    """Weights normalised to mean 1 inside each group; a group nobody feeds falls back to ones.

    Only ratios inside a group matter to its scale. A small floor keeps every channel in the game:
    a channel that calibration saw as zero may still carry input later.
    """
    grouped = importance.double().clamp_min(0).view(-1, group_size)
    mean = grouped.mean(1, keepdim=True)
    relative = torch.where(mean > 0, grouped / mean.clamp_min(1e-300), 1.0)
    return relative.clamp_min(1e-4).view(-1).float()


def search_dense(x: Tensor, scheme: Scheme, importance: Tensor | None = None) -> QuantizedMatrix:
    """Quantize float32 values [N, K] to integer groups, each scale the best of a grid.

    The grid holds 97 bfloat16-rounded scales in geometric steps between amax/(2 qmax) and
    amax/(qmax/2). Raises UnsupportedScheme when K is no multiple of the group.
    """
    rows, columns = x.shape
    group = scheme.group_size
    if columns % group:
        raise UnsupportedScheme(f"{columns} columns are no multiple of group_size {group}")
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    grouped = x.view(-1, group)
    weights = torch.ones(columns) if importance is None else _channel_weights(importance, group)
    weights = weights.view(-1, group).repeat(rows, 1)
    amax = grouped.abs().amax(1).clamp_min(2.0**-100)
    best = torch.full_like(amax, float("inf"))
    scale = amax.clone()
    for ratio in torch.logspace(-1, 1, _GRID, base=2.0):
        candidate = (amax * (ratio / high)).bfloat16().float()
        rounded = torch.round(grouped / candidate.unsqueeze(1)).clamp_(low, high)
        error = rounded.mul_(candidate.unsqueeze(1)).sub_(grouped).square_().mul_(weights).sum(1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
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
