"""The tables with one row per layer: what it chose, what it lost, what its experts were fed.

A layer's own error and the experts' errors say where damage sits; how many tokens per expert saw
says whether its error was measured at all.
"""

from __future__ import annotations

import statistics

from v4quant.evaluation.figures import Figures, LayerFigures
from v4quant.evaluation.report.tables import Table, build_table
from v4quant.evaluation.report.text import (
    count,
    percent,
    plain,
    text,
)

LAYER_KINDS = {"swa": "sliding window", "csa": "CSA", "hca": "HCA", "mtp": "MTP"}


def layer_table(result: Figures) -> Table | None:
    """One row per layer: kind, errors, and whether it chose the same experts and entries."""
    rows = [
        (
            text(layer.name),
            _kind(layer),
            percent(layer.router_agreement),
            percent(layer.index_agreement),
            plain(layer.local_relative_error, 3),
            plain(layer.stream_relative_error, 3),
        )
        for layer in result.layers
    ]
    columns = (
        "Layer",
        "Attention",
        "Router agreement",
        "Indexer agreement",
        "Local relative error",
        "Stream relative error",
    )
    notes = (
        "Router agreement: share of the experts the reference chose that the candidate chose too. "
        "Indexer agreement: the same for the compressed entries that a long-range layer reads.",
    )
    return build_table("Layers", columns, rows, notes if rows else (), text_columns=2)


def expert_table(result: Figures) -> Table | None:
    """One row per layer: what its experts' weights and outputs lost, and what they were fed."""
    fed = {text(r.name): r.tokens_per_expert for r in result.coverage.layers}
    rows = []
    for layer in result.layers:
        tokens = fed.get(text(layer.name), ())
        rows.append(
            (
                text(layer.name),
                plain(layer.weight_relative_rms, 3),
                _worst(layer, "weight_largest", "weight_worst"),
                plain(layer.expert_output_median, 3),
                _worst(layer, "expert_output_largest", "expert_output_worst"),
                count(min(tokens)) if tokens else "",
                count(statistics.median_low(tokens)) if tokens else "",
            )
        )
    columns = (
        "Layer",
        "Weight relative RMS error",
        "Largest (matrix)",
        "Output error, median",
        "Largest (expert)",
        "Fewest tokens per expert saw",
        "Median tokens per expert",
    )
    note = "Output errors: on the reference's input, for a sample of tokens of each expert."
    measured = any(row[3] for row in rows)
    return build_table("Experts of each layer", columns, rows, (note,) if measured else ())


def starved_table(result: Figures) -> Table | None:
    """Experts that saw fewer tokens than the coverage floor, one row per layer."""
    coverage = result.coverage
    by_layer: dict[str, list[str]] = {}
    for entry in coverage.starved:
        tokens = count(entry.tokens)
        shown = f"{text(entry.expert)} ({tokens})" if tokens else text(entry.expert)
        by_layer.setdefault(text(entry.layer), []).append(shown)
    rows = [(layer, ", ".join(found), f"{len(found):,}") for layer, found in by_layer.items()]
    floor = count(coverage.floor)
    note = f"Experts that saw fewer than {floor} tokens; their error is poorly measured."
    return build_table(
        "Starved experts",
        ("Layer", "Expert (tokens it saw)", "Starved"),
        rows,
        (note,) if floor else (),
        text_columns=2,
    )


def _kind(layer: LayerFigures) -> str:
    kind = text(layer.kind)
    return LAYER_KINDS.get(kind, kind)


def _worst(layer: LayerFigures, key: str, which: str) -> str:
    largest = getattr(layer, key)
    return f"{plain(largest, 3)} ({text(getattr(layer, which))})" if largest else ""
