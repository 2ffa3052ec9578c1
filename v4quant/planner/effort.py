"""How good the codes shall be, and what that takes: solvers, hours and disk.

    minutes   the exactly best scale of every group, without text where the type allows that
    hours     the best that is done within a day: GPTQ with refinement, or scales weighed by a text
    best      GPTQ with refinement and propagation, however long
    auto      the best of all these that is done within three days

Processor time of a Flash expert is measured (docs/calibration.md, `v4quant bench solver`). Of a
solver's, one part goes with the weights (choosing each code, which GGUF's block types and codebooks
make dearer) and one with matrix products, 2 N K^2; the tiny model and one of 1,024 channels tell
them apart. Forward passes are counted at 2 operations per weight in use and 50 GFLOP/s per core.
Held against whole runs in docs/costs.md. No GPU has been timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from v4quant.planner.choices import Effort
from v4quant.planner.footprint import Outline
from v4quant_formats.model_config import Dimensions
from v4quant_kernels.ggml_types import has_codebook
from v4quant_kernels.scheme import Scheme


@dataclass(frozen=True)
class Level:
    """A way to find codes: its name in quality.json, tokens of text, core-seconds a Flash expert.

    product_seconds: of those, in matrix products. words: for people. passes: models that stream
    through all the text. options: of `calibrate`. solves: whether `calibrate --solve` runs. A level
    that reads text and does not solve takes the text's statistics as weights.
    """

    solver: str
    words: str
    tokens: int
    expert_seconds: float
    passes: int
    options: tuple[str, ...] = ()
    solves: bool = False
    product_seconds: float = 0.0

    @property
    def weighs(self) -> bool:
        """Whether `calibrate` runs for statistics alone."""
        return self.tokens > 0 and not self.solves


_CAST = Level("optimal", "a cast", 0, 0.0, 0)
_PLAIN = Level("searched", "searched scales, no text", 0, 0.2, 0)
_WEIGHED = Level("optimal", "searched scales, weighed by a text", 32768, 0.2, 1)
_REFINED = Level("refined", "GPTQ, refined", 32768, 36.0, 1, ("--no-propagate",), True, 18.0)
_BEST = Level("propagated", "GPTQ, refined and propagated", 131072, 45.0, 2, (), True, 27.0)
# Best first, and the hours within which one must be done unless it is the last.
LEVELS: dict[Effort, tuple[tuple[Level, ...], float]] = {
    "minutes": ((_PLAIN,), math.inf),
    "hours": ((_REFINED, _WEIGHED, _PLAIN), 24.0),
    "best": ((_BEST,), math.inf),
    "auto": ((_BEST, _REFINED, _WEIGHED, _PLAIN), 72.0),
}

_FLASH_WORK = 2 * 2048 * 4096**2 + 4096 * 2048**2  # N K^2 of w1, w3 and w2
_FLASH_MATRIX = 2048 * 4096
# What choosing a code takes beside an integer's: the K-types, and points of a codebook (3.3 for
# iq2_xxs to 4.7 for iq3_xxs).
_BLOCK_FACTOR, _CODEBOOK_FACTOR = 2.0, 4.0
START_SECONDS = 3.0  # core-seconds of a command before its work
CORE_FLOPS = 50e9
# Core-seconds a GB of source: casts that keep the nibbles, and a search for scales.
_CAST_SECONDS, _SEARCH_SECONDS = 4.0, 12.0
# Core-seconds a Flash expert whose codes are searched in a codebook: 15 (iq2_xxs) to 47 (iq1_m);
# and one in another block type of GGUF: 1.5 (q3_k), 1.6 (q2_k).
_CODEBOOK_SECONDS, _BLOCK_SECONDS = 27.0, 1.5
_TABLE_SECONDS = 24.0  # core-seconds a GB of V4.1's Engram tables in q8_0 (docs/formats.md)
_DISK_BYTES_A_SECOND = 0.5e9


@dataclass(frozen=True)
class Cost:
    """Hours on `cores` cores for `level`, and the disk it needs in bytes, source included."""

    level: Level
    hours: float
    cores: int
    disk: int

    def sentence(self) -> str:
        """The same in words."""
        return f"{hours_text(self.hours)} on {self.cores} cores, {self.disk / 1e9:.0f} GB of disk"


def hours_with_text(outline: Outline, cost: Cost, tokens: int) -> float:
    """The hours of `cost` with so many tokens of text instead of its level's."""
    more = cost.level.passes * (tokens - cost.level.tokens)
    seconds = more * 2 * active_weights(outline.dimensions) / CORE_FLOPS / cost.cores
    return max(0.0, cost.hours + seconds / 3600)


def with_tables(cost: Cost, nbytes: int) -> Cost:
    """The cost with that of writing Engram tables of so many bytes."""
    return replace(cost, hours=cost.hours + nbytes / 1e9 * _TABLE_SECONDS / cost.cores / 3600)


def is_solved(scheme: Scheme) -> bool:
    """Whether error feedback chooses its codes better: integers and GGUF's block types."""
    return bool(scheme.coder)


def cost_of(
    outline: Outline,
    scheme: Scheme,
    output: int,
    effort: Effort,
    cores: int,
    exact: bool,
    any_type: bool = False,
) -> Cost:
    """What it costs to make `output` bytes of `scheme` with the best level that effort allows.

    any_type: `allocate` will choose among all types, so those that want a text may be there.
    """
    if exact or not is_solved(scheme):
        return cost_at(outline, scheme, output, _CAST, cores, exact)
    levels, limit = LEVELS[effort]
    if scheme.text or any_type:
        levels = tuple(_WEIGHED if level is _PLAIN else level for level in levels)
    costs = [cost_at(outline, scheme, output, level, cores, exact) for level in levels]
    within = [c for c in costs if c.hours <= limit]
    return within[0] if within else costs[-1]


def level_of(solves: bool, propagates: bool, reads_text: bool) -> Level:
    """The level at which a conversion with such steps is made."""
    if solves:
        return _BEST if propagates else _REFINED
    return _WEIGHED if reads_text else _PLAIN


def cost_at(
    outline: Outline, scheme: Scheme, output: int, level: Level, cores: int, exact: bool
) -> Cost:
    """What it costs to make `output` bytes of `scheme` at `level`."""
    dims = outline.dimensions
    convert = outline.nbytes / 1e9 * (_CAST_SECONDS if exact else _SEARCH_SECONDS)
    disk_seconds = (outline.nbytes + output) / _DISK_BYTES_A_SECOND
    seconds = max(convert / cores, disk_seconds)
    products = level.passes * level.tokens * 2 * active_weights(dims)
    seconds += products / CORE_FLOPS / cores
    seconds += START_SECONDS * (1 + bool(level.tokens))
    experts = dims.n_routed_experts * dims.num_hidden_layers
    if not scheme.block_bytes:  # in GGUF they are left out
        experts += outline.drafts * outline.draft_stages
    weights = dims.moe_intermediate_size * dims.hidden_size / _FLASH_MATRIX
    if scheme.block_bytes and not level.solves and not exact:
        search = _CODEBOOK_SECONDS if has_codebook(scheme.name) else _BLOCK_SECONDS
        seconds += experts * search * weights / cores
    if level.solves:
        choosing = (level.expert_seconds - level.product_seconds) * _factor(scheme) * weights
        work = 2 * dims.moe_intermediate_size * dims.hidden_size**2
        work += dims.hidden_size * dims.moe_intermediate_size**2
        seconds += experts * (choosing + level.product_seconds * work / _FLASH_WORK) / cores
    solution = output if level.solves else 0
    return Cost(level, seconds / 3600, cores, outline.nbytes + output + solution)


def _factor(scheme: Scheme) -> float:
    if has_codebook(scheme.name):
        return _CODEBOOK_FACTOR
    return _BLOCK_FACTOR if scheme.block_bytes else 1.0


def active_weights(dims: Dimensions) -> float:
    """Parameters one token's products use: its experts, and everything else but the embedding."""
    expert = 3 * dims.moe_intermediate_size * dims.hidden_size
    per_layer = (dims.num_experts_per_tok + 1) * expert + _attention_weights(dims)
    return float(dims.num_hidden_layers * per_layer + dims.vocab_size * dims.hidden_size)


def _attention_weights(dims: Dimensions) -> int:
    heads, out = dims.num_attention_heads * dims.head_dim, dims.o_groups * dims.o_lora_rank
    latents = dims.hidden_size * (dims.q_lora_rank + dims.head_dim)
    inner = dims.q_lora_rank * heads + out * heads // dims.o_groups
    return latents + inner + dims.hidden_size * out


def hours_text(hours: float) -> str:
    """`40 seconds`, `40 minutes`, `9 hours`, `6 days`."""
    if hours < 0.02:
        return f"{max(1, round(3600 * hours))} seconds"
    if hours < 1.5:
        return f"{max(1, round(60 * hours))} minutes"
    return f"{hours:.0f} hours" if hours < 60 else f"{hours / 24:.0f} days"
