"""What a plan is made of: a request, and candidates that say what they are and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from v4quant.planner.choices import ENGINE_NAMES, Effort, EngineName
from v4quant.planner.effort import Cost, cost_of
from v4quant.planner.footprint import Footprint, LayerBytes, Outline
from v4quant.planner.loss import KnownLoss, Measured, known_loss, with_dense
from v4quant.planner.machines import Machine
from v4quant.recipe import Recipe
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.scheme import SCHEMES, get_scheme

# Below this share of the room between two schemes a mixture of both is not worth a recipe.
_WORTH_MIXING = 0.15


class PlanError(V4QuantError):
    """A request that no plan can answer."""


@dataclass(frozen=True)
class Where:
    """Bytes by place: on each card (weights, cache, buffers), in system memory, read from disk."""

    cards: tuple[int, ...]
    memory: int
    disk: int


@dataclass(frozen=True)
class Way:
    """Another way to make the same file: the effort to ask for, its hours, the loss."""

    effort: Effort
    hours: float
    kl: float | None


@dataclass(frozen=True)
class Candidate:
    """One way to serve the model on the machine.

    recipe: what to convert to; None for the release as it is, and where `budget` is given: bytes
    that `allocate` may fill with a mixture. scheme: in words. size: bytes of the model's files.
    context: tokens of one sequence that fit at most. tokens_per_second: an upper bound, from the
    bytes that one token's products read. options: of the engine's server, each `--name value`
    unquoted. before: commands to give first. notes: what else one should know. engram, dense: types
    of V4.1's tables and of dense matrices, for `allocate`. others: what more and less effort takes
    and loses, the longest first. files: GGUF files of the model. tight: whether memory is nearly
    full. sglang: options of SGLang's server, where it serves the same files. sequences: how many
    of the asked context fit.
    """

    engine: EngineName
    recipe: Recipe | None
    scheme: str
    size: int
    where: Where
    context: int
    loss: KnownLoss
    cost: Cost | None
    tokens_per_second: float
    options: tuple[str, ...]
    before: tuple[str, ...]
    notes: tuple[str, ...]
    budget: int = 0
    engram: str = ""
    others: tuple[Way, ...] = ()
    files: int = 1
    dense: str = ""
    tight: bool = False
    sglang: tuple[str, ...] = ()
    sequences: int = 1

    @property
    def quicker(self) -> tuple[Way, ...]:
        """What less effort takes and loses, the longest first."""
        return tuple(w for w in self.others if self.cost is None or w.hours < self.cost.hours)

    @property
    def better(self) -> tuple[Way, ...]:
        """What more effort takes and loses, the longest first, where it is known to lose less."""
        return tuple(w for w in self.others if w not in self.quicker and self._gains(w))

    def _gains(self, way: Way) -> bool:
        return way.kl is None or self.loss.kl is None or way.kl < self.loss.kl

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "engine": self.engine,
            "recipe": None if self.recipe is None else self.recipe.as_dict(),
            "scheme": self.scheme,
            "budget": self.budget or None,
            "bytes": self.size,
            "where": asdict(self.where),
            "context": self.context,
            "sequences": self.sequences,
            "loss": asdict(self.loss),
            "hours": None if self.cost is None else self.cost.hours,
            "disk_bytes": None if self.cost is None else self.cost.disk,
            "quicker": [asdict(way) for way in self.quicker],
            "better": [asdict(way) for way in self.better],
            "solver": None if self.cost is None else self.cost.level.solver,
            "tokens_per_second_at_most": self.tokens_per_second,
            "options": list(self.options),
            "before": list(self.before),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Request:
    """What is asked: see the command line for the meaning of each part.

    cores: of the machine that converts. measured: rows of this very model. engines: to consider.
    """

    machine: Machine
    context: int
    effort: Effort
    cores: int
    engines: tuple[EngineName, ...] = ENGINE_NAMES
    measured: tuple[Measured, ...] = ()


def is_flash(outline: Outline) -> bool:
    dims = outline.dimensions
    return (dims.hidden_size, dims.num_hidden_layers) == (4096, 43) and dims.v41 is None


def has_fp4(outline: Outline) -> bool:
    return any(s.dtype == "I8" and ".ffn.experts." in s.name for s in outline.thin.tensors.values())


def is_exact(outline: Outline, scheme: str) -> bool:
    if has_fp4(outline):
        return SCHEMES[scheme].may_hold_mxfp4
    return scheme in ("fp8", "bf16")


def proof_notes(outline: Outline, scheme: str) -> tuple[str, ...]:
    kind = SCHEMES[scheme]
    if has_fp4(outline) and kind.may_hold_mxfp4 and not kind.holds_mxfp4:
        return ("exact where every block's scales allow it: --on-inexact refuse proves it",)
    return ()


def loss_of(outline: Outline, request: Request, scheme: str, solver: str) -> KnownLoss:
    exact = is_exact(outline, scheme)
    return known_loss(scheme, solver, exact, request.measured, is_flash(outline))


def other_ways(
    outline: Outline, request: Request, scheme: str, nbytes: int, cost: Cost, dense: str = ""
) -> tuple[Way, ...]:
    """What more or less effort than `cost` is for takes and loses, the longest first."""
    efforts: tuple[Effort, ...] = ("best", "hours", "minutes")
    ways = dict[str, Way]()  # by solver: hours may allow no more than minutes do
    for effort in efforts if cost.level.tokens or cost.level.expert_seconds else ():
        other = cost_of(outline, get_scheme(scheme), nbytes, effort, request.cores, exact=False)
        solver = other.level.solver
        if solver != cost.level.solver:
            kl = with_dense(loss_of(outline, request, scheme, solver), dense).kl
            ways[solver] = Way(effort, other.hours, kl)
    return tuple(ways.values())


def scaled(ways: Sequence[Way], before: KnownLoss, after: KnownLoss) -> tuple[Way, ...]:
    """The same ways for a mixture, whose loss is `after` where one of its schemes has `before`."""
    if not before.kl or after.kl is None:
        return ()
    factor = after.kl / before.kl
    return tuple(replace(way, kl=None if way.kl is None else way.kl * factor) for way in ways)


def longest_context(outline: Outline) -> int:
    text = outline.config.get("text_config", outline.config)
    longest = text.get("max_position_embeddings", 2**20) if isinstance(text, Mapping) else 2**20
    return int(longest)


def mixture(
    lower: Footprint, upper: Footprint, fits: Callable[[Footprint], bool]
) -> tuple[float, Footprint] | None:
    """(share, footprint): as much of `upper`'s experts as still fits, the rest as in `lower`.

    lower fits and upper does not. None where hardly more than `lower` fits.
    """
    share = largest_share(lower, upper, fits, halvings=8)
    return (share, blended(lower, upper, share)) if share >= _WORTH_MIXING else None


def largest_share(
    lower: Footprint, upper: Footprint, fits: Callable[[Footprint], bool], halvings: int
) -> float:
    """How much of `upper`'s experts fits, to 2^-halvings; `lower` fits and `upper` does not."""
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(blended(lower, upper, middle)) else (low, middle)
    return low


def blended(lower: Footprint, upper: Footprint, share: float) -> Footprint:
    """A file between two: `share` of the experts' bytes of `upper`, the rest as in `lower`."""

    def of(a: int, b: int) -> int:
        return int(a + share * (b - a))

    layers = (
        LayerBytes(of(x.experts, y.experts), x.rest)
        for x, y in zip(lower.layers, upper.layers, strict=True)
    )
    return replace(
        lower, layers=tuple(layers), drafts=of(lower.drafts, upper.drafts),
        cut=of(lower.cut, upper.cut), cut_drafts=of(lower.cut_drafts, upper.cut_drafts),
    )  # fmt: skip


def mixed_loss(lower: KnownLoss, upper: KnownLoss, share: float) -> KnownLoss:
    """Between two losses: in proportion where one is none, else their logarithms."""
    if lower.kl is None or upper.kl is None:
        return KnownLoss("unknown", None)
    if upper.kl <= 0:
        return KnownLoss("estimate", lower.kl * (1 - share))
    low, high = math.log(lower.kl), math.log(upper.kl)
    return KnownLoss("estimate", math.exp(low + share * (high - low)))
