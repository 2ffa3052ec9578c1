"""`bench indexer`: scoring and selecting keys, against the machine's floor and other kernels.

Three situations at each context: one request decoding one token, 128 requests decoding one each,
and the last 4096 tokens of a prefill. Timed are the scores alone and the exact top-k of a piece of
them, and all of it as the model calls it (`index_top_k`). The floor of scoring is the larger of
reading the packed keys at copy speed and multiplying at the FP8 matrix rate; that of selecting is
reading its scores once. Where one request decodes, several copies of its keys take turns, so that a
call does not find them in the L2 cache, as it would not in a model of many layers.

Before a case is timed, scores and choice of a few tokens are held against the torch twin's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from v4quant.bench.choices import INDEX_CASES, Compare
from v4quant.bench.kernels.cases import CHANNELS, HEADS, IndexCase, index_case
from v4quant.bench.kernels.cells import Cells, Missing
from v4quant.bench.kernels.device import Machine, choose_device, measure_machine, time_calls
from v4quant.bench.kernels.indexer_peers import SCORERS, SELECTORS, IndexerPeerRow, measure_peers
from v4quant_kernels import dispatch
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress
from v4quant_kernels.twins.indexer import WORKSPACE

_L2_BYTES = 2**28  # more than the L2 cache of any GPU here
_CHECKED = 2  # tokens whose scores are held against the twin's
_STRAY = 2.0**-9  # of the scores' norm: FP8 tensor cores sum in 13 bits


@dataclass(frozen=True)
class IndexerRow:
    """One measurement; seconds. Shares are of the floors in the module's description. deviation:
    from the torch twin's scores, of their norm."""

    case: str
    context: int
    tokens: int
    k: int
    score_seconds: float
    score_floor_share: float
    select_seconds: float
    select_floor_share: float
    total_seconds: float
    deviation: float


@dataclass(frozen=True)
class IndexerBench:
    """All rows of one run, and the machine they were measured on."""

    machine: Machine
    rows: tuple[IndexerRow, ...]
    peers: tuple[IndexerPeerRow, ...]
    missing: tuple[Missing, ...]


def bench_indexer(
    contexts: Sequence[int],
    cases: Sequence[str],
    k: int,
    progress: Progress,
    device: str | None = None,
    compare: Compare = "also",
    append: Path | None = None,
    minutes: float | None = None,
) -> IndexerBench:
    """Measure every combination; what cannot be measured is named in `missing`.

    append, minutes: as of `bench_moe`. Raises V4QuantError without a GPU unless `device` is "cpu".
    """
    where = choose_device(device)
    cells = Cells("indexer", measure_machine(where), progress, append, minutes)
    kinds = [(context, case) for context in contexts for case in cases]
    rows: list[IndexerRow | None] = []
    if compare != "only":
        progress.start("Indexer", len(kinds), "case")
        for context, case in kinds:
            measure = partial(_measure, case, context, k, cells.machine)
            rows.append(cells.run(f"{case} {context}", "row", measure))
        progress.finish()
    peers: list[IndexerPeerRow] = []
    if compare != "none" and where == "cuda":
        progress.start("Others", len(kinds) * (len(SCORERS) + len(SELECTORS)), "case")
        for context, case in kinds:
            peers += measure_peers(case, context, k, cells)
        progress.finish()
    measured = tuple(row for row in rows if row is not None)
    return IndexerBench(cells.machine, measured, tuple(peers), tuple(cells.missing))


def scores(case: IndexCase) -> Tensor:
    """Scores of the case's keys, as many tokens as it has."""
    return dispatch.indexer_logits(
        case.q_codes, case.q_scale, case.packed, case.weights, case.positions,
        first_key=case.first, num_keys=case.keys,
    )  # fmt: skip


def everything(case: IndexCase, k: int) -> Tensor:
    """The k best keys of each token, as the model calls it."""
    return dispatch.index_top_k(
        case.q_codes, case.q_scale, case.packed, case.weights, k, case.positions,
        first_key=case.first, num_keys=case.keys,
    )  # fmt: skip


def copies_of(case: IndexCase, device: str) -> list[IndexCase]:
    """The case with keys that take turns where they would fit into a cache."""
    few = case.tokens <= INDEX_CASES["requests"][0] and device == "cuda"
    count = -(-_L2_BYTES // case.packed.numel()) if few else 1
    return [case, *(replace(case, packed=case.packed.clone()) for _ in range(count - 1))]


def fitting(case: IndexCase) -> IndexCase:
    """As many of its tokens as have scores within the workspace."""
    return case.piece(max(1, min(case.tokens, WORKSPACE // case.keys)))


def _measure(name: str, context: int, k: int, machine: Machine) -> IndexerRow:
    case, device = index_case(name, context, machine.device), machine.device
    small = fitting(case)
    logits = scores(small)
    deviation = check(small, logits, k)
    sets = copies_of(case, device)
    pieces = [fitting(s) for s in sets]
    score_time = time_calls([partial(scores, s) for s in pieces], device).seconds
    select_time = time_calls([lambda: dispatch.top_k(logits, k)], device).seconds
    shared = small.tokens if case.first is not None else 1
    read = shared * case.keys * case.packed.shape[1]
    rate = machine.fp8_flops or machine.bf16_flops
    flop = 2.0 * small.tokens * case.keys * HEADS * CHANNELS
    score_floor = max(read / machine.copy_bytes_per_second, flop / rate)
    select_floor = 4 * logits.numel() / machine.copy_bytes_per_second
    return IndexerRow(
        name, context, case.tokens, k, score_time, score_floor / score_time,
        select_time, select_floor / select_time,
        time_calls([partial(everything, s, k) for s in sets], device).seconds, deviation,
    )  # fmt: skip


def check(case: IndexCase, logits: Tensor, k: int) -> float:
    """How far the first tokens' scores are from the twin's. Raises V4QuantError if they, or the
    choice among them, are wrong."""
    few = case.piece(_CHECKED)
    expected = dispatch.indexer_logits(
        few.q_codes, few.q_scale, few.packed, few.weights, few.positions,
        first_key=few.first, num_keys=few.keys, backend="torch",
    )  # fmt: skip
    found = logits[:_CHECKED]
    seen = expected != -torch.inf
    if not torch.equal(seen, found != -torch.inf):
        raise V4QuantError("other keys are visible than to the twin")
    away = (found - expected)[seen].norm() / expected[seen].norm().clamp(min=1e-30)
    deviation = float(away)
    if not deviation <= _STRAY:
        raise V4QuantError(f"the scores are {deviation:.3g} of their norm away from the twin's")
    if not torch.equal(dispatch.top_k(found, k), dispatch.top_k(found, k, backend="torch")):
        raise V4QuantError("the top-k of the same scores is not the twin's")
    return deviation
