"""Whether vLLM's cards hold a model, and with which options: its own exact rules.

The rules are `v4quant_formats/engines/vllm_memory.py` (KV cache, buffers, what CUDA takes),
`vllm_split.py` (what is cut over cards and what every card holds) and `vllm_engram.py` (V4.1's
tables, in the host's memory while they fit). Experts that cannot be cut by their width are dealt
out whole. Here they are asked for batches from vLLM's own default down, because large batches can
take more than the context does; what is left then is for more sequences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from v4quant.planner.footprint import Footprint
from v4quant.planner.llama_cpp import memory_room
from v4quant.planner.machines import Machine
from v4quant.planner.safetensors import cut, parts_of
from v4quant_formats.engines.vllm_engram import TablePlace, table_places
from v4quant_formats.engines.vllm_memory import (
    UTILIZATION,
    Serving,
    buffer_bytes,
    default_batch,
    kv_cache_bytes,
    runtime_estimate,
)
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.scheme import Scheme

_BATCHES = (8192, 4096, 2048, 1024, 512)
_SEQUENCES = (64, 32, 16, 8, 4, 2)
# Of a memory that the system needs too: vLLM refuses to start where less than its share is free.
_SHARED_UTILIZATION = 0.85
_STEP = 1024


@dataclass(frozen=True)
class Served:
    """How vLLM is started, what one card then holds, and the longest context that fits.

    Bytes are for one sequence; together: how many of that length there is room for at once.
    tables: where V4.1's Engram lies. uncut: why experts are dealt out whole, "" where they are cut.
    seconds: to read what one token needs; the cards read their shares at once.
    """

    serving: Serving
    weights: int
    kv_cache: int
    buffers: int
    runtime: int
    context_fits: int
    tables: TablePlace
    uncut: str
    seconds: float
    together: int = 1

    @property
    def taken(self) -> int:
        """Bytes of a card."""
        return self.weights + self.kv_cache + self.buffers + self.runtime + self.tables.card


def place(
    file: Footprint,
    machine: Machine,
    config: ModelConfig,
    scheme: Scheme,
    context: int,
    drafts: int,
) -> Served | None:
    """How vLLM serves `file` on `machine`, with `drafts` stages in the file; None: it cannot.

    scheme: of the experts. Draft stages are loaded only with speculative decoding, so 0 leaves
    their bytes out.
    """
    assert machine.card is not None
    parts_and_why = cut(machine, config, scheme)
    if parts_and_why is None:
        return None
    parts, uncut = parts_and_why
    usual, room = default_batch(machine.card.nbytes), memory_room(machine.ram)
    for tables in table_places(config, parts):
        if tables.host > room:
            continue
        batches = [usual, *(b for b in _BATCHES if b < usual)]
        for batch, share in itertools.product(batches, _utilizations(machine)):
            serving = Serving(parts, context, batch, 1, share, expert_parallel=bool(uncut))
            found = _served(file, machine, config, serving, drafts, tables)
            if found is not None:
                together = _together(found, machine, config, drafts)
                return replace(found, uncut=uncut, together=together)
    return None


def _utilizations(machine: Machine) -> tuple[float, ...]:
    return (_SHARED_UTILIZATION, UTILIZATION) if machine.unified else (UTILIZATION,)


def _together(found: Served, machine: Machine, config: ModelConfig, drafts: int) -> int:
    """How many sequences of full length there is room for at once, to a power of two."""
    assert machine.card is not None
    usable = int(machine.card.nbytes * found.serving.utilization) - found.tables.card
    for sequences in _SEQUENCES:
        many = replace(found.serving, sequences=sequences)
        if found.weights + _beside(config, many, drafts) <= usable:
            return sequences
    return 1


def host_bytes(machine: Machine, config: ModelConfig) -> int:
    """The least of system memory with which V4.1's tables can stay off the cards."""
    places = table_places(config, max(parts_of(machine, config), 1))
    return min((p.host for p in places if not p.card), default=0)


def smallest_card(file: Footprint, machine: Machine, config: ModelConfig, context: int) -> int:
    """Bytes a card would have to have, with the smallest batch."""
    serving = Serving(max(parts_of(machine, config), 1), context, _BATCHES[-1])
    taken = _weights(file, serving, 0) + _beside(config, serving, 0)
    return int(taken / serving.utilization)


def _served(
    file: Footprint,
    machine: Machine,
    config: ModelConfig,
    serving: Serving,
    drafts: int,
    tables: TablePlace,
) -> Served | None:
    assert machine.card is not None
    usable = int(machine.card.nbytes * serving.utilization) - tables.card
    weights = _weights(file, serving, drafts)
    if weights + _beside(config, serving, drafts) > usable:
        return None
    longest = config.max_position_embeddings
    low, high = serving.context // _STEP, -(-longest // _STEP)
    while low < high:
        middle = (low + high + 1) // 2
        longer = replace(serving, context=middle * _STEP)
        if weights + _beside(config, longer, drafts) <= usable:
            low = middle
        else:
            high = middle - 1
    experts = sum(layer.experts for layer in file.layers)
    cut = file.cut - file.embed - experts + experts * file.active
    read = cut / serving.gpus + file.whole
    return Served(
        serving, weights, kv_cache_bytes(config, serving, drafts),
        buffer_bytes(config, serving, drafts), runtime_estimate(serving),
        max(low * _STEP, serving.context), tables, "", read / machine.card.bandwidth,
    )  # fmt: skip


def _weights(file: Footprint, serving: Serving, drafts: int) -> int:
    cut = file.cut + (file.cut_drafts if drafts else 0)
    whole = file.whole + (file.whole_drafts if drafts else 0)
    return -(-cut // serving.gpus) + whole


def _beside(config: ModelConfig, serving: Serving, drafts: int) -> int:
    return (
        kv_cache_bytes(config, serving, drafts)
        + buffer_bytes(config, serving, drafts)
        + runtime_estimate(serving)
    )
