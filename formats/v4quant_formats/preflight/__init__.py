"""Preflight: will an engine load this checkpoint, and where? Headers and config.json only.

The engine's rules are data (engines/); a survey arranges the headers; each check is a function from
the survey to findings. It works on anybody's checkpoint. What it cannot know: wrong values (that is
`verify --source` and `diff`), and engine versions newer than the rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.engines import ENGINES, Engine
from v4quant_formats.model_config import parse_dimensions
from v4quant_formats.preflight.checks import CHECKS, complete, names
from v4quant_formats.preflight.containers import container_of, onnx_findings
from v4quant_formats.preflight.declared import Declaration
from v4quant_formats.preflight.fit import (
    SPLITS,
    Memory,
    gpus,
    memory,
    split_findings,
    split_problems,
)
from v4quant_formats.preflight.gguf_checks import GGUF_CHECKS
from v4quant_formats.preflight.survey import Finding, survey
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.near_names import did_you_mean

__all__ = ["Finding", "Memory", "Preflight", "preflight", "preflight_onnx"]

_ORDER = {"error": 0, "warning": 1, "note": 2}


class UnknownEngine(V4QuantError):
    """An engine name that is none of ENGINES."""


@dataclass(frozen=True)
class Preflight:
    """What an engine will do with a checkpoint.

    findings: errors first; equal ones are counted, not repeated. gpus: generations that run it.
    splits: numbers of GPUs it can be split over. memory: of one GPU. by_split: the same for every
    split, where that was asked for.
    """

    engine: str
    findings: tuple[Finding, ...]
    gpus: tuple[str, ...]
    splits: tuple[int, ...]
    memory: Memory | None
    by_split: tuple[Memory, ...] = ()

    @property
    def loads(self) -> bool:
        """Whether no error was found."""
        return all(f.severity != "error" for f in self.findings)


def find_engine(name: str) -> Engine:
    """The rules of an engine. Raises UnknownEngine listing the names."""
    if name not in ENGINES:
        meant = did_you_mean(name, ENGINES)
        raise UnknownEngine(f"unknown engine '{name}'; {meant}choose one of: {', '.join(ENGINES)}")
    return ENGINES[name]


def preflight(
    checkpoint: Checkpoint,
    engine_name: str,
    tp: int = 1,
    context: int = 8192,
    gpu: str = "",
    every_split: bool = False,
) -> Preflight:
    """Check a safetensors or GGUF checkpoint for an engine, on `tp` GPUs, for `context` tokens.

    gpu: a generation of `engines.GPUS` that must be among those that run it. every_split: count
    memory for all of them.
    Raises UnknownEngine, or ConfigError for a config.json that is not V4's.
    """
    engine = find_engine(engine_name)
    container = container_of(checkpoint)
    if engine.container != container:
        problem = f"{engine.title} loads {engine.container}, this is {container}; "
        why = engine.refusals.get(container, engine.advice)
        problem += why or "convert the release for it"
        remedy = why or f"use --format for {engine.container}"
        found = Finding("error", "container", str(checkpoint.path), problem, remedy)
        return Preflight(engine.name, (found,), (), (), None)
    config = parse_dimensions(dict(checkpoint.config), str(checkpoint.path / "config.json"))
    written = checkpoint.written_config or checkpoint.config
    declaration = Declaration(engine, written, config.num_hidden_layers)
    arranged = survey(checkpoint, declaration)
    if container == "gguf":
        findings = [f for check in (names, complete) for f in check(arranged)]
        if not findings:
            findings = [f for check in GGUF_CHECKS for f in check(arranged)]
        size = memory(arranged, 1, context)
        failed = any(f.severity == "error" for f in findings)
        runs = () if failed else engine.experts["gguf"]
        return Preflight(engine.name, _merge(findings), runs, (1, 2, 4, 8), size)
    findings = [f for check in CHECKS for f in check(arranged)]
    findings += split_findings(arranged, tp)
    runs = gpus(arranged) if not any(f.severity == "error" for f in findings) else ()
    if gpu and runs and gpu not in runs:
        problem = f"does not run on {gpu}; it runs on {', '.join(runs)}"
        findings.append(Finding("error", "gpu", "config.json", problem, engine.advice))
    splits = tuple(n for n in SPLITS if not any(split_problems(arranged, n)))
    each = tuple(memory(arranged, n, context) for n in splits) if every_split else ()
    size = memory(arranged, tp, context)
    return Preflight(engine.name, _merge(findings), runs, splits, size, each)


def preflight_onnx(folder: Path) -> Preflight:
    """Check a folder of ONNX graphs for ONNX Runtime's CPU provider. Raises OnnxError."""
    findings = _merge(onnx_findings(folder))
    return Preflight("onnxruntime", findings, () if findings else ("CPU",), (1,), None)


def _merge(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first; findings that differ in the tensor only become one with a count."""
    merged: dict[tuple[str, str, str, str], Finding] = {}
    for finding in sorted(findings, key=lambda f: _ORDER[f.severity]):
        part = finding.tensor.rpartition(".")[2] if finding.rule in ("dtype", "shape") else ""
        key = (finding.severity, finding.rule, finding.problem, part)
        first = merged.get(key)
        merged[key] = replace(first, count=first.count + finding.count) if first else finding
    return tuple(merged.values())
