"""card_budget: what vLLM's cards leave for weights, and where every byte of a card goes.

vLLM cuts a model over its cards by tensor parallelism, so a card holds 1/n of experts, heads and
vocabulary, and all of the rest (tensor_parallel.py); beside them the KV cache of the context,
buffers and what CUDA takes (engines/vllm_memory.py), within the share of the card that
`--gpu-memory-utilization` names. What remains is for the experts:

    room   = size * utilization - cache - buffers - runtime - whole tensors - share of the others
    budget = what is not chosen + cards * room

Every scheme's bytes are cut evenly, so a file of `budget` bytes fills each card to the last byte,
and the knapsack of allocation.py needs to know of bytes only.
"""

from __future__ import annotations

from dataclasses import dataclass

from v4quant.allocation.costs import Costs
from v4quant.allocation.knapsack import BudgetError
from v4quant.conversion.plan import Plan
from v4quant.planner import machines
from v4quant.targets import layer_of, place_of
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.engines.vllm_engram import table_places
from v4quant_formats.engines.vllm_memory import (
    Serving,
    buffer_bytes,
    kv_cache_bytes,
    runtime_estimate,
)
from v4quant_formats.engines.vllm_split import (
    is_split,
    possible_splits,
    split_refusals,
    tile_refusals,
)
from v4quant_formats.model_config import ModelConfig, parse_model_config

TABLES = "engram tables"


@dataclass(frozen=True)
class Cards:
    """Equal cards, and how vLLM is started on them."""

    size: int
    serving: Serving

    @property
    def usable(self) -> int:
        """Bytes of a card that vLLM may take."""
        return int(self.size * self.serving.utilization)


@dataclass(frozen=True)
class CardMemory:
    """Where the memory of one card goes, in bytes; `runtime` is an estimate, others are counted.

    split: its share of tensors that are cut; whole: those every card has. reserve: what vLLM leaves
    alone. free: what no scheme could fill. host: bytes of system memory that V4.1's Engram takes
    beside all cards.
    """

    size: int
    split: int
    whole: int
    kv_cache: int
    buffers: int
    runtime: int
    reserve: int
    host: int

    @property
    def free(self) -> int:
        """What remains."""
        return self.size - self.taken - self.reserve

    @property
    def taken(self) -> int:
        """Everything that vLLM takes."""
        return self.split + self.whole + self.kv_cache + self.buffers + self.runtime


def parse_cards(text: str) -> tuple[int, int]:
    """`4x24GB` -> (4, 24 GiB): sizes as sold or names, as in `plan`. Raises BudgetError."""
    try:
        machine = machines.parse_cards(text)
    except machines.MachineError as error:
        raise BudgetError(str(error)) from None
    if machine.card is None:
        raise BudgetError(f"'{text}' names no cards; write it like 4x24GB")
    return machine.count, machine.card.nbytes


def check_split(config: ModelConfig, serving: Serving) -> None:
    """Raises BudgetError where vLLM could not cut the model into so many parts."""
    problems = [*split_refusals(config, serving.gpus), *tile_refusals(config, serving.gpus)]
    if serving.expert_parallel:
        problems = [p for p in problems if not p.startswith("experts of width")]
        if config.n_routed_experts % serving.gpus:
            problems.append(f"{config.n_routed_experts} experts do not divide by {serving.gpus}")
    if problems:
        works = [n for n in possible_splits(config) if not any(tile_refusals(config, n))]
        raise BudgetError(
            f"vLLM cannot cut this model over {serving.gpus} cards: {problems[0]}; it can over "
            f"{', '.join(map(str, works))}"
        )


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The release's dimensions and constants. Raises ConfigError."""
    return parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))


def cards_bytes(costs: Costs, cards: Cards) -> int:
    """Bytes an output may have for `cards`. Raises BudgetError naming what a card would need."""
    serving, least = cards.serving, sum(min(c.values()) for c in costs.places.values())
    found = _memory(costs.base, cards, costs)
    room = cards.usable - found.taken
    if room * serving.gpus < least:
        experts = -(-least // serving.gpus)
        needed = found.taken + experts
        enough = -(-needed / serving.utilization // 1e8) * 1e8
        raise BudgetError(
            f"{serving.gpus} x {_gb(cards.size)} are too small: with the smallest choice each card "
            f"takes {_gb(needed)} (weights {_gb(experts + found.split + found.whole)}, KV cache "
            f"{_gb(found.kv_cache)}, buffers {_gb(found.buffers)}, CUDA "
            f"{_gb(found.runtime)}) and vLLM may use {_gb(cards.usable)}; cards of "
            f"{_gb(enough)} would do, or more of them, a shorter "
            f"--context or fewer --batched-tokens than {serving.batched_tokens}"
        )
    return costs.fixed + room * serving.gpus


def card_memory(plan: Plan, cards: Cards) -> CardMemory:
    """Where the memory of each card goes, for a planned output."""
    return _memory(plan, cards, None)


def _memory(plan: Plan, cards: Cards, without: Costs | None) -> CardMemory:
    """As card_memory; without what is chosen among, where `without` says what that is."""
    serving, config = cards.serving, model_config(plan.checkpoint)
    split = whole = 0
    stages = set()
    for shard in plan.shards:
        for spec in shard.outputs:
            name = parse_name(spec.name)
            if name is not None and name.is_draft:
                stages.add(name.stage)
            if name is not None and name.role == TABLES:
                continue
            place = place_of(name)
            if without is not None and place is not None and layer_of(place) in without.places:
                continue
            if name is not None and is_split(name):
                split += spec.nbytes
            else:
                whole += spec.nbytes
    return CardMemory(
        cards.size,
        -(-split // serving.gpus),
        whole,
        kv_cache_bytes(config, serving, len(stages)),
        buffer_bytes(config, serving, len(stages)),
        runtime_estimate(serving),
        cards.size - cards.usable,
        table_places(config, serving.gpus)[0].host,
    )


def table_bytes(plan: Plan) -> int:
    """Bytes of V4.1's Engram tables in an output, which no card holds."""
    names = ((spec, parse_name(spec.name)) for shard in plan.shards for spec in shard.outputs)
    return sum(spec.nbytes for spec, name in names if name is not None and name.role == TABLES)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
