"""allocation: a scheme for every layer and projection, within a number of bytes.

What a place costs in each scheme is read from whole plans, one for each scheme, so files come out
as long as promised, headers and all. What it loses is told in sensitivity.py, and which choices
lose least together in calibration/allocate.py. The result is a recipe: a TOML file that a person
can read and change, and that `quantize --recipe` takes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from v4quant import __version__
from v4quant.allocation.knapsack import BudgetError, Choice, allocate, fullest
from v4quant.allocation.sensitivity import Sample, errors, measure_kl
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
    read_places,
    write_places,
)
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.layouts.choices import NEUTRAL
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress, SilentProgress
from v4quant_kernels.scheme import get_scheme

_FILLED = 0.995  # of the budget is as good as all
_MOST_ROUNDS = 4  # of correction, should headers of split files differ

"""What a choice of dense type says when there shall be one for every stage, embedding and head; or
one for the compressors' and hyper-connections' matrices too, which else stay as they are."""

_CODED = (*EXPERTS, LAYER)  # groups of routed experts
_TAKING_PART = {AUTO: ("dense", *WHOLE), ALL: ("dense", *WHOLE, "compressor", "hyper")}


class NothingMeasured(V4QuantError):
    """A choice that needs measured effects, without."""


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
class Allocation:
    """A recipe and what is known of it.

    chosen: the scheme of every place, layers' experts as one where the format asks that.
    losses: predicted loss of every place in it; nats where effects were measured.
    nbytes: exact size of the output's model files; smallest, largest: of any that could be chosen.
    fullest: the most bytes within the budget that any choices would take, whatever they lose.
    """

    recipe: Recipe
    chosen: Mapping[Place, str]
    budget: int
    nbytes: int
    smallest: int
    largest: int
    fullest: int
    weights: int
    losses: Mapping[Place, float]
    measured: bool

    @property
    def room_left(self) -> str:
        """Why more than half a percent of the budget is not taken; "" where it is."""
        if not sum(self.losses.values()):
            return "every place is exact; more bytes would change nothing"
        if self.nbytes >= _FILLED * self.budget:
            return ""
        if self.fullest >= _FILLED * self.budget:
            return f"choices that fill it, up to {self.fullest:,} bytes, would lose more"
        return (
            f"the schemes' steps are coarse here: no choice fills more than {self.fullest:,} bytes"
        )

    @property
    def bits_per_weight(self) -> float:
        """Of the whole output, over all its parameters."""
        return 8 * self.nbytes / self.weights


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


def find_costs(checkpoint: Checkpoint, options: Options) -> Costs:
    """Plan the output once for every scheme. Raises UnsupportedPair for formats that cannot mix."""
    recipe = _base_recipe(options)
    base = make_plan(checkpoint, recipe)
    own_bytes = _place_bytes(base)
    groups = (*_CODED, *_TAKING_PART.get(options.dense, ()))
    experts = _expert_menu(base, options.parts)
    menus = {
        place: experts if place[1] in _CODED else _menu(recipe, place)
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
    if options.dense in _TAKING_PART and not probe.layout.dense_types:
        raise RecipeError(
            f"dense = '{options.dense}' has no effect in {options.format}: dense matrices are as "
            "the format has them"
        )
    dense = "" if options.dense in _TAKING_PART else options.dense
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


def allocate_recipe(
    checkpoint: Checkpoint,
    costs: Costs,
    budget: int,
    options: Options = Options(),
    stats: Stats | None = None,
    corpus: Corpus | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """The recipe of least predicted loss whose output has at most `budget` bytes.

    corpus: text to measure effects on; without, all layers count alike.
    Raises BudgetError naming the smallest possible size, NothingMeasured, and what reading raises.
    """
    progress = progress or SilentProgress()
    if options.dense in _TAKING_PART and corpus is None:
        raise NothingMeasured(
            f"dense = '{options.dense}' weighs dense matrices against experts, which only a "
            "measured effect can; give --measure-kl, or one type for all dense matrices"
        )
    smallest = costs.fixed + sum(min(c.values()) for c in costs.places.values())
    if budget < smallest:
        dense = "; --dense q8_0 or less lowers it" if _holds_bf16(options, costs) else ""
        raise BudgetError(
            f"a budget of {budget:,} bytes is below the smallest possible of these choices, "
            f"{smallest:,} ({8 * smallest / costs.weights:.3f} bits per weight){dense}"
        )
    shapes = {s.module: s.shape for u in costs.base.units for s in u.sources}
    wanted = {place: _distinct(sizes) for place, sizes in costs.places.items()}
    found = errors(checkpoint, shapes, wanted, stats, options.sample, progress)
    effects = dict.fromkeys(found, 1.0)
    if corpus is not None:
        effects = measure_kl(checkpoint, found, corpus, stats, progress)
    losses = {p: {s: effects[p] * e for s, e in found[p].items()} for p in found}
    recipe, nbytes = _fit(costs, losses, budget)
    most = costs.fixed + fullest(list(_menus(costs, losses).values()), budget - costs.fixed)
    chosen = _chosen(recipe.schemes, costs)
    return Allocation(
        recipe,
        chosen,
        budget,
        nbytes,
        smallest,
        costs.fixed + sum(max(c.values()) for c in costs.places.values()),
        most,
        costs.weights,
        {p: losses[p][chosen[p]] for p in chosen},
        corpus is not None,
    )


def _holds_bf16(options: Options, costs: Costs) -> bool:
    """Whether dense matrices are BF16 where they need not be."""
    return bool(costs.base.recipe.layout.dense_types) and options.dense in ("", "bf16")


def _distinct(sizes: Mapping[str, int]) -> list[str]:
    """Schemes by size; of those that rows turn into the same type, the first."""
    kept: dict[int, str] = {}
    for scheme, nbytes in sizes.items():
        kept.setdefault(nbytes, scheme)
    return [kept[nbytes] for nbytes in sorted(kept)]


def _fit(
    costs: Costs, losses: Mapping[Place, Mapping[str, float]], budget: int
) -> tuple[Recipe, int]:
    """The best recipe that fits, checked against its own plan."""
    menus = _menus(costs, losses)
    room = budget - costs.fixed
    for _ in range(_MOST_ROUNDS):
        picked = allocate(list(menus.values()), room)
        chosen = {p: list(losses[p])[i] for p, i in zip(menus, picked, strict=True)}
        recipe = _recipe(costs, chosen)
        nbytes = make_plan(costs.base.checkpoint, recipe).bytes_out
        if nbytes <= budget:
            return recipe, nbytes
        room -= nbytes - budget
    raise BudgetError(f"no recipe of at most {budget:,} bytes was found; give a little more")


def _menus(costs: Costs, losses: Mapping[Place, Mapping[str, float]]) -> dict[Place, list[Choice]]:
    """What each place may become; nothing larger than what is exact."""
    return {
        place: [Choice(costs.places[place][s], loss) for s, loss in own.items()]
        for place, own in losses.items()
    }


def _recipe(costs: Costs, chosen: Mapping[Place, str]) -> Recipe:
    weight: Counter[str] = Counter()
    for place, scheme in chosen.items():
        if place[1] in _CODED:
            weight[scheme] += costs.places[place][scheme]
    # llama.cpp's name for the whole file is that of the scheme most bytes have.
    main = weight.most_common(1)[0][0]
    return replace(costs.base.recipe, scheme=main, schemes=tuple(write_places(chosen)))


def _chosen(schemes: Iterable[tuple[str, str]], costs: Costs) -> dict[Place, str]:
    """What lines of [schemes] say of the places that are chosen as one."""
    own = read_places(schemes)
    return {p if p in costs.places else layer_of(p): scheme for p, scheme in own.items()}


def recipe_toml(allocation: Allocation, costs: Costs) -> str:
    """The recipe as a file, with what was predicted beside each line."""
    recipe, unit = allocation.recipe, "nats of KL" if allocation.measured else "relative noise"
    lines = [
        f"# Chosen by v4quant {__version__} for at most {allocation.budget:,} bytes:",
        f"# it has {allocation.nbytes:,}, {allocation.bits_per_weight:.3f} bits per weight.",
        f"# Any of these choices would have {allocation.smallest:,} to {allocation.largest:,}.",
        "# Lines may be changed: `quantize SOURCE OUT --recipe THIS --dry-run` tells the size.",
        f'scheme = "{recipe.scheme}"  # where no line below says otherwise',
        f'format = "{recipe.format}"',
        f'draft = "{recipe.draft}"',
    ]
    lines += [f'engine = "{recipe.engine}"'] if recipe.engine != NEUTRAL else []
    lines += [f'dense = "{recipe.dense}"'] if recipe.dense else []
    lines += [f'engram = "{recipe.engram}"'] if recipe.engram else []
    lines += [f'split_size = "{recipe.split_size}"'] if recipe.split_size else []
    lines += ["", f"[schemes]  # place = scheme  # bytes, predicted loss ({unit})"]
    for key, scheme in recipe.schemes:
        members = _chosen([(key, scheme)], costs)
        nbytes = sum(costs.places[p][scheme] for p in members)
        loss = sum(allocation.losses[p] for p in members)
        lines.append(f'"{key}" = "{scheme}"  # {nbytes:,} B, {loss:.3g}')
    return "\n".join(lines) + "\n"
