"""WorkFolders: the layers and projections a recipe may give a scheme of their own.

A recipe's table `[schemes]` maps places to schemes:

    [schemes]
    "layers.0-5.down" = "mxfp4"
    "layers.6.gate_up" = "q2_k"
    "layers.0-5.dense" = "q6_k"
    "head" = "q6_k"

A place is a stage, or a range of them, and a group: `gate_up` (w1 and w3, which engines fuse),
`down` (w2), `experts` (short for both), `dense` (the stage's linear matrices that are not routed
expert's), and two that stay as the source has them unless a recipe names them: `compressor` (the
projections of compressor and indexer that the release keeps in BF16) and `hyper` (the matrices of
the hyper-connections, in float32). `embed` and `head` are places too, of no stage. Finer does not
exist in the files: GGUF stacks all experts of a layer and projection in one tensor, of one type. No
place may be named twice, so that the order of lines means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

from v4quant_formats.deepseek_v4 import TensorName
from v4quant_kernels.errors import V4QuantError

EXPERTS = ("gate_up", "down")
GROUPS = (*EXPERTS, "dense", "compressor", "hyper")
LAYER = "experts"
"""Short for both of EXPERTS, and the group of places whose experts are chosen as one."""
WHOLE = ("embed", "head")
AUTO, ALL = "auto", "all"
"""Of `allocate --dense`: dense matrices take part, and everything that can be re-encoded."""
AS_STORED = {"compressor": "bf16", "hyper": "f32", "embed": "bf16", "head": "bf16"}
"""What a place that is only re-encoded on demand is stored as otherwise."""

_GROUP_OF = {"w1": "gate_up", "w3": "gate_up", "w2": "down"}
_KEY = re.compile(r"(layers|mtp)\.(\d{1,4})(?:-(\d{1,4}))?\.(" + "|".join((*GROUPS, LAYER)) + ")")
_BELOW = {
    "compressor": re.compile(r"attn\.((indexer\.)?compressor\.(wkv|wgate)|indexer\.weights_proj)"),
    "hyper": re.compile(r"hc_(attn|ffn)_fn"),
}

Place = tuple[str, str]
"""(stage, group): ("layers.3", "down"), ("", "head")."""


class PlaceError(V4QuantError):
    """A place that cannot be read, is named twice, or does not exist."""


def group_of(projection: str) -> str:
    """`gate_up` for w1 and w3, `down` for w2."""
    return _GROUP_OF[projection]


def read_places(schemes: Iterable[tuple[str, str]]) -> dict[Place, str]:
    """Place -> scheme, ranges written out. Raises PlaceError naming the key."""
    found: dict[Place, str] = {}
    for key, scheme in schemes:
        if key in WHOLE and ("", key) not in found:
            found["", key] = scheme
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise PlaceError(
                f"recipe: [schemes] '{key}' is not a place; write it like 'layers.3.down', "
                "'layers.0-5.gate_up', 'mtp.0.dense' or 'head'"
            )
        first = int(match[2])
        last = int(match[3]) if match[3] else first
        if last < first:
            raise PlaceError(f"recipe: [schemes] '{key}' is an empty range")
        for number in range(first, last + 1):
            stage = f"{match[1]}.{number}"
            for place in _meant(stage, match[4]):
                if place in found:
                    raise PlaceError(f"recipe: [schemes] '{key}' names {'.'.join(place)} again")
                found[place] = scheme
    return found


def _meant(stage: str, group: str) -> list[Place]:
    return [(stage, g) for g in (EXPERTS if group == LAYER else (group,))]


def layer_of(place: Place) -> Place:
    """The place of a layer's experts chosen as one; other places are their own."""
    return (place[0], LAYER) if place[1] in EXPERTS else place


def place_among(name: TensorName | None, places: Container[Place]) -> Place | None:
    """Which of `places` a tensor belongs to: its own, or that of its layer's experts."""
    own = place_of(name)
    candidates = () if own is None else (own, layer_of(own))
    return next((place for place in candidates if place in places), None)


def place_of(name: TensorName | None) -> Place | None:
    """The place a tensor belongs to; None for those whose scheme is not chosen by place."""
    if name is None:
        return None
    if not name.stage:
        return ("", name.module) if name.module in WHOLE else None
    if name.projection is not None:
        return name.stage, group_of(name.projection)
    if name.is_linear:
        return name.stage, "dense"
    below = name.module.removeprefix(f"{name.stage}.")
    for group, pattern in _BELOW.items():
        if pattern.fullmatch(below):
            return name.stage, group
    return None


def places_of(names: Iterable[TensorName | None], drafts: bool) -> set[Place]:
    """The places of a checkpoint's tensors, those of draft stages only where `drafts`."""
    kept = (n for n in names if n is not None and (drafts or not n.is_draft))
    return {place for n in kept if (place := place_of(n))}


def place_name(place: Place) -> str:
    """A place as a recipe names it."""
    return ".".join(filter(None, place))


def check_places(wanted: Iterable[Place], present: Iterable[Place]) -> None:
    """Every wanted place is there. Raises PlaceError."""
    there = set(present)
    for stage, group in wanted:
        if (stage, group) not in there:
            stages = sorted({s for s, g in there if g == group}, key=_order)
            name = place_name((stage, group))
            raise PlaceError(
                f"recipe: [schemes] names '{name}', which is not in the output; "
                f"stages with {group} are {', '.join(stages) or 'none'}"
            )


def write_places(schemes: Mapping[Place, str]) -> list[tuple[str, str]]:
    """What `read_places` reads as these, with neighbours of one scheme joined into ranges."""
    lines: list[tuple[str, str]] = []
    for group in (LAYER, *GROUPS):
        run: list[tuple[str, int, str]] = []  # (kind, number, scheme)
        members = sorted((p for p in schemes if p[1] == group), key=lambda p: _order(p[0]))
        for stage, _ in members:
            kind, number = _order(stage)
            here = (kind, number, schemes[stage, group])
            if run and run[-1] != (kind, number - 1, here[2]):
                lines.append(_line(run, group))
                run = []
            run.append(here)
        if run:
            lines.append(_line(run, group))
    return lines + [(part, schemes["", part]) for part in WHOLE if ("", part) in schemes]


def _line(run: list[tuple[str, int, str]], group: str) -> tuple[str, str]:
    (kind, first, scheme), (_, last, _) = run[0], run[-1]
    numbers = str(first) if first == last else f"{first}-{last}"
    return f"{kind}.{numbers}.{group}", scheme


def _order(stage: str) -> tuple[str, int]:
    kind, _, number = stage.partition(".")
    return kind, int(number)
