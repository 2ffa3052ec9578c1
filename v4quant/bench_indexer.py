"""`bench indexer`: scoring and selecting keys, against the machine's floor.

Three situations at each context: one request decoding one token, 128 requests decoding one each,
and the last 4096 tokens of a prefill. Timed are the scores alone and the exact top-k of a piece of
them, and all of it as the model calls it (`index_top_k`). The floor of scoring is the larger of
reading the packed keys at copy speed and multiplying at the FP8 matrix rate; that of selecting is
reading its scores once. Where one request decodes, several copies of its keys take turns, so that a
call does not find them in the L2 cache, as it would not in a model of many layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from v4quant.bench_device import Machine, choose_device, measure_machine, time_calls
from v4quant_kernels import dispatch
from v4quant_kernels.progress import Progress
from v4quant_kernels.ref.indexer import TOKENS_PER_KEY, WORKSPACE

HEADS, CHANNELS = 64, 128
CONTEXTS = (131072, 1048576)
_L2_BYTES = 2**28  # more than the L2 cache of any GPU here
CASES = {"one": (1, 1), "requests": (128, 1), "prefill": (1, 4096)}
"""(requests, tokens of each)."""


@dataclass(frozen=True)
class IndexerRow:
    """One measurement; seconds. Shares are of the floors in the module's description."""

    case: str
    context: int
    tokens: int
    k: int
    score_seconds: float
    score_floor_share: float
    select_seconds: float
    select_floor_share: float
    total_seconds: float


@dataclass(frozen=True)
class IndexerBench:
    """All rows of one run, and the machine they were measured on."""

    machine: Machine
    rows: tuple[IndexerRow, ...]


def bench_indexer(
    contexts: Sequence[int],
    cases: Sequence[str],
    k: int,
    progress: Progress,
    device: str | None = None,
) -> IndexerBench:
    """Measure every combination. Raises V4QuantError without a GPU unless `device` is "cpu"."""
    where = choose_device(device)
    machine = measure_machine(where)
    progress.start("Indexer", len(contexts) * len(cases), "case")
    rows = []
    for context in contexts:
        for case in cases:
            rows.append(_measure(case, context, k, machine))
            progress.advance(1)
    progress.finish()
    return IndexerBench(machine, tuple(rows))


def _measure(case: str, context: int, k: int, machine: Machine) -> IndexerRow:
    requests, each = CASES[case]
    tokens, keys, device = requests * each, context // TOKENS_PER_KEY, machine.device
    generator = torch.Generator(device).manual_seed(7)

    def bytes_(*shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.uint8, device=device)
        return empty.random_(0, 256, generator=generator)

    q_codes = bytes_(tokens, HEADS, CHANNELS // 2)
    q_scale = torch.full((tokens, HEADS, CHANNELS // 32), 126, dtype=torch.uint8, device=device)
    packed = bytes_(requests * keys, CHANNELS // 2 + CHANNELS // 32)
    packed[:, CHANNELS // 2 :] = 126
    weights = torch.randn(tokens, HEADS, device=device, generator=generator)
    positions = torch.full((tokens,), context - 1, device=device)
    if each > 1:
        positions = torch.arange(context - each, context, device=device)
    first = torch.arange(requests, device=device) * keys if requests > 1 else None
    piece = max(1, min(tokens, WORKSPACE // keys))

    def score(keys_: torch.Tensor) -> torch.Tensor:
        return dispatch.indexer_logits(
            q_codes[:piece], q_scale[:piece], keys_, weights[:piece], positions[:piece],
            first_key=None if first is None else first[:piece], num_keys=keys,
        )  # fmt: skip

    def everything(keys_: torch.Tensor) -> torch.Tensor:
        return dispatch.index_top_k(
            q_codes, q_scale, keys_, weights, k, positions, first_key=first, num_keys=keys
        )

    copies = 1 if each > 1 or device != "cuda" else -(-_L2_BYTES // packed.numel())
    sets = [packed, *(packed.clone() for _ in range(copies - 1))]
    logits = score(packed)
    score_time = time_calls([partial(score, s) for s in sets], device).seconds
    select_time = time_calls([lambda: dispatch.top_k(logits, k)], device).seconds
    read = (piece if requests > 1 else 1) * keys * packed.shape[1]
    rate = machine.fp8_flops or machine.bf16_flops
    flop = 2.0 * piece * keys * HEADS * CHANNELS
    score_floor = max(read / machine.copy_bytes_per_second, flop / rate)
    select_floor = 4 * logits.numel() / machine.copy_bytes_per_second
    return IndexerRow(
        case, context, tokens, k, score_time, score_floor / score_time,
        select_time, select_floor / select_time,
        time_calls([partial(everything, s) for s in sets], device).seconds,
    )  # fmt: skip
