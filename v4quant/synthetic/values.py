"""What synthetic tensors are filled with: random, cheap, and of the released magnitudes.

Real experts have a standard deviation near 1e-2 and group scales that stay within a few octaves,
and so have these: codes are drawn from the code frequencies of a quantized normal distribution, by
one table look-up a byte, and scales scatter over four octaves. Every tensor has a generator of its
own, seeded by its name, so that its bytes do not depend on what else is written.

`Faults` plants what a converter must survive or refuse into named expert matrices.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from v4quant_formats.spec import TensorSpec, torch_dtype

DEFAULT_MODULE = "layers.0.ffn.experts.0.w1"
_PIECE = 4 * 2**20  # elements made at a time
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ONES = ("norm.weight", "norm1.weight", "norm2.weight", ".q_weight", ".k_weight")
# Group scales of FP4 experts and tile scales of FP8 matrices: (byte, weight of 256).
_FP4_SCALES = ((118, 50), (119, 150), (120, 48), (121, 8))
_FP8_SCALES = ((113, 60), (114, 150), (115, 46))


@dataclass(frozen=True)
class Faults:
    """Deliberate oddities of FP4 expert matrices `modules`; rows of their first group are used.

    spread: octaves between the scales of rows 0 and 1, both with nonzero codes.
    zero_groups: rows 2 and 3 hold only +0 under byte 0 and only -0 under byte 254.
    edge_bytes: rows 4 to 7 have scale bytes 0, 1, 253 and 254, with values that stay finite.
    nan_scale: row 8 has scale byte 255.
    """

    modules: tuple[str, ...] = ()
    spread: int | None = None
    zero_groups: bool = False
    edge_bytes: bool = False
    nan_scale: bool = False

    def rows(self) -> list[tuple[int, int, int]]:
        """(row, scale byte, packed code byte of the group) of everything planted."""
        rows: list[tuple[int, int, int]] = []
        if self.spread is not None:
            rows += [(0, 121, 0x77), (1, 121 - self.spread, 0x11)]
        if self.zero_groups:
            rows += [(2, 0, 0x00), (3, 254, 0x88)]
        if self.edge_bytes:
            rows += [(4, 0, 0x12), (5, 1, 0x12), (6, 253, 0x12), (7, 254, 0x12)]
        if self.nan_scale:
            rows.append((8, 255, 0x12))
        return rows


def pieces(spec: TensorSpec, seed: int, experts: int, faults: Faults) -> Iterator[Tensor]:
    """The flat data of a tensor, in order, in pieces of bounded size. Same seed, same bytes.

    experts: what the ids of a routing table run up to.
    """
    digest = hashlib.sha256(f"{seed}|{spec.name}".encode()).digest()
    rng = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:8], "little")))
    if spec.dtype == "I64":
        yield from _table(spec, rng, experts)
        return
    module, _, part = spec.name.rpartition(".")
    planted = faults.rows() if module in faults.modules else []
    first = 0
    while first < spec.numel:
        count = spec.numel - first if planted else min(_PIECE, spec.numel - first)
        piece = _random(spec, rng, count)
        if planted:
            _plant(piece.view(torch.uint8).view(spec.shape), part, planted)
        yield piece
        first += count


def _plant(whole: Tensor, part: str, planted: list[tuple[int, int, int]]) -> None:
    for row, scale, codes in planted:
        if part == "scale":
            whole[row, 0] = scale
        else:
            whole[row, :16] = codes


def _random(spec: TensorSpec, rng: np.random.Generator, count: int) -> Tensor:
    if spec.dtype in ("I8", "F8_E4M3"):
        drawn = rng.integers(0, 65536, count, dtype=np.uint16)
        table = _fp4_pairs() if spec.dtype == "I8" else _fp8_codes()
        return torch.from_numpy(table[drawn]).view(torch_dtype(spec.dtype))
    if spec.dtype == "F8_E8M0" or (spec.dtype == "F32" and spec.name.endswith(".scale")):
        is_expert = ".ffn.experts." in spec.name and spec.dtype == "F8_E8M0"
        table = _by_weight(_FP4_SCALES if is_expert else _FP8_SCALES)
        data = torch.from_numpy(table[rng.integers(0, 256, count, dtype=np.uint8)])
        if spec.dtype == "F8_E8M0":
            return data.view(torch.float8_e8m0fnu)
        return torch.ldexp(torch.ones(count), data.int() - 127)
    normal = torch.from_numpy(rng.standard_normal(count, dtype=np.float32))
    mean, deviation = _mean_and_deviation(spec.name)
    return normal.mul_(deviation).add_(mean).to(torch_dtype(spec.dtype))


def _mean_and_deviation(name: str) -> tuple[float, float]:
    if name.endswith(_ONES):
        return 1.0, 0.05
    if name.endswith("_scale"):
        return 1.0, 0.0
    if name.endswith(("_base", ".attn_sink")):
        return 0.0, 0.2
    return 0.0, 0.02


def _table(spec: TensorSpec, rng: np.random.Generator, experts: int) -> Iterator[Tensor]:
    """Rows of distinct expert ids in random order."""
    rows, chosen = spec.shape
    step = max(1, _PIECE // experts)
    for first in range(0, rows, step):
        keys = torch.from_numpy(rng.random((min(step, rows - first), experts), dtype=np.float32))
        yield keys.argsort(dim=1)[:, :chosen].reshape(-1)


@cache
def _quantiles(count: int, deviation: float) -> Tensor:
    """float64 quantiles of a normal distribution at the middles of `count` equal parts."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    quantiles: Tensor = torch.special.ndtri(middles) * deviation
    return quantiles


@cache
def _fp4_pairs() -> npt.NDArray[np.uint8]:
    """Packed code pairs for 16 random bits: a normal distribution of deviation 2.1, as in groups
    whose largest value is 4 or 6."""
    grid = torch.tensor(_E2M1, dtype=torch.float64)
    x = _quantiles(256, 2.1)
    codes = (x.abs()[:, None] - grid).abs().argmin(1) | ((x < 0).long() << 3)
    pairs = (codes[:, None] << 4) | codes
    return pairs.reshape(-1).to(torch.uint8).numpy()


@cache
def _fp8_codes() -> npt.NDArray[np.uint8]:
    """E4M3 codes for 16 random bits: a normal distribution of deviation 100, cut at 448."""
    codes = _quantiles(65536, 100.0).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).numpy()


@cache
def _by_weight(weights: tuple[tuple[int, int], ...]) -> npt.NDArray[np.uint8]:
    repeated = itertools.chain.from_iterable([byte] * count for byte, count in weights)
    table = np.fromiter(repeated, dtype=np.uint8)
    assert table.size == 256, weights
    return table
