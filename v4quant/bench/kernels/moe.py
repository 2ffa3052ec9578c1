"""`bench moe`: the routed experts of one layer against the machine's floor and other kernels.

For each number of tokens: the time of the whole mixture (sorting, both GEMMs, combination), how
many experts were active, the bytes that had to be read at least (active weights, activations) and
what share of the floor was reached. The floor is the larger of two times: those bytes at the speed
of the copy, and the products at the matrix rate of the operand type, both measured in the same run.

Routing is uniform, which activates more experts than real text does: the worst case for decode.
Before a cell is timed, its result for a few tokens is held against the torch twin's: a kernel that
computes something else has no time. Other people's kernels (`moe_peers.py`) come last, on the same
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from v4quant.bench.choices import SHAPES, Compare, MoeShape
from v4quant.bench.kernels.cases import LIMIT, Inputs, random_inputs, random_weights
from v4quant.bench.kernels.cells import Cells, Missing, Once
from v4quant.bench.kernels.device import Machine, choose_device, measure_machine, time_calls
from v4quant.bench.kernels.moe_peers import PEERS
from v4quant.bench.kernels.peers import PeerRow, PeerWeights, measure_peer
from v4quant_kernels import dispatch
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.experts import Activations, ExpertWeights
from v4quant_kernels.progress import Progress
from v4quant_kernels.runtime import RuntimeExperts
from v4quant_kernels.scheme import get_scheme

_SETS = 8
_CHECKED = 4  # tokens whose result is held against the twin's
_STRAY = 2.0**-5  # of the result's norm: h may round to other neighbours


@dataclass(frozen=True)
class MoeRow:
    """One measurement. Times in seconds; deviation: from the torch twin's result, of its norm."""

    shape: str
    scheme: str
    activations: str
    layout: str
    tokens: int
    active_experts: float
    seconds: float
    spread: float
    bytes: float
    bytes_per_second: float
    flop: float
    flops: float
    floor_seconds: float
    floor_share: float
    deviation: float


@dataclass(frozen=True)
class MoeBench:
    """All rows of one run, and the machine they were measured on."""

    machine: Machine
    rows: tuple[MoeRow, ...]
    peers: tuple[PeerRow, ...]
    missing: tuple[Missing, ...]


def bench_moe(
    shapes: Sequence[str],
    schemes: Sequence[str],
    activations: Sequence[Activations],
    tokens: Sequence[int],
    progress: Progress,
    device: str | None = None,
    compare: Compare = "also",
    append: Path | None = None,
    minutes: float | None = None,
) -> MoeBench:
    """Measure every combination; what cannot be measured is named in `missing`.

    append: file for a line of JSON a row. minutes: when these are over, the rest is not measured.
    Raises V4QuantError without a GPU unless `device` is "cpu".
    """
    for scheme in schemes:
        random_weights(SHAPES["tiny"], get_scheme(scheme), "cpu")  # refuses what has no codes
    where = choose_device(device)
    cells = Cells("moe", measure_machine(where), progress, append, minutes)
    rows: list[MoeRow] = []
    if compare != "only":
        cases = len(shapes) * len(schemes) * len(activations) * len(tokens)
        progress.start("Experts", cases, "case")
        for shape in (SHAPES[s] for s in shapes):
            for scheme in schemes:
                for mode in activations:
                    rows += _own(shape, scheme, mode, tokens, cells)
        progress.finish()
    peers: list[PeerRow] = []
    if compare != "none" and where == "cuda":
        progress.start("Others", len(shapes) * len(schemes) * len(PEERS) * len(tokens), "case")
        for shape in (SHAPES[s] for s in shapes):
            peers += _others(shape, schemes, tokens, cells)
        progress.finish()
    return MoeBench(cells.machine, tuple(rows), tuple(peers), tuple(cells.missing))


def _own(
    shape: MoeShape, scheme: str, mode: Activations, tokens: Sequence[int], cells: Cells
) -> list[MoeRow]:
    """The rows of one scheme and kind of activations."""

    def make() -> tuple[ExpertWeights, RuntimeExperts]:
        weights = random_weights(shape, get_scheme(scheme), cells.machine.device)
        return weights, dispatch.prepare(weights, mode)

    made = Once(make)

    def measure(count: int) -> MoeRow:
        return _measure(shape, *made(), mode, count, cells.machine)

    found = []
    for count in tokens:
        name = f"{shape.name} {scheme} {mode} {count}"
        found.append(cells.run(name, "row", partial(measure, count)))
    return [row for row in found if row is not None]


def _others(
    shape: MoeShape, schemes: Sequence[str], tokens: Sequence[int], cells: Cells
) -> list[PeerRow]:
    """Rows of other people's kernels; those that multiply BF16 once, not once a scheme."""
    found: list[PeerRow | None] = []
    for scheme in schemes:
        weights = PeerWeights(random_weights(shape, get_scheme(scheme), cells.machine.device))
        for peer in PEERS:
            if scheme not in (peer.schemes or schemes[:1]):
                continue
            found += measure_peer(peer, shape, scheme, weights, tokens, cells)
        weights.forget()
    return [row for row in found if row is not None]


def _measure(
    shape: MoeShape,
    weights: ExpertWeights,
    prepared: RuntimeExperts,
    mode: Activations,
    tokens: int,
    machine: Machine,
) -> MoeRow:
    sets = [
        random_inputs(shape, tokens, s, machine.device)
        for s in range(_SETS if tokens < 1024 else 2)
    ]
    experts = prepared if machine.device == "cuda" else weights
    deviation = _check(partial(call_moe, experts=experts, mode=mode), sets[0], weights, mode)
    timing = time_calls([partial(call_moe, s, experts, mode) for s in sets], machine.device)
    active = sum(float(torch.unique(ids).numel()) for _, ids, _ in sets) / len(sets)
    slots = tokens * shape.top_k
    per_expert = (prepared.gate_up.nbytes + prepared.down.nbytes) / shape.experts
    moved = active * per_expert + 2 * 2 * tokens * shape.hidden
    flop = 2.0 * slots * 3 * shape.hidden * shape.width
    eight_bits = prepared.gate_up.operand != "bf16" and machine.fp8_flops
    rate = machine.fp8_flops if eight_bits else machine.bf16_flops
    floor = max(moved / machine.copy_bytes_per_second, flop / rate)
    return MoeRow(
        shape.name, prepared.gate_up.scheme.name, mode, prepared.gate_up.tag, tokens, active,
        timing.seconds, timing.spread, moved, moved / timing.seconds, flop, flop / timing.seconds,
        floor, floor / timing.seconds, deviation,
    )  # fmt: skip


def _check(
    call: Callable[[Inputs], Tensor], inputs: Inputs, weights: ExpertWeights, mode: Activations
) -> float:
    """How far the first tokens' results are from the twin's. Raises V4QuantError if too far."""
    x, ids, routing = (t[:_CHECKED] for t in inputs)
    expected = dispatch.moe(x, ids, routing, weights, LIMIT, activations=mode, backend="torch")
    found = call(inputs)[:_CHECKED].float()
    deviation = float((found - expected.float()).norm() / expected.float().norm())
    if not deviation <= _STRAY:
        raise V4QuantError(f"the result is {deviation:.3g} of its norm away from the twin's")
    return deviation


def call_moe(inputs: Inputs, experts: ExpertWeights | RuntimeExperts, mode: Activations) -> Tensor:
    """The whole mixture, as an engine calls it."""
    x, ids, routing = inputs
    return dispatch.moe(x, ids, routing, experts, LIMIT, activations=mode)
