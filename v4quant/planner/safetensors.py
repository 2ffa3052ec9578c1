"""Files that vLLM and SGLang load: the release itself, and conversions of it that are smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from v4quant.planner.candidates import (
    Request,
    Way,
    has_fp4,
    is_exact,
    loss_of,
    other_ways,
    proof_notes,
)
from v4quant.planner.effort import Cost, cost_of
from v4quant.planner.footprint import Footprint, Outline, footprint
from v4quant.planner.loss import KnownLoss
from v4quant.planner.machines import GIB, Machine
from v4quant.recipe import Recipe
from v4quant_formats.engines.engine import V4_ATTENTION, Engine, Release
from v4quant_formats.engines.vllm_split import share_refusal, split_refusals, tile_refusals
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.scheme import SCHEMES, Scheme, get_scheme

# A lossy file must be this much smaller than the exact release to be worth its loss.
_SMALLER = 0.97


def has_attention(machine: Machine) -> bool:
    """Whether vLLM and SGLang have attention kernels for DeepSeek-V4 on these cards."""
    return machine.generation in V4_ATTENTION


def no_attention(machine: Machine, engine: str) -> str:
    """Why an engine is not for these cards."""
    if machine.is_amd:
        return (
            f"{engine}: not examined on AMD's cards; a ROCm build may serve the release as it is, "
            "with nothing to convert: see its documents first"
        )
    return f"{engine}: attention kernels for DeepSeek-V4 exist on {', '.join(V4_ATTENTION)} only"


def parts_of(machine: Machine, config: ModelConfig) -> int:
    """The most of the cards that a model can be cut over; 0 for none."""
    return max(
        (
            n
            for n in (1 << i for i in range(8))
            if n <= machine.count
            and not any(split_refusals(config, n))
            and not any(tile_refusals(config, n))
        ),
        default=0,
    )


def cut(machine: Machine, config: ModelConfig, scheme: Scheme) -> tuple[int, str] | None:
    """The cards that a model is cut over, and why experts of `scheme` are dealt out whole there
    (empty: they are cut); None where neither can be."""
    parts = parts_of(machine, config)
    if not parts:
        return None
    uncut = share_refusal(config, parts, scheme)
    if uncut and config.n_routed_experts % parts:
        return None
    return parts, uncut


def needed(
    what: str,
    file: Footprint,
    machine: Machine,
    config: ModelConfig,
    size: int,
    host: int,
    holds: Callable[[Machine], bool],
) -> str:
    """What would serve `file`, the smallest there is, where this machine does not.

    what: the engine and the file, in words. size: bytes of a card that would do. host: of system
    memory for V4.1's tables. holds: whether such a machine does, with more of these cards.
    """
    larger = (replace(machine, count=n) for n in (2, 4, 8, 16) if n > machine.count)
    enough = next((one for one in larger if holds(one)), None)
    more = f", or {enough.count} of these" if enough is not None else ""
    beside = f", with {host / GIB:.0f} GB of memory free for the Engram's tables" if host else ""
    return (
        f"{what}, {file.trunk / 1e9:.0f} GB, needs cards of {size / GIB:.0f} GB, "
        f"{parts_of(machine, config)} of them{more}{beside}"
    )


@dataclass(frozen=True)
class Made:
    """What a file loses and costs; for the release itself nothing has to be made."""

    loss: KnownLoss
    cost: Cost | None
    notes: tuple[str, ...]
    others: tuple[Way, ...] = ()


def made_of(outline: Outline, request: Request, recipe: Recipe | None, file: Footprint) -> Made:
    """What making `file` by a recipe loses and costs; without one it is the release."""
    if recipe is None:
        told = "the release as it is: nothing to convert"
        return Made(KnownLoss("exact", 0.0, 1.0), None, (told,))
    scheme = recipe.scheme
    exact = is_exact(outline, scheme)
    cost = cost_of(outline, get_scheme(scheme), file.total, request.effort, request.cores, exact)
    return Made(
        loss_of(outline, request, scheme, cost.level.solver),
        cost,
        tuple(proof_notes(outline, scheme)),
        tuple(other_ways(outline, request, scheme, file.total, cost)),
    )


def files_for(
    outline: Outline, formats: Sequence[tuple[str, str]]
) -> list[tuple[Recipe | None, Footprint]]:
    """The release itself (no recipe), then every scheme smaller than it, the largest first.

    formats: containers, and the engine they are written for.
    """
    return sorted(_files(outline, formats), key=lambda entry: -entry[1].trunk)


def _files(
    outline: Outline, formats: Sequence[tuple[str, str]]
) -> Iterator[tuple[Recipe | None, Footprint]]:
    native = Recipe("mxfp4" if has_fp4(outline) else "fp8")
    release = footprint(outline, native)
    yield None, release
    for format_, engine in formats:
        for scheme in LAYOUTS[format_].schemes:
            if SCHEMES[scheme].bits_per_weight >= SCHEMES[native.scheme].bits_per_weight:
                continue
            try:
                recipe = Recipe(scheme, format=format_, engine=engine)
                file = footprint(outline, recipe)
            except V4QuantError:
                continue
            if file.trunk < _SMALLER * release.trunk:
                yield recipe, file


def scheme_of(outline: Outline, recipe: Recipe | None) -> str:
    """The experts' scheme; of the release itself where there is no recipe."""
    if recipe is not None:
        return recipe.scheme
    return "mxfp4" if has_fp4(outline) else "fp8"


def chat_options(engine: Engine, config: ModelConfig) -> tuple[str, ...]:
    """What an engine's server needs for chats."""
    release: Release = "v41" if config.v41 is not None else "v4"
    return engine.chat_options.get(release, ())
