"""allocation: a scheme for every layer and projection, within a number of bytes.

What a place costs in each scheme is told in costs.py, what it loses in sensitivity.py, and which
choices lose least together in knapsack.py. Losses are found once and chosen from for as many
budgets as are wanted; a larger budget never loses more. The result is a recipe: a TOML file that a
person can read and change, and that `quantize --recipe` takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from v4quant import __version__
from v4quant.allocation.costs import CODED, TAKING_PART, Costs, Options
from v4quant.allocation.findings import Findings
from v4quant.allocation.knapsack import BudgetError, Choice, allocate, fullest
from v4quant.allocation.sensitivity import errors, held_as, measure_kl
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant.targets import Place, layer_of, place_among, read_places, write_places
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.layouts.choices import NEUTRAL
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress, SilentProgress

_FILLED = 0.995  # of the budget is as good as all
_MOST_ROUNDS = 4  # of correction, should headers of split files differ


class NothingMeasured(V4QuantError):
    """A choice that needs measured effects, without."""


@dataclass(frozen=True)
class Losses:
    """What every place would lose in the schemes it may have, by size.

    measured: whether in nats of KL divergence, else in relative noise of outputs.
    """

    places: Mapping[Place, Mapping[str, float]]
    measured: bool


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
    def needs_text(self) -> tuple[str, ...]:
        """Chosen schemes that `quantize` refuses without statistics of a text."""
        return tuple(self.recipe.asking_text("needed"))

    @property
    def bits_per_weight(self) -> float:
        """Of the whole output, over all its parameters."""
        return 8 * self.nbytes / self.weights


def find_losses(
    checkpoint: Checkpoint,
    costs: Costs,
    options: Options,
    stats: Stats | None = None,
    corpus: Corpus | None = None,
    progress: Progress | None = None,
    known: Findings | None = None,
) -> Losses:
    """What there is to choose from, whatever the budget.

    corpus: text to measure effects on; without, all layers count alike. known: what an earlier
    process measured; what is measured here is added.
    Raises NothingMeasured, and what reading and encoding raise.
    """
    progress = progress or SilentProgress()
    if options.dense in TAKING_PART and corpus is None:
        raise NothingMeasured(
            f"dense = '{options.dense}' weighs dense matrices against experts, which only a "
            "measured effect can; give --measure-kl, or one type for all dense matrices"
        )
    shapes = {s.module: s.shape for u in costs.base.units for s in u.sources}
    wanted = _distinct(costs, shapes)
    found = errors(checkpoint, shapes, wanted, stats, options.sample, progress, known)
    effects = dict.fromkeys(found, 1.0)
    if corpus is not None:
        effects = measure_kl(checkpoint, found, corpus, stats, progress, known)
    places = {p: {s: effects[p] * e for s, e in found[p].items()} for p in found}
    return Losses(places, corpus is not None)


def check_budget(costs: Costs, budget: int) -> None:
    """Raises BudgetError naming the smallest possible size where that is above the budget."""
    smallest = costs.smallest
    if budget < smallest:
        dense = "; --dense q8_0 or less lowers it" if _holds_bf16(costs) else ""
        raise BudgetError(
            f"a budget of {budget:,} bytes is below the smallest possible of these choices, "
            f"{smallest:,} ({8 * smallest / costs.weights:.3f} bits per weight){dense}"
        )


def choose(costs: Costs, losses: Losses, budget: int) -> Allocation:
    """The recipe of least predicted loss whose output has at most `budget` bytes.

    Raises BudgetError naming the smallest possible size.
    """
    check_budget(costs, budget)
    recipe, nbytes = _fit(costs, losses.places, budget)
    menus = list(_menus(costs, losses.places).values())
    chosen = _chosen(recipe.schemes, costs)
    return Allocation(
        recipe,
        chosen,
        budget,
        nbytes,
        costs.smallest,
        costs.largest,
        costs.fixed + fullest(menus, budget - costs.fixed),
        costs.weights,
        {p: losses.places[p][chosen[p]] for p in chosen},
        losses.measured,
    )


def _holds_bf16(costs: Costs) -> bool:
    """Whether dense matrices are BF16 where they need not be."""
    recipe = costs.base.recipe
    chosen = any(group == "dense" for _, group in costs.places)
    return bool(recipe.layout.dense_types) and recipe.dense in ("", "bf16") and not chosen


def _distinct(costs: Costs, shapes: Mapping[str, tuple[int, ...]]) -> dict[Place, list[str]]:
    """Each place's schemes by size; of those that its rows turn into the same type, the first."""
    widths: dict[Place, set[int]] = {place: set() for place in costs.places}
    for module, shape in shapes.items():
        place = place_among(parse_name(f"{module}.weight"), costs.places)
        if place is not None:
            widths[place].add(shape[-1])
    found = {}
    for place, sizes in costs.places.items():
        kept: dict[tuple[str, ...], str] = {}
        for scheme in sorted(sizes, key=lambda s: sizes[s]):
            kept.setdefault(tuple(held_as(scheme, w) for w in sorted(widths[place])), scheme)
        found[place] = list(kept.values())
    return found


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
        if place[1] in CODED:
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
    if allocation.needs_text:
        lines.insert(
            4, f"# {', '.join(allocation.needs_text)}: `v4quant calibrate SOURCE --recipe THIS "
            "--out solved` first,\n# then `quantize ... --stats solved`.",
        )  # fmt: skip
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
