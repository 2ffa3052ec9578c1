"""Stats: what calibration learned about the inputs of every routed expert, and its file.

For each stage the file holds, over all experts E: how many tokens each expert saw, the second
moment E[x_i^2] and the largest magnitude of each input channel set, for w1/w3 (they share their
input, [E, hidden_size]) and for w2 ([E, moe_intermediate_size], routing weight included). Sums are
kept as float64 sums and counts, so that files of several ranks can be added.

An expert with fewer than `floor` tokens is *starved*: its own moments are noise, so they are mixed
with the layer's pooled moments over all experts, by its count: n / floor of its own, the rest of
the pool. So nothing jumps where the floor is reached, and an expert without tokens has the pool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4quant_calibration.statistics.provenance import Provenance, provenance_from
from v4quant_calibration.statistics.table_use import RowUse, merged_use
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.shards import output_error, write_tensors
from v4quant_formats.system import require_regular
from v4quant_kernels.errors import V4QuantError

STATS_VERSION = 2
_INPUTS = ("w13", "w2")


class StatsError(V4QuantError):
    """A statistics file that is damaged, of another version, or of another checkpoint."""


@dataclass(frozen=True)
class StageStats:
    """Statistics of one stage's experts.

    tokens: int64 [E]. sums: float64 [E, K] sums of squares, by input ("w13", "w2").
    amax: float32 [E] largest input magnitude, by input.
    """

    tokens: Tensor
    sums: Mapping[str, Tensor]
    amax: Mapping[str, Tensor]


@dataclass(frozen=True)
class DenseInputs:
    """Sums of squares float64 [K] of what a dense matrix multiplies, over so many rows."""

    sums: Tensor
    rows: int


@dataclass(frozen=True)
class Stats:
    """Calibration statistics of a checkpoint; `source_digest` says which.

    first: tokens of every expert after the first draw, before starved experts had more text drawn
    for them; empty where nothing is known of draws. dense: inputs of other matrices by module,
    which importance matrices know and the file of statistics does not keep. tables: how often the
    text used the rows of V4.1's Engram tables, by module. provenance: how they were made, where
    that is known. file: where they were read from.
    """

    source_digest: str
    floor: int
    stages: Mapping[str, StageStats]
    first: Mapping[str, Tensor] = field(default_factory=dict)
    dense: Mapping[str, DenseInputs] = field(default_factory=dict)
    tables: Mapping[str, RowUse] = field(default_factory=dict)
    provenance: Provenance | None = None
    file: Path | None = None

    def importance(self, module: str) -> Tensor | None:
        """Second moment [K] of a matrix's input channels; mixed with the pool's when starved.

        None for a module calibration did not cover (no token reached its whole layer).
        """
        if (seen := self.dense.get(module)) is not None:
            return seen.sums / seen.rows if seen.rows else None
        stage, expert, source = self._locate(module)
        if stage is None:
            return None
        tokens, sums = stage.tokens, stage.sums[source]
        count, total = int(tokens[expert]), int(tokens.sum())
        if count >= self.floor:
            return sums[expert] / count
        if not total:
            return None
        pool = sums.sum(0) / total
        return sums[expert] / self.floor + (1 - count / self.floor) * pool

    def input_amax(self, module: str) -> float | None:
        """Largest input magnitude seen, over the layer for starved experts; None if unknown."""
        stage, expert, source = self._locate(module)
        if stage is None:
            return None
        amax = stage.amax[source]
        seen = amax[expert] if int(stage.tokens[expert]) >= self.floor else amax.max()
        return float(seen) or None

    def starved(self) -> list[tuple[str, int, int]]:
        """(stage, expert, tokens) of every expert below the floor."""
        return [
            (name, expert, count)
            for name, stage in self.stages.items()
            for expert, count in enumerate(stage.tokens.tolist())
            if count < self.floor
        ]

    def _locate(self, module: str) -> tuple[StageStats | None, int, str]:
        name = parse_name(f"{module}.weight")
        if name is None or name.expert is None:
            return None, 0, ""
        source = "w2" if name.projection == "w2" else "w13"
        stage = self.stages.get(name.stage)
        if stage is not None and name.expert >= stage.tokens.shape[0]:
            raise StatsError(
                f"statistics of '{name.stage}' cover {stage.tokens.shape[0]} experts, not "
                f"'{module}'; calibrate again"
            )
        return stage, name.expert, source


def write_stats(path: Path, stats: Stats) -> None:
    """Write the statistics file (safetensors), a tensor at a time, whole or not at all.

    The same statistics give the same bytes. Raises OutputError.
    """
    tensors: dict[str, Tensor] = {}
    for name, stage in stats.stages.items():
        tensors[f"{name}.tokens"] = stage.tokens
        if name in stats.first:
            tensors[f"{name}.first_tokens"] = stats.first[name]
        for source in _INPUTS:
            tensors[f"{name}.{source}.sum_of_squares"] = stage.sums[source]
            tensors[f"{name}.{source}.amax"] = stage.amax[source]
    for module, use in stats.tables.items():
        tensors[f"{module}.rows"], tensors[f"{module}.counts"] = use.rows, use.counts
    header = {
        "version": STATS_VERSION,
        "source_digest": stats.source_digest,
        "floor": stats.floor,
        "stages": list(stats.stages),
        **({"tables": list(stats.tables)} if stats.tables else {}),
        **({"provenance": stats.provenance.as_dict()} if stats.provenance else {}),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from None
    write_tensors(path, tensors, {"v4quant_stats": json.dumps(header)})


def is_stats(path: Path) -> bool:
    """Whether a file is one that `write_stats` wrote, in this version or another."""
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            return isinstance(json.loads((file.metadata() or {})["v4quant_stats"]), dict)
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
        return False


def load_stats(path: Path, source_digest: str) -> Stats:
    """Read a statistics file made for the checkpoint with `source_digest`. Raises StatsError."""
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("v4quant_stats", "null"))
            if not isinstance(header, dict) or header.get("version") != STATS_VERSION:
                raise StatsError(
                    f"{path}: not a v4quant statistics file of version {STATS_VERSION}; run "
                    "calibrate with this version"
                )
            digest, floor = str(header["source_digest"]), header["floor"]
            if type(floor) is not int or floor < 1:
                raise StatsError(f"{path}: floor {floor!r} is not a positive number of tokens")
            stages = {name: _read_stage(path, file, name) for name in header["stages"]}
            first = _read_first(path, file, stages)
            tables = {n: _read_use(path, file, str(n)) for n in header.get("tables", ())}
            made = provenance_from(header.get("provenance"))
            stats = Stats(digest, floor, stages, first, {}, tables, made, path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StatsError(
            f"{path}: cannot be read as statistics ({error}); give what calibrate --out wrote, or "
            "an importance matrix of llama.cpp's"
        ) from None
    if stats.source_digest != source_digest:
        raise StatsError(
            f"{path}: was calibrated on another checkpoint (digest {stats.source_digest[:12]}, "
            f"this one is {source_digest[:12]}); run calibrate on this checkpoint"
        )
    return stats


def _read_stage(path: Path, file: Any, name: str) -> StageStats:
    tokens = file.get_tensor(f"{name}.tokens")
    sums = {s: file.get_tensor(f"{name}.{s}.sum_of_squares") for s in _INPUTS}
    amax = {s: file.get_tensor(f"{name}.{s}.amax") for s in _INPUTS}
    where = f"{path}: stage '{name}'"
    if tokens.dim() != 1 or tokens.dtype != torch.int64 or bool((tokens < 0).any()):
        raise StatsError(f"{where} holds no list of token counts")
    experts = tokens.shape[0]
    fits = all(v.dim() == 2 and v.shape[0] == experts for v in sums.values())
    if not fits or any(v.shape != (experts,) for v in amax.values()):
        raise StatsError(f"{where} holds tensors of inconsistent shapes")
    for value in (*sums.values(), *amax.values()):
        if not value.is_floating_point() or not bool((torch.isfinite(value) & (value >= 0)).all()):
            raise StatsError(f"{where} holds NaN, infinity or negative moments; calibrate again")
    return StageStats(tokens, sums, amax)


def _read_first(path: Path, file: Any, stages: Mapping[str, StageStats]) -> dict[str, Tensor]:
    first = {}
    held = set(file.keys())
    for name, stage in stages.items():
        if f"{name}.first_tokens" not in held:
            continue
        counts = file.get_tensor(f"{name}.first_tokens")
        fits = counts.shape == stage.tokens.shape and counts.dtype == torch.int64
        if not fits or not bool(((counts >= 0) & (counts <= stage.tokens)).all()):
            raise StatsError(f"{path}: stage '{name}' holds impossible counts of its first draw")
        first[name] = counts
    return first


def _read_use(path: Path, file: Any, module: str) -> RowUse:
    rows, counts = file.get_tensor(f"{module}.rows"), file.get_tensor(f"{module}.counts")
    fits = rows.dim() == 1 and rows.shape == counts.shape
    fits = fits and rows.dtype == counts.dtype == torch.int64
    if not fits or bool((rows[1:] <= rows[:-1]).any()) or bool((rows < 0).any()):
        raise StatsError(f"{path}: '{module}' holds no ascending list of table rows")
    if bool((counts < 1).any()):
        raise StatsError(f"{path}: '{module}' holds impossible counts of its rows")
    return RowUse(rows, counts)


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of several runs over different text, as if one run had read it all.

    Raises StatsError when they are of different checkpoints, floors or stages.
    """
    first = parts[0]
    for other in parts[1:]:
        same = (other.source_digest, other.floor, set(other.stages))
        if same != (first.source_digest, first.floor, set(first.stages)):
            raise StatsError(
                "statistics of different checkpoints, floors or stages cannot be merged; calibrate "
                "each part of the corpus on the same checkpoint with the same settings"
            )
    stages = {}
    for name in first.stages:
        members = [part.stages[name] for part in parts]
        stages[name] = StageStats(
            torch.stack([m.tokens for m in members]).sum(0),
            {s: torch.stack([m.sums[s] for m in members]).sum(0) for s in _INPUTS},
            {s: torch.stack([m.amax[s] for m in members]).amax(0) for s in _INPUTS},
        )
    tables = {
        module: merged_use(p.tables[module] for p in parts if module in p.tables)
        for module in dict.fromkeys(m for p in parts for m in p.tables)
    }
    return Stats(first.source_digest, first.floor, stages, tables=tables)
