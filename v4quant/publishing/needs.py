"""What memory a published conversion needs, as a table: per card and split, or card and system.

Figures are the preflight's, from headers: weights and the KV cache of one sequence. What an engine
wants beyond that is said in a sentence, since nobody measured it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4quant_formats.engines import ENGINES
from v4quant_formats.preflight import Preflight

_BESIDE = "Engines want a few GB more on each card for activations and workspaces."
_EXPERTS = "routed experts"


def memory_rows(engines: Sequence[Preflight]) -> list[tuple[str, str, int, int, int]]:
    """(engine, cards, bytes of weights, of KV cache, tokens of context) of every split."""
    rows = []
    for found in engines:
        each = found.by_split or ((found.memory,) if found.memory is not None else ())
        for memory in each:
            rows.append(
                (
                    ENGINES[found.engine].title,
                    f"{memory.tp}",
                    memory.weights,
                    memory.kv_cache,
                    memory.context,
                )
            )
    return rows


def memory_table(
    engines: Sequence[Preflight],
    classes: Sequence[Mapping[str, Any]],
    gguf: bool,
    size: Callable[[int], str],
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str],
) -> str:
    """Markdown of what one card holds; empty where no engine is known to load the files."""
    rows = memory_rows(engines)
    if not rows:
        return ""
    context = rows[0][4]
    shown = [
        (name, cards, size(weights), size(cache), size(weights + cache))
        for name, cards, weights, cache, _ in rows
    ]
    columns = ("Engine", "Cards", "Weights a card", f"KV cache, {context:,} tokens", "Together")
    told = f"Memory of each card, from the headers:\n\n{table(columns, shown)}\n\n{_BESIDE}"
    experts = sum(int(row["bytes_out"]) for row in classes if row["role"] == _EXPERTS)
    rest = sum(int(row["bytes_out"]) for row in classes) - experts
    if gguf and experts:
        told += (
            f" With all routed experts in system memory (`--n-cpu-moe 99`), {size(experts)} lie "
            f"there and {size(rest)} on the card."
        )
    return told
