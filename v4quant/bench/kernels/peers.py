"""What comparing with other people's expert kernels needs, whichever they are.

A peer makes a call of each input set from the stacked codes. Every result is compared with torch's
(weights dequantized to BF16, one grouped product each), and the distance is in the row: a fast
wrong answer is not a yardstick.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from v4quant.bench.choices import MoeShape
from v4quant.bench.kernels.cases import LIMIT, Inputs, random_inputs
from v4quant.bench.kernels.cells import Cells, told
from v4quant.bench.kernels.device import time_foreign
from v4quant_kernels.codec import dequantize
from v4quant_kernels.experts import ExpertWeights, StackedMatrix
from v4quant_kernels.ref import e8m0

Call = Callable[[], Tensor]
_SETS = 3


@dataclass(frozen=True)
class PeerRow:
    """One measurement of another kernel. Seconds; deviation: from torch's result, of its norm.

    graph: false where the call cannot be captured, so that launches are in its time.
    """

    shape: str
    scheme: str
    tokens: int
    peer: str
    version: str
    seconds: float
    spread: float
    graph: bool
    deviation: float


class PeerWeights:
    """A layer's experts, and the forms of them that several peers multiply, made when asked for."""

    def __init__(self, stacked: ExpertWeights) -> None:
        """stacked: as a checkpoint holds them."""
        self.stacked = stacked
        self._dense: tuple[Tensor, Tensor] | None = None

    @property
    def dense(self) -> tuple[Tensor, Tensor]:
        """bfloat16 gate over up `[E, 2 I, H]`, and down `[E, H, I]`."""
        if self._dense is None:
            w1, w3, w2 = self.stacked.w1, self.stacked.w3, self.stacked.w2
            self._dense = _dequantized(w1, w3), _dequantized(w2)
        return self._dense

    def forget(self) -> None:
        """Free what was made."""
        self._dense = None


class Calls(NamedTuple):
    """What is timed, an entry an input set, and what gives the mixture of the first."""

    timed: list[Callable[[], object]]
    result: Call


def calls_of(each: Sequence[Call]) -> Calls:
    return Calls(list(each), each[0])


@dataclass(frozen=True)
class MoePeer:
    """Another kernel: its package ("" for torch), the schemes it multiplies as they are stored
    (none: it multiplies BF16), what makes a call of each input set, and the limit it clamps to."""

    name: str
    package: str
    schemes: tuple[str, ...]
    calls: Callable[[PeerWeights, Sequence[Inputs]], Calls]
    limit: float = LIMIT


def measure_peer(
    peer: MoePeer,
    shape: MoeShape,
    scheme: str,
    weights: PeerWeights,
    tokens: Sequence[int],
    cells: Cells,
) -> list[PeerRow | None]:
    """A row for each number of tokens; one that says why, if the package cannot be imported."""
    shown = scheme if peer.schemes else "bf16"
    try:
        version = package_version(peer.package)
    except Exception as error:  # noqa: BLE001  # importing foreign code may fail in any way
        cells.skip(f"{shape.name} {shown}: {peer.name}", told(error))
        return []

    def measure(count: int) -> PeerRow:
        device = cells.machine.device
        sets = [random_inputs(shape, count, s, device) for s in range(_SETS)]
        calls = peer.calls(weights, sets)
        expected = grouped(sets[0], *weights.dense, peer.limit).float()
        deviation = float((calls.result().float() - expected).norm() / expected.norm())
        timing = time_foreign(calls.timed, device)
        return PeerRow(
            shape.name, shown, count, peer.name, version, timing.seconds, timing.spread,
            timing.graph, deviation,
        )  # fmt: skip

    return [
        cells.run(f"{shape.name} {shown} {count}: {peer.name}", "peer", partial(measure, count))
        for count in tokens
    ]


def package_version(package: str) -> str:
    """The version of a package that can be imported. Raises what importing it raises."""
    if not package:
        return torch.__version__
    module = importlib.import_module(package)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))


def _dequantized(*parts: StackedMatrix) -> Tensor:
    """bfloat16 `[E, N of all parts, K]`."""
    count, device = parts[0].codes.shape[0], parts[0].codes.device
    rows = sum(p.shape[0] for p in parts)
    out = torch.empty(count, rows, parts[0].shape[1], dtype=torch.bfloat16, device=device)
    for expert in range(count):
        at = 0
        for part in parts:
            out[expert, at : at + part.shape[0]] = dequantize(part[expert])
            at += part.shape[0]
    return out


def sorted_slots(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(slots in the order of their experts, int32 count of each expert's), without the host."""
    flat = ids.flatten()
    counts = torch.zeros(experts, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return flat.argsort(stable=True), counts


def swiglu(both: Tensor, routing: Tensor, limit: float = LIMIT) -> Tensor:
    """bfloat16 hidden rows of gate beside up `[slots, 2 I]`, times their routing weight."""
    gate, up = both.float().chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (h * routing.unsqueeze(1)).bfloat16()


def summed(y: Tensor, order: Tensor, tokens: int, top_k: int) -> Tensor:
    """bfloat16 `[tokens, H]`: rows of sorted slots added to their tokens."""
    out = torch.zeros(tokens, y.shape[1], dtype=torch.float32, device=y.device)
    return out.index_add_(0, order // top_k, y.float()).bfloat16()


def grouped(inputs: Inputs, gate_up: Tensor, down: Tensor, limit: float = LIMIT) -> Tensor:
    """The mixture by torch's grouped products."""
    x, ids, routing = inputs
    order, counts = sorted_slots(ids, gate_up.shape[0])
    ends, top_k = counts.cumsum(0).int(), ids.shape[1]
    both = torch._grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends)
    h = swiglu(both, routing.flatten()[order], limit)
    y = torch._grouped_mm(h, down.transpose(1, 2), offs=ends)
    return summed(y, order, x.shape[0], top_k)


def fp8_tiles(weights: PeerWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gate over up, its scales, down, its scales) of tiled FP8: E4M3, and float32 per tile."""
    w1, w3, w2 = weights.stacked.w1, weights.stacked.w3, weights.stacked.w2
    codes = torch.cat((w1.codes, w3.codes), dim=1).view(torch.float8_e4m3fn)
    scale = torch.cat((w1.scale, w3.scale), dim=1)
    down = w2.codes.view(torch.float8_e4m3fn)
    return codes, e8m0.decode(scale), down, e8m0.decode(w2.scale)
