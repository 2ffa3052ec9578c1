"""Where llama.cpp and vLLM put bytes: none is lost, no card overflows, none could hold more."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from v4quant.planner import llama_cpp, vllm
from v4quant.planner.footprint import Footprint, LayerBytes, footprint, outline_release
from v4quant.planner.machines import GIB, parse_cards, parse_machine, with_memory
from v4quant.recipe import Recipe
from v4quant_formats.model_config import parse_model_config
from v4quant_kernels.scheme import SCHEMES

FLASH = outline_release("flash")
DIMS = FLASH.dimensions
CONTEXT = 32768


def made(layers: list[LayerBytes], embed: int, head: int) -> Footprint:
    total = sum(x.experts + x.rest for x in layers)
    return Footprint(tuple(layers), embed, head, 0, 0, 0, total, embed, 0, 0, 6 / 256)


def fits(file: Footprint, room: int, count: int, offloaded: int) -> bool:
    """By trying every way to cut the layers into runs."""
    kv = -(-llama_cpp.kv_bytes(DIMS, CONTEXT) // len(file.layers))
    costs = [x.rest + (x.experts if i >= offloaded else 0) + kv for i, x in enumerate(file.layers)]
    for cuts in itertools.combinations_with_replacement(range(len(costs) + 1), count - 1):
        edges = (0, *cuts, len(costs))
        loads = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        loads[-1] += file.head + file.other
        if max(loads) <= room:
            return True
    return False


def test_as_few_experts_as_possible_leave_the_cards(generator: torch.Generator) -> None:
    random_ = random.Random(generator.seed())
    machine = with_memory(parse_cards("2x24GB"), "512GB", None)
    assert machine.card is not None
    room = int(0.95 * machine.card.nbytes) - llama_cpp.own_bytes(DIMS)
    for _ in range(30):
        layers = [
            LayerBytes(random_.randint(1, 5) * 10**9, random_.randint(1, 9) * 10**8)
            for _ in range(random_.randint(8, 16))
        ]
        file = made(layers, 10**9, 10**9)
        placed = llama_cpp.place(file, machine, DIMS, CONTEXT)
        least = next((n for n in range(len(layers) + 1) if fits(file, room, 2, n)), None)
        if placed is None:
            assert least is None
            continue
        assert least is not None
        in_memory = sum(x.experts for x in layers[:least]) + file.embed
        parts = {0, layers[least - 1].experts // 3, 2 * layers[least - 1].experts // 3}
        assert min(abs(in_memory - placed.ram - p) for p in (parts if least else {0})) <= 1
        own = llama_cpp.own_bytes(DIMS)
        assert all(taken - own <= room for taken in placed.cards)
        kv = llama_cpp.kv_bytes(DIMS, CONTEXT)
        held = sum(placed.cards) - 2 * own + placed.ram
        assert abs(held - file.trunk - kv) <= len(layers) + 2
        assert placed.kv_room >= kv


def test_the_split_counts_all_layers_and_the_output() -> None:
    file = footprint(FLASH, Recipe("q3_k", format="gguf", dense="q8_0", draft="drop"))
    for name, ram in (("2x3090", "128GB"), ("4x3090", "256GB"), ("3x4090", "128GB")):
        placed = llama_cpp.place(file, with_memory(parse_machine(name), ram, None), DIMS, CONTEXT)
        assert placed is not None
        split = next(o for o in placed.options if o.startswith("--tensor-split"))
        assert sum(map(int, split.split()[1].split(","))) == DIMS.num_hidden_layers + 1


def test_cards_too_small_for_every_dense_matrix_take_the_last_layers() -> None:
    pro = outline_release("pro")
    dims, recipe = pro.dimensions, Recipe("iq2_xs", format="gguf", dense="q8_0", draft="drop")
    file = footprint(pro, recipe)
    machine = with_memory(parse_cards("1x16GB"), "768GB", None)
    placed = llama_cpp.place(file, machine, dims, CONTEXT)
    assert placed is not None and machine.card is not None and not placed.disk
    layers = int(placed.options[0].split()[1]) - 1  # the output counts as one
    rests = [x.rest for x in file.layers]
    kv = -(-llama_cpp.kv_bytes(dims, CONTEXT) // len(rests))
    on_card = sum(rests[-layers:]) + layers * kv + file.head + file.other
    assert placed.cards == (on_card + llama_cpp.own_bytes(dims),)
    assert placed.cards[0] + rests[-layers - 1] + kv > 0.95 * machine.card.nbytes >= placed.cards[0]
    assert placed.ram + on_card == pytest.approx(file.trunk + len(rests) * kv, abs=1)
    assert placed.kv_room >= llama_cpp.kv_bytes(dims, CONTEXT)


def test_boxes_share_layers_and_no_more_of_them_than_needed() -> None:
    file = footprint(FLASH, Recipe("mxfp4", format="gguf", dense="q8_0", draft="drop"))
    machine = parse_machine("4xdgx-spark")
    assert llama_cpp.place(file, parse_machine("dgx-spark"), DIMS, CONTEXT) is None
    placed = llama_cpp.place(file, machine, DIMS, CONTEXT)
    assert placed is not None and len(placed.cards) == 2 and machine.card is not None
    assert max(placed.cards) <= llama_cpp.memory_room(machine.card.nbytes)
    kv, own = llama_cpp.kv_bytes(DIMS, CONTEXT), llama_cpp.own_bytes(DIMS)
    assert sum(placed.cards) == pytest.approx(file.trunk + kv + 2 * own, abs=len(file.layers))
    assert "--rpc box2:50052" in placed.options and "--no-mmap" in placed.options


def test_macs_raise_the_limit_only_when_they_must() -> None:
    small = footprint(FLASH, Recipe("q2_k", format="gguf", dense="q8_0", draft="drop"))
    roomy = llama_cpp.place(small, parse_machine("m2-ultra-192"), DIMS, CONTEXT)
    tight = llama_cpp.place(small, parse_machine("m4-max-128"), DIMS, 600_000)
    assert roomy is not None and roomy.before == ()
    assert tight is not None and tight.before[0].startswith("sudo sysctl iogpu.wired_limit_mb=")
    limit = int(tight.before[0].rpartition("=")[2]) * 2**20
    assert sum(tight.cards) < limit < 128 * GIB


def test_disk_is_asked_for_only_where_memory_ends() -> None:
    file = footprint(FLASH, Recipe("q2_k", format="gguf", dense="q8_0", draft="drop"))
    machine = with_memory(parse_machine("3060"), "32GB", None)
    assert llama_cpp.place(file, machine, DIMS, CONTEXT) is None
    slow = llama_cpp.place(file, machine, DIMS, CONTEXT, disk=True)
    assert slow is not None and slow.disk > 0
    assert slow.ram <= llama_cpp.memory_room(machine.ram)
    enough = with_memory(machine, "192GB", None)
    fast = llama_cpp.place(file, enough, DIMS, CONTEXT)
    assert fast is not None and fast.disk == 0 and fast.seconds < slow.seconds


@pytest.mark.parametrize("name", ["2xrtx-pro-6000", "8xh100"])
def test_vllm_gets_what_its_own_rules_leave(name: str) -> None:
    machine, config = parse_machine(name), parse_model_config(dict(FLASH.config))
    file, scheme = footprint(FLASH, Recipe("mxfp4")), SCHEMES["mxfp4"]
    served = vllm.place(file, machine, config, scheme, CONTEXT, 1)
    assert served is not None and machine.card is not None
    usable = machine.card.nbytes * served.serving.utilization
    assert served.taken <= usable
    share = -(-(file.cut + file.cut_drafts) // machine.count) + file.whole + file.whole_drafts
    assert served.weights == share
    longer = vllm.place(file, machine, config, scheme, served.context_fits, 1)
    assert longer is not None
    if served.context_fits < config.max_position_embeddings:
        beyond = vllm.place(file, machine, config, scheme, served.context_fits + 2048, 1)
        same = served.serving.batched_tokens
        assert beyond is None or beyond.serving.batched_tokens < same
