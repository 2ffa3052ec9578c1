"""Sorting routed slots by expert, on the device, without asking the host anything.

A slot is one (token, choice) pair, numbered `token * top_k + choice`. The grouped GEMM works on
tiles of BM slots that all belong to one expert, so slots are ordered by expert and every expert's
list is padded to whole tiles with -1. How many tiles that takes is known only on the device; the
host allocates and launches for the most there can be, and surplus tiles carry expert -1 and return
at once. That keeps the launch the same for every routing, as CUDA graphs need.

One program serves one expert and walks over all slots in order, so the order inside an expert is
the slots' own: the result is the same every time, with no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@dataclass(frozen=True)
class RoutingPlan:
    """Which slots and which expert each tile of rows works on.

    sorted_slots: int32 `[tiles * BM]`, -1 = padding. tile_expert: int32 `[tiles]`, -1 = unused.
    """

    sorted_slots: Tensor
    tile_expert: Tensor


@triton.jit
def count_kernel(expert_ids_ptr, counts_ptr, num_slots, BLOCK: tl.constexpr):
    """counts[e] = number of slots routed to expert e. Grid: experts."""
    expert = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    start = 0
    while start < num_slots:
        slot = start + tl.arange(0, BLOCK)
        ids = tl.load(expert_ids_ptr + slot, mask=slot < num_slots, other=-1)
        total += (ids == expert).to(tl.int32)
        start += BLOCK
    tl.store(counts_ptr + expert, tl.sum(total, axis=0))


@triton.jit
def place_kernel(
    expert_ids_ptr,
    counts_ptr,
    sorted_slots_ptr,
    tile_expert_ptr,
    num_slots,
    num_experts,
    BM: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one expert's slots, in order, and its tiles' expert id. Grid: experts."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + every, mask=every < num_experts, other=0)
    tiles = (counts + BM - 1) // BM
    first_tile = tl.sum(tl.where(every < expert, tiles, 0), axis=0)
    my_tiles = tl.sum(tl.where(every == expert, tiles, 0), axis=0)
    tile = 0
    while tile < my_tiles:
        tl.store(tile_expert_ptr + first_tile + tile, expert)
        tile += 1
    base = first_tile * BM
    start = 0
    while start < num_slots:
        slot = start + tl.arange(0, BLOCK)
        ids = tl.load(expert_ids_ptr + slot, mask=slot < num_slots, other=-1)
        mine = (ids == expert).to(tl.int32)
        place = base + tl.cumsum(mine, axis=0) - 1
        tl.store(sorted_slots_ptr + place, slot, mask=mine == 1)
        base += tl.sum(mine, axis=0)
        start += BLOCK


def max_tiles(num_slots: int, num_experts: int, rows_per_tile: int) -> int:
    """Most tiles any routing can need: every active expert may leave one tile partly filled."""
    active = min(num_slots, num_experts)
    return (num_slots + active * (rows_per_tile - 1)) // rows_per_tile


def sort_slots(expert_ids: Tensor, num_experts: int, rows_per_tile: int) -> RoutingPlan:
    """Plan for int32 local `expert_ids` `[slots]` (-1 = skip this slot)."""
    num_slots = expert_ids.numel()
    tiles = max_tiles(num_slots, num_experts, rows_per_tile)
    counts = torch.empty(num_experts, dtype=torch.int32, device=expert_ids.device)
    sorted_slots = expert_ids.new_full((tiles * rows_per_tile,), -1)
    tile_expert = expert_ids.new_full((tiles,), -1)
    block = min(_BLOCK, triton.next_power_of_2(num_slots))
    count_kernel[(num_experts,)](expert_ids, counts, num_slots, BLOCK=block)
    place_kernel[(num_experts,)](
        expert_ids,
        counts,
        sorted_slots,
        tile_expert,
        num_slots,
        num_experts,
        BM=rows_per_tile,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK=block,
    )
    return RoutingPlan(sorted_slots, tile_expert)
