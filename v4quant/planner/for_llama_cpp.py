"""GGUF files that llama.cpp can serve on a machine, and what would do where none fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from v4quant.conversion.gguf_files import packed
from v4quant.planner import llama_cpp
from v4quant.planner.candidates import (
    Candidate,
    Request,
    Where,
    has_fp4,
    is_exact,
    longest_context,
    loss_of,
    mixed_loss,
    mixture,
    other_ways,
    proof_notes,
    scaled,
)
from v4quant.planner.effort import cost_of, with_tables
from v4quant.planner.footprint import Footprint, Outline, footprint
from v4quant.planner.loss import with_dense
from v4quant.planner.machines import GIB, Machine
from v4quant.recipe import Recipe
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_kernels.scheme import SCHEMES, get_scheme

# Types of all matrices but the experts, best first. The first is what everybody takes; the others
# are for what does not fit beside it.
_DENSE = ("q8_0", "q6_k", "q5_k", "q4_k")
_TABLES = "q8_0"  # of V4.1's Engram, in a file of its own
_UNIFIED_SIZES = (24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
_RAM_SIZES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # GiB, as sold
_TIGHT = 0.03
# Tokens a second below which a file read from disk is listed only if none is faster.
_LEAST_RATE = 2.0
# llama.cpp's file of a mixed recipe may come out this much larger than the estimate of its parts.
_MIX_RESERVE = 0.995


def candidates(outline: Outline, request: Request) -> tuple[list[Candidate], list[str]]:
    files = list(_gguf_files(outline))
    if not files:
        return [], ["llama.cpp: there is no GGUF form of this release"]
    found: list[Candidate] = []
    for number, dense in enumerate(_DENSE):
        level = files if not number else _with_dense(outline, files, dense)
        fitting = [c for r, f in level if (c := _gguf_candidate(outline, request, r, f, False))]
        if not found and fitting:
            mixed = _mixed_candidate(outline, request, level, fitting[0])
            found = fitting + ([mixed] if mixed is not None else [])
        elif fitting and fitting[0].loss.order < min(c.loss.order for c in found):
            found.append(fitting[0])
        if found and found[0].scheme == files[0][0].scheme:
            break
    if found:
        return found, []
    for dense in _DENSE:
        level = _with_dense(outline, files, dense)
        slow = [c for r, f in level if (c := _gguf_candidate(outline, request, r, f, True))]
        if slow:
            fastest = max(slow, key=lambda c: c.tokens_per_second)
            found = [c for c in slow if c.tokens_per_second >= _LEAST_RATE] or [fastest]
            break
    smallest = min((f for _, f in level), key=lambda f: f.trunk)
    return found, [_llama_remedy(outline, request, smallest)]


def _with_dense(
    outline: Outline, files: Sequence[tuple[Recipe, Footprint]], dense: str
) -> list[tuple[Recipe, Footprint]]:
    """The same files with another type of dense matrices, embedding and head."""
    other = footprint(outline, replace(files[-1][0], dense=dense))
    found = []
    for recipe, file in files:
        layers = (
            replace(old, rest=new.rest) for old, new in zip(file.layers, other.layers, strict=True)
        )
        found.append(
            (
                replace(recipe, dense=dense),
                replace(
                    file, layers=tuple(layers), embed=other.embed, head=other.head,
                    other=other.other,
                ),
            )
        )  # fmt: skip
    return found


def _gguf_files(outline: Outline) -> Iterator[tuple[Recipe, Footprint]]:
    """Every GGUF worth having, largest first: exact ones only up to the smallest exact one."""
    drop = "drop" if outline.draft_stages else "convert"
    exact_bits = [
        SCHEMES[s].bits_per_weight for s in LAYOUTS["gguf"].schemes if SCHEMES[s].holds_mxfp4
    ]
    most = min(exact_bits) if has_fp4(outline) else 9.0
    schemes = sorted(LAYOUTS["gguf"].schemes, key=lambda s: -SCHEMES[s].bits_per_weight)
    for scheme in schemes:
        if SCHEMES[scheme].bits_per_weight > most:
            continue
        tables = _TABLES if outline.dimensions.v41 is not None else ""
        recipe = Recipe(scheme, format="gguf", dense=_DENSE[0], draft=drop, engram=tables)
        try:
            yield recipe, footprint(outline, recipe)
        except UnsupportedPair:
            continue


def _gguf_candidate(
    outline: Outline, request: Request, recipe: Recipe, file: Footprint, disk: bool
) -> Candidate | None:
    dims, machine = outline.dimensions, request.machine
    placed = llama_cpp.place(file, machine, dims, request.context, disk)
    if placed is None or (placed.disk > 0) != disk:
        return None
    exact = is_exact(outline, recipe.scheme)
    cost = cost_of(
        outline,
        get_scheme(recipe.scheme),
        file.trunk + file.tables,
        request.effort,
        request.cores,
        exact,
    )
    cost = with_tables(cost, file.tables)
    per_token = dims.kv_bytes_per_token() or 0
    context = placed.kv_room // per_token if per_token else request.context
    notes = list(proof_notes(outline, recipe.scheme))
    notes.append(_dense_note(recipe.dense))
    if file.tables:
        notes.append(
            f"{file.tables / 1e9:.0f} GB of Engram tables in {recipe.engram}, of which rows are "
            "read from the file: keep it on a fast disk (--engram chooses another type)"
        )
    if len(placed.cards) > 1 and machine.unified:
        notes.append(_boxes_note(len(placed.cards)))
    if disk:
        notes.append(_disk_note(placed, request))
    elif _is_tight(placed, machine):
        notes.append("memory is nearly full: close other programs")
    loss = loss_of(outline, request, recipe.scheme, cost.level.solver)
    return Candidate(
        "llama.cpp", recipe, recipe.scheme, file.trunk + file.tables,
        Where(placed.cards, placed.ram, placed.disk), min(context, longest_context(outline)),
        with_dense(loss, recipe.dense), cost, 1 / placed.seconds,
        (*placed.options, f"--ctx-size {request.context}", "--jinja"), placed.before, tuple(notes),
        others=other_ways(
            outline, request, recipe.scheme, file.trunk + file.tables, cost, recipe.dense
        ),
        files=_file_count(file, recipe), dense=recipe.dense,
        tight=not disk and _is_tight(placed, machine),
    )  # fmt: skip


def _boxes_note(boxes: int) -> str:
    return (
        f"over {boxes} boxes by llama.cpp's RPC, which trusts everybody in the network: give it a "
        "private one, and write each box's address for box2 and so on; one box after the other "
        "computes its layers, so they are no faster than one"
    )


def _disk_note(placed: llama_cpp.Placement, request: Request) -> str:
    return (
        f"memory ends before the file does: {placed.disk / 1e9:.0f} GB of experts stay on the "
        "disk, and almost every token waits for some of them. The speed above assumes a disk of "
        f"{request.machine.disk_bandwidth / 1e9:.0f} GB/s and experts used evenly; below stands "
        "what would hold the smallest file"
    )


def _dense_note(dense: str) -> str:
    if dense == _DENSE[0]:
        return f"dense matrices in {dense}, which holds FP8 to 8 bits"
    return (
        f"dense matrices, embedding and head in {dense}: {_DENSE[0]} leaves no room for these "
        "experts"
    )


def _file_count(file: Footprint, recipe: Recipe) -> int:
    """How many GGUF files the model is divided into; Engram tables are the last."""
    vocabulary = file.embed + file.head + file.other
    sizes = [vocabulary, *(layer.experts + layer.rest for layer in file.layers)]
    return len(packed(sizes, recipe.split_bytes)) + bool(file.tables)


def _mixed_candidate(
    outline: Outline,
    request: Request,
    files: Sequence[tuple[Recipe, Footprint]],
    largest: Candidate,
) -> Candidate | None:
    """A recipe of two schemes that fills the room between the largest file that fits and the next.

    None where that is exact already or the next is hardly larger.
    """
    schemes = [recipe.scheme for recipe, _ in files]
    at = schemes.index(largest.scheme)
    if at == 0 or largest.loss.basis == "exact":
        return None
    dims, machine, context = outline.dimensions, request.machine, request.context
    found = mixture(
        files[at][1],
        files[at - 1][1],
        lambda file: llama_cpp.place(file, machine, dims, context) is not None,
    )
    if found is None:
        return None
    share, file = found
    made = _gguf_candidate(outline, request, files[at][0], file, False)
    assert made is not None and made.cost is not None
    scheme = get_scheme(files[at][0].scheme)
    cost = cost_of(
        outline, scheme, made.size, request.effort, request.cores, exact=False, any_type=True
    )
    cost = with_tables(cost, file.tables)
    next_up = with_dense(
        loss_of(outline, request, schemes[at - 1], cost.level.solver), files[at][0].dense
    )
    loss = mixed_loss(largest.loss, next_up, share)
    return replace(
        made, recipe=None, scheme=f"{schemes[at - 1]} and {largest.scheme}, chosen by layer",
        loss=loss, cost=cost, others=scaled(made.others, largest.loss, loss),
        budget=int(_MIX_RESERVE * file.trunk) + file.tables, engram=files[at][0].engram,
    )  # fmt: skip


def _is_tight(placed: llama_cpp.Placement, machine: Machine) -> bool:
    if machine.unified:
        assert machine.card is not None
        room = llama_cpp.memory_room(machine.card.nbytes)
        return max(placed.cards) > (1 - _TIGHT) * room
    return placed.ram > (1 - _TIGHT) * llama_cpp.memory_room(machine.ram)


def _llama_remedy(outline: Outline, request: Request, smallest: Footprint) -> str:
    """The least memory, or the fewest cards, with which the smallest file fits."""
    machine, dims = request.machine, outline.dimensions
    text = f"llama.cpp: the smallest file, {smallest.trunk / 1e9:.0f} GB, needs"
    ways = []
    if machine.unified:
        assert machine.card is not None
        for gib in _UNIFIED_SIZES:
            larger = replace(machine, card=replace(machine.card, nbytes=gib * GIB))
            if llama_cpp.place(smallest, larger, dims, request.context):
                each = "each" if machine.count > 1 else "of unified memory"
                ways.append(f"such a machine with {gib} GB {each}")
                break
    for gib in _RAM_SIZES if not machine.unified else ():
        more = replace(machine, ram=gib * GIB)
        if more.ram > machine.ram and llama_cpp.place(smallest, more, dims, request.context):
            ways.append(f"{gib} GB of memory beside these cards" if machine.card else f"{gib} GB")
            break
    for count in range(machine.count + 1, 17) if machine.card is not None else ():
        if llama_cpp.place(smallest, replace(machine, count=count), dims, request.context):
            assert machine.card is not None
            ways.append(f"{count} x {machine.card.title}")
            break
    return f"{text} {' or '.join(ways) or 'more than any machine in the table'}"
