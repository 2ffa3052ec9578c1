"""Where llama.cpp puts a file's bytes: whole layers on cards, experts partly in system memory.

Layers go to cards in order (`--tensor-split` counts them), each with its share of the KV cache; the
output matrix is with the last. `--n-cpu-moe N` leaves the routed experts of the first N layers in
system memory, where the processor multiplies them; the token embedding is always there. What one
more layer's gate and up, or down, still finds room for is named by `--override-tensor`. Without
cards everything is in memory; with unified memory everything is in the one there is. Of several
such boxes as few as hold the file share its layers over the network (`--rpc`): llama.cpp lists
remote devices before its own, so the first layers are theirs, and embedding and output stay with
the box that serves. Where cards are too small for every layer's dense matrices, the first layers
stay in system memory whole (`--n-gpu-layers` counts those that do not, and the output).

    card:   0.95 size - 600 MB - activations   >=  layers' rest + experts on cards + KV + output
    memory: size - max(4 GB, 6 %)              >=  experts in memory + embedding

Activations are a batch of 512 tokens: logits and sixteen copies of the hyper-connection streams, in
float32; KV is the BF16 cache of one sequence. Both are estimates, and so is what the system keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from v4quant.planner.footprint import Footprint, LayerBytes
from v4quant.planner.machines import GIB, MIB, Machine
from v4quant_formats.model_config import Dimensions

_USABLE = 0.95
_RUNTIME_BYTES = 600 * 10**6
_BATCH = 512
_STREAM_COPIES = 16
_SYSTEM_LEAST, _SYSTEM_SHARE = 4 * 10**9, 0.06
# Of a Mac's memory, what its GPU may take unless `iogpu.wired_limit_mb` says more.
_METAL_SHARE = {True: 0.75, False: 0.66}
_METAL_LARGE = 36 * GIB
# Of Linux' memory, what an integrated Radeon may take unless the kernel is told more.
_VULKAN_SHARE = 0.5
# A mapped file is copied to an integrated GPU page by page: read it whole instead.
_COPYING = ("cuda", "vulkan")
RPC_PORT = 50052
# What stays in memory of a layer of which a card takes a part, and its share: of an expert's three
# matrices gate and up are two. More on the card comes first.
_PARTS = (("down", 1 / 3), ("gate|up", 2 / 3))


@dataclass(frozen=True)
class Placement:
    """Where the bytes lie, and the options that put them there.

    cards: bytes on each card, KV and buffers included. ram, disk: bytes in system memory, and those
    of them that are read from the file again and again because memory is too small. kv_room: bytes
    the KV cache may take at most. options: of llama-server. before: commands of the system's owner.
    seconds: to read what one token needs from where it lies; no token is faster.
    """

    cards: tuple[int, ...]
    ram: int
    disk: int
    kv_room: int
    options: tuple[str, ...]
    before: tuple[str, ...]
    seconds: float


def own_bytes(config: Dimensions) -> int:
    """What a card or a memory needs beside weights and KV cache: runtime and activations."""
    streams = _STREAM_COPIES * config.hc_mult * config.hidden_size
    return _RUNTIME_BYTES + 4 * _BATCH * (config.vocab_size + streams)


def memory_room(ram: int) -> int:
    """Bytes of system memory that weights may take."""
    return max(0, int(ram - max(_SYSTEM_LEAST, _SYSTEM_SHARE * ram)))


def kv_bytes(config: Dimensions, context: int) -> int:
    """BF16 KV cache of one sequence; 0 where nothing is known of it (V4.1)."""
    return (config.kv_bytes_per_token() or 0) * context


def place(
    file: Footprint, machine: Machine, config: Dimensions, context: int, disk: bool = False
) -> Placement | None:
    """Where `file` lies on `machine`; None where it does not fit.

    disk: let experts that fit nowhere stay in the file, which is far slower.
    """
    if machine.unified:
        return _unified(file, machine, config, context)
    if machine.card is None:
        return _memory_only(file, machine, config, context, disk)
    return _cards(file, machine, config, context, disk)


def _unified(
    file: Footprint, machine: Machine, config: Dimensions, context: int
) -> Placement | None:
    assert machine.card is not None
    size, own = machine.card.nbytes, own_bytes(config)
    room = memory_room(size) - own
    per_layer = -(-kv_bytes(config, context) // len(file.layers))
    layers = [x.experts + x.rest for x in file.layers]
    served = file.embed + file.head + file.other
    for boxes in range(1, machine.count + 1):
        split = _balanced(layers, per_layer, served, [room] * boxes)
        if split is not None:
            break
    else:
        return None
    taken = _loads(layers, split, per_layer, served)
    options = ["--n-gpu-layers 99"]
    if machine.unified in _COPYING and not file.tables:
        options.append("--no-mmap")
    if boxes > 1:
        others = ",".join(f"box{n}:{RPC_PORT}" for n in range(2, boxes + 1))
        options += [f"--rpc {others}", _tensor_split(split)]
    cards = tuple(c + own for c in taken)
    return Placement(
        cards, 0, 0, _kv_room(taken, split, room, per_layer), tuple(options),
        _limits(machine, max(cards)), _active(file) / machine.card.bandwidth,
    )  # fmt: skip


def _limits(machine: Machine, needed: int) -> tuple[str, ...]:
    """What a box's owner says so that its GPU may take `needed` bytes; nothing where it may."""
    assert machine.card is not None
    size = machine.card.nbytes
    most = min(needed + 2 * GIB, memory_room(size)) // MIB
    if machine.unified == "metal" and needed > _METAL_SHARE[size > _METAL_LARGE] * size:
        return (f"sudo sysctl iogpu.wired_limit_mb={most}",)
    if machine.unified == "vulkan" and needed > _VULKAN_SHARE * size:
        pages = most * 256
        return (
            f"# Linux' kernel command line, then restart: ttm.pages_limit={pages} "
            f"ttm.page_pool_size={pages}",
        )
    return ()


def _loads(layers: Sequence[int], split: Sequence[int], kv: int, last: int) -> list[int]:
    """Bytes of each card that gets the next `split` layers, and the last one `last` besides."""
    loads, start = [], 0
    for count in split:
        loads.append(sum(layers[start : start + count]) + kv * count)
        start += count
    loads[-1] += last
    return loads


def _tensor_split(split: Sequence[int]) -> str:
    counts = [*split[:-1], split[-1] + 1]  # the output counts as a layer
    return "--tensor-split " + ",".join(map(str, counts))


def _memory_only(
    file: Footprint, machine: Machine, config: Dimensions, context: int, disk: bool
) -> Placement | None:
    kv = kv_bytes(config, context)
    needed, room = file.trunk + kv + own_bytes(config), memory_room(machine.ram)
    over = max(0, needed - room)
    experts = sum(layer.experts for layer in file.layers)
    if over and (not disk or over > experts):
        return None
    seconds = _active(file) / machine.ram_bandwidth + _from_disk(file, machine, over, experts)
    return Placement(
        (), needed - over, over, max(0, room - needed) + kv, ("--n-gpu-layers 0",), (), seconds
    )


def _cards(
    file: Footprint, machine: Machine, config: Dimensions, context: int, disk: bool
) -> Placement | None:
    assert machine.card is not None
    own = own_bytes(config)
    room = int(_USABLE * machine.card.nbytes) - own
    per_layer = -(-kv_bytes(config, context) // len(file.layers))
    in_memory = memory_room(machine.ram)
    for cut in _cuts(len(file.layers)):
        held = _held(file, cut, per_layer)
        if held > in_memory and not disk:
            return None
        cheap = _on_cards(file.layers, cut)
        split = _balanced(cheap, per_layer, file.head + file.other, [room] * machine.count)
        if split is None:
            continue
        found = _placed(file, machine, cut, split, per_layer)
        found = _with_part(file, machine, found, room, cut, split)
        over = max(0, found.ram - in_memory)
        kv_room = _kv_room(found.cards, split, room, per_layer) * len(file.layers) // len(cheap)
        if cut.bare:
            beside = max(0, in_memory - held) + per_layer * cut.bare
            kv_room = min(kv_room, beside * len(file.layers) // cut.bare)
        seconds = found.seconds + _from_disk(file, machine, over, max(found.ram, 1))
        return replace(
            found, cards=tuple(c + own for c in found.cards), disk=over, ram=found.ram - over,
            kv_room=kv_room, seconds=seconds,
        )  # fmt: skip
    return None


@dataclass(frozen=True)
class _Cut:
    """The first `bare` layers lie in memory whole, and of the first `offloaded` the experts do."""

    bare: int
    offloaded: int


def _cuts(layers: int) -> Iterator[_Cut]:
    """From everything on cards to a single layer there; each holds more in memory."""
    yield from (_Cut(0, n) for n in range(layers + 1))
    yield from (_Cut(n, layers) for n in range(1, layers))


def _held(file: Footprint, cut: _Cut, kv: int) -> int:
    """Bytes in system memory."""
    experts = sum(layer.experts for layer in file.layers[: cut.offloaded])
    return experts + sum(layer.rest + kv for layer in file.layers[: cut.bare]) + file.embed


def _on_cards(layers: Sequence[LayerBytes], cut: _Cut) -> list[int]:
    """Bytes on its card of every layer that has one."""
    return [
        x.rest + (x.experts if i >= cut.offloaded else 0)
        for i, x in enumerate(layers)
        if i >= cut.bare
    ]


def _kv_room(cards: Sequence[int], split: Sequence[int], room: int, per_layer: int) -> int:
    """Bytes of the whole cache when the first card is full: each holds that of its own layers."""
    layers = sum(split)
    return min(
        (room - taken + per_layer * count) * layers // count
        for taken, count in zip(cards, split, strict=True)
        if count
    )


def _balanced(
    layers: Sequence[int], kv: int, last: int, rooms: Sequence[int]
) -> tuple[int, ...] | None:
    """Layers of each card, in order, such that the fullest card is as empty as it can be.

    None where they do not fit. `last` is what the last card holds besides.
    """
    if _dealt(layers, kv, last, rooms) is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if _dealt(layers, kv, last, [int(middle * r) for r in rooms]) is None:
            low = middle
        else:
            high = middle
    return _dealt(layers, kv, last, [int(high * r) for r in rooms])


def _dealt(
    layers: Sequence[int], kv: int, last: int, rooms: Sequence[int]
) -> tuple[int, ...] | None:
    counts, index = [], 0
    for number, room in enumerate(rooms):
        free = room - (last if number == len(rooms) - 1 else 0)
        taken = 0
        while index < len(layers) and free >= layers[index] + kv:
            free -= layers[index] + kv
            index += 1
            taken += 1
        if free < 0:
            return None
        counts.append(taken)
    return tuple(counts) if index == len(layers) else None


def _placed(
    file: Footprint, machine: Machine, cut: _Cut, split: Sequence[int], kv: int
) -> Placement:
    cards = _loads(_on_cards(file.layers, cut), split, kv, file.head + file.other)
    on_cards = len(file.layers) - cut.bare + 1 if cut.bare else 99
    options = [f"--n-gpu-layers {on_cards}", "--fit off"]
    if cut.offloaded:
        options.append(f"--n-cpu-moe {cut.offloaded}")
    if len(split) > 1:
        options.append(_tensor_split(split))
    seconds = _active_parts(file, machine, cut)
    return Placement(tuple(cards), _held(file, cut, kv), 0, 0, tuple(options), (), seconds)


def _with_part(
    file: Footprint,
    machine: Machine,
    found: Placement,
    room: int,
    cut: _Cut,
    split: Sequence[int],
) -> Placement:
    """Room for a part of one more layer's experts, on the card that holds the layer."""
    if not cut.offloaded or cut.bare:
        return found
    layer, total, card = cut.offloaded - 1, 0, 0
    for number, count in enumerate(split):
        if total <= layer < total + count:
            card = number
        total += count
    experts = file.layers[layer].experts
    for left, in_memory in _PARTS:
        moved = int(experts * (1 - in_memory))
        if found.cards[card] + moved > room:
            continue
        assert machine.card is not None
        share = moved / experts
        cards = tuple(c + moved * (i == card) for i, c in enumerate(found.cards))
        pattern = f"blk\\.{layer}\\.ffn_({left})_exps=CPU"
        options = [o for o in found.options if not o.startswith("--n-cpu-moe")]
        if layer:
            options.insert(2, f"--n-cpu-moe {layer}")
        options.append(f"--override-tensor {pattern}")
        saved = file.active * experts * share
        seconds = found.seconds - saved / machine.ram_bandwidth + saved / machine.card.bandwidth
        return replace(
            found, cards=cards, ram=found.ram - moved, options=tuple(options), seconds=seconds
        )
    return found


def _active(file: Footprint) -> float:
    """Bytes one token's products read."""
    experts = sum(layer.experts for layer in file.layers)
    rest = sum(layer.rest for layer in file.layers)
    return experts * file.active + rest + file.head + file.other


def _active_parts(file: Footprint, machine: Machine, cut: _Cut) -> float:
    """Seconds a token takes to read its bytes, cards and memory one after another."""
    assert machine.card is not None
    in_memory = file.active * sum(layer.experts for layer in file.layers[: cut.offloaded])
    in_memory += sum(layer.rest for layer in file.layers[: cut.bare])
    return (_active(file) - in_memory) / machine.card.bandwidth + in_memory / machine.ram_bandwidth


def _from_disk(file: Footprint, machine: Machine, over: int, of: int) -> float:
    """Seconds a token waits for the share of its experts that memory does not hold."""
    experts = file.active * sum(layer.experts for layer in file.layers)
    return experts * (over / of) / machine.disk_bandwidth if over else 0.0
