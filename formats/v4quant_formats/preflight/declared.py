"""What config.json declares for each module, resolved the way each engine resolves it.

`quantization_config` does not name tensors but patterns over module names, and every engine renames
modules before matching and has habits of its own. `declare` returns the `Storage` an engine will
build for a module, or a `Refusal` when the declaration itself stops it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Any

from v4quant_formats.deepseek_v4 import TensorName
from v4quant_formats.engines import Engine
from v4quant_formats.engines.engine import Release
from v4quant_formats.model_config import is_v41
from v4quant_formats.preflight.storage import PLAIN, Storage

MXFP4 = Storage("mxfp4", 32)
NVFP4 = Storage("nvfp4", 16)


@dataclass(frozen=True)
class Refusal:
    """A declaration the engine cannot build: the rule, and why."""

    rule: str
    problem: str


Declared = Storage | Refusal


@dataclass(frozen=True)
class Declaration:
    """A config's quantization, read for one engine. `layers` is the trunk's depth."""

    engine: Engine
    config: Mapping[str, Any]
    layers: int

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config`, or an empty table."""
        inner = self.config.get("text_config")
        own = self.config.get("quantization_config")
        if own is None and isinstance(inner, dict):
            own = inner.get("quantization_config")
        return own if isinstance(own, dict) else {}

    @cached_property
    def release(self) -> Release:
        """Whose config.json it is."""
        return "v41" if is_v41(self.config) else "v4"

    def theirs(self, module: str) -> str:
        """The engine's own name of a module."""
        name = self.engine.module_name
        if self.release == "v41" and self.engine.v41_name is not None:
            name = self.engine.v41_name
        return name(module, self.layers)

    @cached_property
    def method(self) -> str:
        """Its `quant_method`; "" when nothing is declared."""
        return str(self.quantization.get("quant_method", ""))

    @cached_property
    def expert_dtype(self) -> str:
        """`expert_dtype`, which engines take for fp4 when it is absent."""
        inner = self.quantization.get("expert_dtype", "fp4")
        return str(self.config.get("expert_dtype", inner))

    @cached_property
    def nvfp4_experts(self) -> bool:
        """Whether the FP8 config says that experts are NVFP4."""
        return str(self.quantization.get("moe_quant_algo") or "").upper() == "NVFP4"

    @cached_property
    def groups(self) -> list[Mapping[str, Any]]:
        """compressed-tensors' groups, in order."""
        groups = self.quantization.get("config_groups")
        values = groups.values() if isinstance(groups, dict) else ()
        return [g for g in values if isinstance(g, dict)]

    @cached_property
    def ignore(self) -> list[str]:
        """The `ignore` list."""
        value = self.quantization.get("ignore")
        return [str(i) for i in value] if isinstance(value, list) else []

    def declare(self, name: TensorName) -> Declared:
        """What the engine builds for a linear module."""
        if self.method == "fp8":
            return self._fp8(name)
        if self.method == "compressed-tensors":
            return self._groups(name)
        return PLAIN

    @cached_property
    def skipped(self) -> list[str]:
        """Modules that an FP8 table excludes, under either of the names it has for them."""
        table = self.quantization
        value = table.get("ignored_layers") or table.get("modules_to_not_convert")
        return [str(i) for i in value] if isinstance(value, list) else []

    def _fp8(self, name: TensorName) -> Declared:
        if self.skipped and self._skips(name):
            return PLAIN
        dense = self._dense_fp8
        if name.expert is None or isinstance(dense, Refusal) or self.expert_dtype == "fp8":
            return dense
        if self.expert_dtype != "fp4":
            allowed = "fp4 or fp8"
            return Refusal("expert-dtype", f"expert_dtype '{self.expert_dtype}' is not {allowed}")
        if not self.nvfp4_experts:
            return MXFP4
        kept = name.is_draft and self.engine.drafts == "mxfp4"
        if self.release in self.engine.reads_ignore_for_nvfp4:
            kept |= any(fnmatchcase(name.module, pattern) for pattern in self.ignore)
        return MXFP4 if kept else NVFP4

    @cached_property
    def _dense_fp8(self) -> Declared:
        tile = _tile(self.quantization.get("weight_block_size"))
        if tile is None:
            problem = "quantization_config lacks weight_block_size, so scales of whole tensors "
            return Refusal("block-size", problem + "are expected, which V4 classes do not take")
        e8m0 = self.expert_dtype == "fp4"
        return Storage("fp8", tile=tile, scales=("F8_E8M0",) if e8m0 else ("F8_E8M0", "F32"))

    def _skips(self, name: TensorName) -> bool:
        """Whether an FP8 table excludes a module, as its engine compares names.

        vLLM and SGLang want a linear layer's whole name, and any name below `experts` for all
        experts of a layer; transformers the beginning of a name, or its end.
        """
        theirs = self.theirs(name.module)
        if self.engine.first_group:
            return any(theirs.startswith(s) or theirs.endswith(s) for s in self.skipped)
        if name.expert is not None:
            above = [n.rpartition(".experts.")[0] + ".experts" for n in (theirs, name.module)]
            return any(a in s for a in above for s in self.skipped)
        return any(s in (theirs, name.module, f"model.{name.module}") for s in self.skipped)

    def _groups(self, name: TensorName) -> Declared:
        if name.expert is None and self.engine.reads_linear_fp8:
            inner = self.quantization.get("linear_fp8_config")
            if isinstance(inner, dict):
                tile = _tile(inner.get("weight_block_size"))
                return Storage("fp8", tile=tile or (128, 128))
        theirs = self.theirs(name.module)
        if self.engine.first_group:
            return self._first_group(name, theirs)
        for group in self.groups:
            if any(_hits(t, theirs, name.module) for t in _targets(group)):
                if any(_hits(i, theirs, name.module) for i in self.ignore):
                    return PLAIN
                return self._storage_of(group)
        ignored = any(_hits(i, theirs, name.module) for i in self.ignore)
        if not ignored and self.engine.unmatched == "error":
            problem = f"module '{theirs}' is in no target and not in ignore, which the engine "
            return Refusal("unmatched", problem + "refuses; add it to ignore")
        return PLAIN

    def _storage_of(self, group: Mapping[str, Any]) -> Declared:
        """A group without a `format` has the table's."""
        common = self.quantization.get("format")
        if common in (None, "mixed-precision"):
            return storage_of_group(group)
        return storage_of_group({"format": common, **group})

    def _first_group(self, name: TensorName, theirs: str) -> Declared:
        """transformers: one group for all experts, told by the word in its targets."""
        experts = name.expert is not None
        for group in self.groups:
            speaks = any("experts" in t for t in _targets(group))
            if speaks != experts:
                continue
            if experts:
                return self._storage_of(group)
            if any(_hits(t, theirs, theirs) for t in _targets(group)):
                return PLAIN if self._ignored(theirs) else self._storage_of(group)
        return PLAIN

    def _ignored(self, theirs: str) -> bool:
        return any(_hits(i, theirs, theirs) for i in self.ignore)


def _tile(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int and v > 0 for v in value):
        return value[0], value[1]
    return None


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [str(t) for t in targets] if isinstance(targets, list) else []


@lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except re.error:
        return None


def _hits(target: str, theirs: str, official: str) -> bool:
    """Whether a target or ignore entry means a module: a pattern, a class, or a name."""
    if target.startswith("re:"):
        pattern = _pattern(target[3:])
        return pattern is not None and pattern.match(theirs) is not None
    return target in ("Linear", theirs, official)


def bad_patterns(declaration: Declaration) -> list[str]:
    """Target and ignore entries that are not regular expressions."""
    entries = [t for g in declaration.groups for t in _targets(g)] + declaration.ignore
    return [e for e in entries if e.startswith("re:") and _pattern(e[3:]) is None]


_FORMATS = {
    "ct-fp8-block": ("float-quantized", "naive-quantized"),
    "ct-fp8-channel": ("float-quantized", "naive-quantized"),
    "ct-fp8-tensor": ("float-quantized", "naive-quantized"),
    "ct-mxfp4": ("mxfp4-pack-quantized",),
    "ct-mxfp8": ("mxfp8-quantized",),
    "ct-nvfp4": ("nvfp4-pack-quantized",),
}


def storage_of_group(group: Mapping[str, Any]) -> Declared:
    """The stored form a compressed-tensors group declares."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return PLAIN
    bits, size = weights.get("num_bits"), weights.get("group_size") or 0
    strategy = str(weights.get("strategy"))
    if weights.get("actorder") in ("group", "dynamic"):
        return Refusal("actorder", "actorder 'group' and 'dynamic' are refused; re-quantize")
    if weights.get("type") == "int" and bits in (2, 3, 4, 8):
        size = 0 if strategy == "channel" else size
        zero = weights.get("symmetric") is False
        storage = Storage(f"int{bits}", int(size), zero_point=zero)
        activations = group.get("input_activations")
        if isinstance(activations, dict) and activations.get("type") == "int":
            problem = "integer activations (W4A8/W8A8 INT) have no MoE kernel on NVIDIA GPUs"
            return Refusal("activations", problem)
        return _checked(storage, group, ("pack-quantized",))
    if weights.get("type") == "float" and bits == 8:
        if strategy == "block":
            tile = _tile(weights.get("block_structure"))
            storage = Storage("ct-fp8-block", tile=tile or (128, 128))
        elif strategy == "group" and size == 32:
            storage = Storage("ct-mxfp8", 32)
        else:
            storage = Storage(f"ct-fp8-{strategy}")
        return _checked(storage, group, _FORMATS.get(storage.kind, ()))
    if weights.get("type") == "float" and bits == 4:
        if size == 32:
            return _checked(Storage("ct-mxfp4", 32), group, _FORMATS["ct-mxfp4"])
        has_input = isinstance(group.get("input_activations"), dict)
        storage = Storage("ct-nvfp4", 16, input_scale=has_input)
        return _checked(storage, group, _FORMATS["ct-nvfp4"])
    what = f"{bits}-bit {weights.get('type')} weights by {strategy}"
    return Refusal("unknown-scheme", f"no engine here takes {what}")


def _checked(storage: Storage, group: Mapping[str, Any], formats: tuple[str, ...]) -> Declared:
    stated = group.get("format")
    if stated is not None and stated not in formats:
        wanted = " or ".join(formats)
        problem = f"the group says format '{stated}', but its weights are {storage} ({wanted})"
        return Refusal("group-format", problem)
    return storage
