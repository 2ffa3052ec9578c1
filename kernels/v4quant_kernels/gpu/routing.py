"""Sorting routed slots by expert, on the device, without asking the host anything.

A slot is one (token, choice) pair, numbered `token * top_k + choice`. The grouped GEMM works on
tiles of BM slots that all belong to one expert, so slots are ordered by expert and every expert's
list is padded to whole tiles with -1. How many tiles that takes is known only on the device; the
host allocates and launches for the most there can be, and surplus tiles carry expert -1 and return
at once. That keeps the launch the same for every routing, as CUDA graphs need.

One program serves one expert and walks over all slots in order, so the order inside an expert is
the slots' own: the result is the same every time, with no atomics. Where its list begins follows
from how many tiles the experts before it take; each program counts all slots itself, which is one
launch and cheap for a decode batch. For more slots a first kernel counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_COUNT_ALONE = 4 * _BLOCK


@dataclass(frozen=True)
class Routed:
    """Who goes where, as the caller says it: every kernel that needs to know asks `local_experts`.

    ids: integer `[slots]`. given_map: integer `[all experts]`, or None when ids are local.
    """

    ids: Tensor
    given_map: Tensor | None
    num_experts: int

    @property
    def mapped(self) -> bool:
        """Whether ids are global and go through the map."""
        return self.given_map is not None

    @property
    def expert_map(self) -> Tensor:
        """The map, or something to point at where there is none."""
        return self.ids if self.given_map is None else self.given_map

    @property
    def map_size(self) -> int:
        """Experts of the whole model, 0 without a map."""
        return 0 if self.given_map is None else self.given_map.numel()


@dataclass(frozen=True)
class RoutingPlan:
    """Which slots and which expert each tile of rows works on.

    sorted_slots: int32 `[tiles * BM]`, -1 = padding. tile_expert: int32 `[tiles]`, -1 = unused.
    """

    sorted_slots: Tensor
    tile_expert: Tensor


@triton.jit
def local_experts(ids_ptr, map_ptr, slot, num_slots, map_size, num_experts, MAPPED: tl.constexpr):
    """int32 rows of the stacked weights of these slots; -1 where an expert is not here."""
    expert = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1)
    if MAPPED:
        known = (expert >= 0) & (expert < map_size)
        expert = tl.load(map_ptr + tl.where(known, expert, 0), mask=known, other=-1)
    here = (expert >= 0) & (expert < num_experts)
    return tl.where(here, expert, -1).to(tl.int32)


@triton.jit
def count_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    num_slots,
    map_size,
    num_experts,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[e] = number of slots routed to expert e. Grid: experts."""
    expert = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    start = 0
    while start < num_slots:
        slot = start + tl.arange(0, BLOCK)
        mine = local_experts(ids_ptr, map_ptr, slot, num_slots, map_size, num_experts, MAPPED)
        total += (mine == expert).to(tl.int32)
        start += BLOCK
    tl.store(counts_ptr + expert, tl.sum(total, axis=0))


@triton.jit
def place_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    sorted_slots_ptr,
    tile_expert_ptr,
    num_slots,
    map_size,
    num_experts,
    num_tiles,
    MAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    BM: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one expert's slots, in order, its padding and its tiles' expert id. Grid: experts.

    EXPERTS is a power of two above num_experts: the last counter takes slots of no expert.
    """
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    if COUNTED:
        counts = tl.load(counts_ptr + every, mask=every < num_experts, other=0)
    else:
        counts = tl.zeros((EXPERTS,), dtype=tl.int32)
        start = 0
        while start < num_slots:
            slot = start + tl.arange(0, BLOCK)
            mine = local_experts(ids_ptr, map_ptr, slot, num_slots, map_size, num_experts, MAPPED)
            counts += tl.histogram(tl.where(mine < 0, EXPERTS - 1, mine), EXPERTS)
            start += BLOCK
        counts = tl.where(every < num_experts, counts, 0)
    tiles = (counts + BM - 1) // BM
    first_tile = tl.sum(tl.where(every < expert, tiles, 0), axis=0)
    last_tile = first_tile + tl.sum(tl.where(every == expert, tiles, 0), axis=0)
    tile = first_tile
    while tile < last_tile:
        tl.store(tile_expert_ptr + tile, expert)
        tile += 1
    place_end = first_tile * BM
    start = 0
    while start < num_slots:
        slot = start + tl.arange(0, BLOCK)
        ids = local_experts(ids_ptr, map_ptr, slot, num_slots, map_size, num_experts, MAPPED)
        mine = (ids == expert).to(tl.int32)
        place = place_end + tl.cumsum(mine, axis=0) - 1
        tl.store(sorted_slots_ptr + place, slot, mask=mine == 1)
        place_end += tl.sum(mine, axis=0)
        start += BLOCK
    spare = place_end + tl.arange(0, BM)
    tl.store(sorted_slots_ptr + spare, -1, mask=spare < last_tile * BM)
    if expert == num_experts - 1:
        tile = last_tile
        while tile < num_tiles:
            unused = tile + tl.arange(0, BLOCK)
            tl.store(tile_expert_ptr + unused, -1, mask=unused < num_tiles)
            tile += BLOCK


def max_tiles(num_slots: int, num_experts: int, rows_per_tile: int) -> int:
    """Most tiles any routing can need: every active expert may leave one tile partly filled."""
    active = min(num_slots, num_experts)
    return (num_slots + active * (rows_per_tile - 1)) // rows_per_tile


def sort_slots(who: Routed, rows_per_tile: int) -> RoutingPlan:
    """The plan for tiles of so many rows; ids of no local expert are skipped."""
    num_slots, num_experts = who.ids.numel(), who.num_experts
    tiles = max_tiles(num_slots, num_experts, rows_per_tile)

    def integers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=who.ids.device)

    sorted_slots, tile_expert = integers(tiles * rows_per_tile), integers(tiles)
    block = max(16, min(_BLOCK, triton.next_power_of_2(num_slots)))
    counted = num_slots > _COUNT_ALONE
    counts = integers(num_experts if counted else 1)
    common = {"MAPPED": who.mapped, "BLOCK": block}
    inputs, sizes = (who.ids, who.expert_map), (num_slots, who.map_size, num_experts)
    if counted:
        count_kernel[(num_experts,)](*inputs, counts, *sizes, **common)
    place_kernel[(num_experts,)](
        *inputs, counts, sorted_slots, tile_expert, *sizes, tiles,
        COUNTED=counted, BM=rows_per_tile,
        EXPERTS=max(16, triton.next_power_of_2(num_experts + 1)), **common,
    )  # fmt: skip
    return RoutingPlan(sorted_slots, tile_expert)
