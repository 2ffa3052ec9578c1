"""Whether SGLang's cards hold a model, and with which options.

Weights are cut over cards as in vLLM, and the same dimensions cannot be cut; caches and what SGLang
leaves for activations are in `v4quant_formats/engines/sglang_memory.py`. A smaller prefill chunk
leaves more for weights, so chunks are tried from SGLang's own default down. V4.1's tables lie in
memory that all cards share, or each card holds its part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from v4quant.planner.footprint import Footprint
from v4quant.planner.llama_cpp import memory_room
from v4quant.planner.machines import Machine
from v4quant.planner.safetensors import cut, parts_of
from v4quant_formats.engines.sglang_memory import (
    Serving,
    default_chunk,
    pool_bytes,
    static_bytes,
    static_share,
    widened_bytes,
)
from v4quant_formats.engines.vllm_engram import table_places
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.scheme import Scheme

_CHUNKS = (8192, 4096, 2048)
_SEQUENCES = (64, 32, 16, 8, 4, 2, 1)
# Of a memory that the system needs too.
_SHARED = 0.85
_STEP = 1024
_HOST_TABLES = "SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE=1"


@dataclass(frozen=True)
class Served:
    """How SGLang is started, what one card then holds, and the longest context that fits.

    share: --mem-fraction-static. weights, pools: bytes of a card, pools for one sequence. tables:
    V4.1's in system memory. environment: variables, as `NAME=value`. uncut: why experts are dealt
    out whole. seconds: to read what one token needs.
    """

    serving: Serving
    share: float
    weights: int
    pools: int
    context_fits: int
    tables: int
    environment: tuple[str, ...]
    uncut: str
    seconds: float


def place(
    file: Footprint, machine: Machine, config: ModelConfig, scheme: Scheme, context: int
) -> Served | None:
    """How SGLang serves `file` on `machine`; None: it cannot. scheme: of the experts."""
    parts_and_why = cut(machine, config, scheme)
    if parts_and_why is None:
        return None
    parts, uncut = parts_and_why
    for host, on_card in _tables(config, parts):
        if host > memory_room(machine.ram):
            continue
        found = _served(file, machine, config, Serving(parts, context, 0), on_card)
        if found is not None:
            environment = (_HOST_TABLES,) if host else ()
            return replace(found, tables=host, environment=environment, uncut=uncut)
    return None


def smallest_card(file: Footprint, machine: Machine, config: ModelConfig, context: int) -> int:
    """Bytes a card would have to have, with the smallest chunk and tables in memory."""
    serving = Serving(max(parts_of(machine, config), 1), context, _CHUNKS[-1])
    needed = _weights(file, config, serving.gpus, 0) + pool_bytes(config, serving)
    gib = 1
    while static_bytes(gib * 2**30, static_share(gib * 2**30, serving)) < needed:
        gib += 1
    return gib * 2**30


def host_bytes(machine: Machine, config: ModelConfig) -> int:
    """System memory with which V4.1's tables can stay off the cards."""
    return _tables(config, max(parts_of(machine, config), 1))[0][0]


def _tables(config: ModelConfig, parts: int) -> list[tuple[int, int]]:
    """(bytes in system memory, bytes on each card) of V4.1's tables, the best first."""
    pairs = {(place.host, place.card) for place in table_places(config, parts)}
    in_memory = min((pair for pair in pairs if not pair[1]), default=(0, 0))
    return [in_memory, *sorted(pair for pair in pairs if pair[1])]


def _weights(file: Footprint, config: ModelConfig, parts: int, tables: int) -> int:
    return -(-file.cut // parts) + file.whole + widened_bytes(config, parts) + tables


def _served(
    file: Footprint, machine: Machine, config: ModelConfig, asked: Serving, tables: int
) -> Served | None:
    assert machine.card is not None
    size = machine.card.nbytes
    weights = _weights(file, config, asked.gpus, tables)
    usual = default_chunk(size)

    def room(serving: Serving) -> int:
        return static_bytes(size, _share(machine, serving)) - weights - pool_bytes(config, serving)

    fitting = (
        replace(asked, chunk=chunk)
        for chunk in (usual, *(c for c in _CHUNKS if c < usual))
        if room(replace(asked, chunk=chunk)) >= 0
    )
    one = next(fitting, None)
    if one is None:
        return None
    several = (replace(one, sequences=n) for n in _SEQUENCES)
    serving = next(s for s in several if room(s) >= 0)
    low, high = one.context // _STEP, -(-config.max_position_embeddings // _STEP)
    while low < high:
        middle = (low + high + 1) // 2
        fits = room(replace(one, context=middle * _STEP)) >= 0
        low, high = (middle, high) if fits else (low, middle - 1)
    experts = sum(layer.experts for layer in file.layers)
    read = (file.cut - file.embed - experts + experts * file.active) / asked.gpus + file.whole
    return Served(
        serving, _share(machine, serving), weights, pool_bytes(config, one),
        max(low * _STEP, one.context), 0, (), "", read / machine.card.bandwidth,
    )  # fmt: skip


def _share(machine: Machine, serving: Serving) -> float:
    assert machine.card is not None
    share = static_share(machine.card.nbytes, serving)
    return min(share, _SHARED) if machine.unified else share
