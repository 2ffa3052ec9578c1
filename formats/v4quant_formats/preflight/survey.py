"""A checkpoint's headers, arranged once for all checks: modules, their parts, logical shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import (
    PROJECTIONS,
    TensorName,
    expert_module,
    parse_name,
    split_part,
)
from v4quant_formats.model_config import Dimensions, parse_dimensions
from v4quant_formats.module_shapes import module_shape
from v4quant_formats.preflight.declared import Declaration, Declared
from v4quant_formats.preflight.storage import Storage
from v4quant_formats.spec import TensorSpec


@dataclass(frozen=True)
class Finding:
    """Something an engine will trip over. `count`: how many tensors share it; `tensor` is one.

    severity: error (does not load, or loads and computes nonsense), warning (loads, with a loss),
    note (worth knowing).
    """

    severity: str
    rule: str
    tensor: str
    problem: str
    remedy: str
    count: int = 1


@dataclass(frozen=True)
class Module:
    """One module: name, parts as (dtype, shape) by suffix, and what the engine builds for it."""

    name: TensorName
    parts: Mapping[str, tuple[str, tuple[int, ...]]]
    nbytes: int
    shape: tuple[int, ...] | None
    declared: Declared | None


@dataclass(frozen=True)
class Survey:
    """All modules by name, in file order, and the tensors no release has."""

    checkpoint: Checkpoint
    config: Dimensions
    declaration: Declaration
    modules: dict[str, Module]
    unknown: list[TensorSpec] = field(default_factory=list)

    @cached_property
    def declared(self) -> frozenset[tuple[bool, bool, Storage]]:
        """(of an expert, of a draft stage, storage): the few combinations declared at all."""
        by_identity = {
            (m.name.expert is not None, m.name.is_draft, id(m.declared)): m.declared
            for m in self.modules.values()
        }
        return frozenset(
            (expert, draft, declared)
            for (expert, draft, _), declared in by_identity.items()
            if isinstance(declared, Storage)
        )

    def pairs(self) -> list[tuple[Module, Module]]:
        """Modules that engines fuse: (wq_a, wkv) and (w1, w3)."""
        found = []
        for name, module in self.modules.items():
            path, _, last = name.rpartition(".")
            partner = {"wq_a": "wkv", "w1": "w3"}.get(last)
            if partner and (other := self.modules.get(f"{path}.{partner}")):
                found.append((module, other))
        return found


Check = Callable[[Survey], Iterable[Finding]]
"""What is wrong with a checkpoint in one respect."""


def survey(checkpoint: Checkpoint, declaration: Declaration) -> Survey:
    """Arrange a checkpoint. Raises ConfigError for a config.json that is not V4's."""
    config = parse_dimensions(dict(checkpoint.config), str(checkpoint.path / "config.json"))
    by_module: dict[str, list[tuple[str, TensorSpec]]] = {}
    for spec in checkpoint:
        module, part = split_part(spec.name)
        by_module.setdefault(module, []).append((part, spec))
    expert_shapes = _expert_shapes(config)
    modules, unknown = {}, []
    for module, entries in by_module.items():
        name = parse_name(entries[0][1].name)
        if name is None:
            unknown += [spec for _, spec in entries]
            continue
        shape = (
            expert_shapes[name.projection or ""]
            if name.expert is not None
            else module_shape(config, module)
        )
        modules[module] = Module(
            name,
            {part: (s.dtype, s.shape) for part, s in entries},
            sum([s.nbytes for _, s in entries]),
            shape,
            declaration.declare(name) if name.is_linear else None,
        )
    return Survey(checkpoint, config, declaration, modules, unknown)


def _expert_shapes(config: Dimensions) -> dict[str, tuple[int, ...]]:
    shapes = {p: module_shape(config, expert_module("layers.0", 0, p)) for p in PROJECTIONS}
    return {p: s for p, s in shapes.items() if s is not None}
