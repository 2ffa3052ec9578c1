"""Coded weights decoded inside a graph, by operators every runtime has.

**E2M1 and E8M0 by lookup.** A byte holds two E2M1 codes, so a table of 256 pairs turns bytes into
values in one Gather; another table of 256 turns scale bytes into powers of two. Both are exact, and
the weights stay 4.25 bits each in file and memory: the tables are looked up with bytes that only
exist at run time, so no runtime can unfold them beforehand.

**FP8 tiles.** DequantizeLinear knows blocks along one axis, so a 128x128 tile's scale is repeated
for its 128 rows, which is exact and cheap (a scale for 128 weights).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from v4quant_formats.onnx.graph import Graph
from v4quant_kernels.ref import e2m1, e8m0

GROUP = 32
TILE = 128


def pair_table() -> Tensor:
    """float32 [256, 2]: the values of a byte's low and high nibble."""
    every = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    return e2m1.decode_packed(every)


def power_table() -> Tensor:
    """float32 [256]: 2^(byte - 127). Byte 255 means NaN and is never written."""
    return e8m0.decode(torch.arange(256, dtype=torch.uint8))


def mx_values(graph: Graph, codes: str, scales: str, shape: tuple[str | int, ...]) -> str:
    """float32 values of E2M1 `codes` uint8 [..., K/2] with E8M0 `scales` uint8 [..., K/32].

    shape: extents of the result, at most one of them -1; the last is K.
    """
    *rows, columns = shape
    assert isinstance(columns, int) and columns % GROUP == 0, shape
    pairs = graph.constant(pair_table().numpy(), np.float32)
    powers = graph.constant(power_table().numpy(), np.float32)
    values = graph.node("Gather", pairs, graph.node("Cast", codes, to=6))
    scale = graph.node("Gather", powers, graph.node("Cast", scales, to=6))
    groups = columns // GROUP
    values = graph.node("Reshape", values, graph.constant([*rows, groups, GROUP]))
    scale = graph.node("Reshape", scale, graph.constant([*rows, groups, 1]))
    return graph.node("Reshape", graph.node("Mul", values, scale), graph.constant([*rows, columns]))


def tile_values(graph: Graph, codes: str, scales: str) -> str:
    """float32 values of E4M3 `codes` [N, K] with float32 `scales` [N, K/128]."""
    return graph.node("DequantizeLinear", codes, scales, axis=1, block_size=TILE)


def tile_scales(scale: Tensor, rows: int) -> Tensor:
    """Float32 [rows, K/128] of float32 tile scales [ceil(rows/128), K/128]."""
    return scale.repeat_interleave(TILE, 0)[:rows].contiguous()
