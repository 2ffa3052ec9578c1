"""Where a checkpoint runs: GPU generations, ways to split it, memory a GPU needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from v4quant_formats.engines.vllm_split import is_split, split_refusals, tile_refusals
from v4quant_formats.model_config import ConfigError, parse_model_config
from v4quant_formats.preflight.survey import Finding, Survey

SPLITS = (1, 2, 4, 8)
_WINDOW = 128


@dataclass(frozen=True)
class Memory:
    """Bytes one of `tp` GPUs needs: weights, and the KV cache of one sequence of `context`.

    Engines want a few gigabytes more for activations, graphs and workspaces. `tables`: bytes of
    V4.1's Engram, which engines keep in the host's memory (llama.cpp reads them from the file).
    """

    tp: int
    context: int
    weights: int
    kv_cache: int
    tables: int = 0

    @property
    def total(self) -> int:
        """Weights and cache."""
        return self.weights + self.kv_cache


def gpus(survey: Survey) -> tuple[str, ...]:
    """GPU generations that run every kind this checkpoint declares, in the engine's order."""
    engine = survey.declaration.engine
    possible: list[str] | None = None
    for expert, kind in sorted(_kinds(survey)):
        table = engine.experts if expert else engine.dense
        runs = table.get(kind, ())
        possible = [g for g in (runs if possible is None else possible) if g in runs]
    return tuple(possible or ())


def _kinds(survey: Survey) -> set[tuple[bool, str]]:
    return {(expert, storage.kind) for expert, draft, storage in survey.declared if not draft}


def split_problems(survey: Survey, tp: int) -> Iterator[str]:
    """Why a model cannot be split over `tp` GPUs."""
    c = survey.config
    if tp > 1 and not survey.declaration.engine.shards:
        yield f"{survey.declaration.engine.title} does not split it"
        return
    refusals = list(split_refusals(c, tp))
    dense = {storage for expert, _, storage in survey.declared if not expert}
    for tile in sorted({s.granularity for s in dense if s.kind in ("ct-fp8-block", "ct-mxfp8")}):
        refusals += tile_refusals(c, tp, tile)
    yield from refusals
    inner = c.moe_intermediate_size
    if inner % tp:
        return
    storages = {storage for expert, _, storage in survey.declared if expert}
    for storage in sorted(storages, key=str):
        if (inner // tp) % storage.granularity:
            yield (
                f"an expert's share of {inner // tp} channels is not a multiple of "
                f"{storage.granularity} ({storage}); use expert parallelism, or a smaller group"
            )


def memory(survey: Survey, tp: int, context: int) -> Memory:
    """Memory of one GPU, from headers."""
    engine, weights, tables = survey.declaration.engine, 0, 0
    tp = tp if engine.shards else 1
    for module in survey.modules.values():
        nbytes = module.nbytes
        if module.name.is_draft and engine.drafts == "ignored":
            continue
        if module.name.role == "engram tables":
            tables += module.nbytes
            continue
        if engine.decodes and module.shape is not None and module.name.is_linear:
            nbytes = 2 * math.prod(module.shape)
        weights += nbytes // tp if is_split(module.name) else nbytes
    return Memory(tp, context, weights, _kv_cache(survey, tp, context), tables)


def _kv_cache(survey: Survey, tp: int, context: int) -> int:
    """By the engine's own arithmetic; else, or where config.json lacks fields, entries in BF16."""
    c = survey.config
    if survey.declaration.engine.kv_cache is not None:
        with suppress(ConfigError):
            return survey.declaration.engine.kv_cache(parse_model_config(c.raw), tp, context)
    window = c.num_hidden_layers * 2 * c.head_dim * min(context, _WINDOW)
    return window + context * (c.kv_bytes_per_token() or 0)


def split_findings(survey: Survey, tp: int) -> Iterator[Finding]:
    """The wanted split as errors."""
    for problem in split_problems(survey, tp):
        works = [n for n in SPLITS if not any(split_problems(survey, n))]
        remedy = f"use --tp {' or '.join(map(str, works))}" if works else "use expert parallelism"
        yield Finding("error", "tensor-parallel", "config.json", f"--tp {tp}: {problem}", remedy)
