"""costs: what every place of a model may become, and the bytes of each.

Bytes are read from whole plans, one for each scheme, so files come out as long as promised, headers
and all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from v4quant.allocation.sensitivity import Sample
from v4quant.conversion.plan import Plan, make_plan
from v4quant.recipe import Recipe, RecipeError
from v4quant.targets import (
    ALL,
    AS_STORED,
    AUTO,
    EXPERTS,
    LAYER,
    WHOLE,
    Place,
    layer_of,
    place_of,
    write_places,
)
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.layouts.choices import NEUTRAL
from v4quant_kernels.scheme import get_scheme

CODED = (*EXPERTS, LAYER)
"""Groups of routed experts."""

TAKING_PART = {AUTO: ("dense", *WHOLE), ALL: ("dense", *WHOLE, "compressor", "hyper")}
"""What a choice of dense type says when there shall be one for every stage, embedding and head; or
one for the compressors' and hyper-connections' matrices too, which else stay as they are."""


@dataclass(frozen=True)
class Options:
    """What may be chosen, and from what.

    engine: as in a recipe; with vllm, layers of compressed-tensors may differ.
    dense: the dense matrices' type, or "auto" or "all" to choose for what these take part.
    draft, split_size: as in a recipe. sample: what errors are measured on.
    parts: into how many an engine cuts rows of w2, so that schemes' groups must fit a part's.
    engram: as in a recipe.
    """

    format: str = "gguf"
    engine: str = NEUTRAL
    dense: str = ""
    draft: str = "convert"
    split_size: str = ""
    sample: Sample = Sample()  # noqa: RUF009  (frozen)
    parts: int = 1
    engram: str = ""


@dataclass(frozen=True)
class Costs:
    """Bytes of every place in every scheme it may have, and of all else."""

    base: Plan
    places: Mapping[Place, Mapping[str, int]]
    fixed: int

    @property
    def weights(self) -> int:
        """Parameters of the output."""
        units = (u for u in self.base.units if not u.again)
        return sum(math.prod(s.shape) for u in units for s in u.sources)

    @property
    def smallest(self) -> int:
        """Bytes of the output with every place in its smallest scheme."""
        return self.fixed + sum(min(sizes.values()) for sizes in self.places.values())

    @property
    def largest(self) -> int:
        """The same of the largest."""
        return self.fixed + sum(max(sizes.values()) for sizes in self.places.values())


def find_costs(checkpoint: Checkpoint, options: Options) -> Costs:
    """Plan the output once for every scheme. Raises UnsupportedPair for formats that cannot mix."""
    recipe = _base_recipe(options)
    base = make_plan(checkpoint, recipe)
    own_bytes = _place_bytes(base)
    groups = (*CODED, *TAKING_PART.get(options.dense, ()))
    experts = _expert_menu(base, options.parts)
    menus = {
        place: experts if place[1] in CODED else _menu(recipe, place)
        for place in own_bytes
        if place[1] in groups
    }
    costs: dict[Place, dict[str, int]] = {place: {} for place in menus}
    for index in range(max(map(len, menus.values()))):
        schemes = {place: menu[min(index, len(menu) - 1)] for place, menu in menus.items()}
        plan = make_plan(checkpoint, replace(recipe, schemes=tuple(write_places(schemes))))
        found = _place_bytes(plan)
        for place, scheme in schemes.items():
            costs[place][scheme] = found[place]
    return Costs(base, costs, base.bytes_out - sum(own_bytes[p] for p in costs))


def _expert_menu(base: Plan, parts: int) -> tuple[str, ...]:
    """The layout's schemes whose groups all experts' rows, or parts of them, are made of."""
    experts = [u for u in base.units if u.action == "experts"]
    widths = {
        stored.shape[1] // (parts if stored.module.endswith(".w2") else 1)
        for unit in experts
        for stored in unit.sources
    }
    found = tuple(
        name
        for name in base.recipe.layout.schemes
        if all(get_scheme(name).fitting(columns) for columns in widths)
    )
    if not found:
        raise UnsupportedPair(
            f"no scheme of {base.recipe.format} has groups that experts' rows of "
            f"{', '.join(map(str, sorted(widths)))} channels are made of"
            + (f", with w2 cut into {parts}" if parts > 1 else "")
        )
    return found


def _menu(recipe: Recipe, place: Place) -> tuple[str, ...]:
    """What a dense place may become; as it is first, where that is an option."""
    types = [t for t in recipe.layout.dense_types if t != "bf16"]
    return (AS_STORED.get(place[1], "bf16"), *types)


def _base_recipe(options: Options) -> Recipe:
    probe = Recipe("mxfp4", options.format, engine=options.engine)
    if not probe.layout.mixes:
        raise UnsupportedPair(
            f"format '{options.format}' declares one scheme for all experts, so there is nothing "
            "to allocate; use --format gguf, or compressed-tensors with --engine vllm"
        )
    if options.dense in TAKING_PART and not probe.layout.dense_types:
        raise RecipeError(
            f"dense = '{options.dense}' has no effect in {options.format}: dense matrices are as "
            "the format has them"
        )
    dense = "" if options.dense in TAKING_PART else options.dense
    return replace(
        probe, dense=dense, engram=options.engram, draft=options.draft,
        split_size=options.split_size,
    )  # fmt: skip


def _place_bytes(plan: Plan) -> Counter[Place]:
    """Bytes of what is chosen as one: projections, or whole layers' experts."""
    by_layer = plan.recipe.layout.mixes == "layer"
    found: Counter[Place] = Counter()
    for shard in plan.shards:
        own: Counter[Place] = Counter()
        for spec in shard.outputs:
            if (place := place_of(parse_name(spec.name))) is not None:
                own[layer_of(place) if by_layer else place] += spec.nbytes
        found.update(own)
        # Integers are three tensors where MXFP4 is two: a file's header is its layer's.
        layers = [place for place in own if place[1] == LAYER]
        header = shard.nbytes - sum(spec.nbytes for spec in shard.outputs) if layers else 0
        found.update({place: header // len(layers) for place in layers})
    return found
