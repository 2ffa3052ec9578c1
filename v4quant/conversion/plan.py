"""Plan: every output tensor, its shard, size and treatment, decided before a byte is read.

The plan maps source shards to output shards one to one (one layer a shard, as released), groups
tensors that must be seen together into Units (an expert's w1, w3 and w2; a weight and its scale)
and accounts for every source tensor: it is copied, re-encoded exactly, quantized, or dropped with a
reason. What is missing, unknown or of the wrong kind is an error here, not after hours.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import torch

from v4quant import __version__
from v4quant.conversion.exactness import inexact_stages
from v4quant.conversion.gguf_files import gguf_shards
from v4quant.conversion.units import Action, Dropped, ShardPlan, Unit
from v4quant.devices import CPU
from v4quant.recipe import Recipe
from v4quant.targets import check_places, place_of, places_of
from v4quant_formats.checkpoint import SINGLE_NAME, Checkpoint
from v4quant_formats.deepseek_v4 import (
    PROJECTIONS,
    TensorName,
    draft_stages,
    expert_module,
    wrong_draft_count,
)
from v4quant_formats.errors import UnexpectedTensor, UnsupportedPair, WrongDtype
from v4quant_formats.layouts.deepseek import DEEPSEEK
from v4quant_formats.model_config import Dimensions
from v4quant_formats.spec import TORCH_DTYPES, TensorSpec
from v4quant_formats.structure import Structure, check_structure
from v4quant_formats.weights import StoredWeight, scale_part
from v4quant_kernels.ggml_types import GGML_TYPES, fitting_type, get_type
from v4quant_kernels.scheme import MXFP4, SCHEMES, Scheme

# What engines read V4.1's tables as, whatever config.json says.
_ROWS_OF_FP8 = {"weight": "F8_E4M3", "scale": "F8_E8M0"}
# Tensors that releases hold in float32.
_WIDE = ("attn_sink", "ape", "gate.bias", "gate.bias_vl")


@dataclass(frozen=True)
class Plan:
    """The whole conversion. `digest` keys the journal: same digest, same output bytes.

    kept: stages whose experts stay in the source format because a cast would change them.
    device: where experts are computed; not part of the digest, because the bytes are the same.
    """

    checkpoint: Checkpoint
    config: Dimensions
    recipe: Recipe
    shards: tuple[ShardPlan, ...]
    dropped: tuple[Dropped, ...]
    stats_digest: str
    kept: tuple[str, ...] = ()
    device: torch.device = CPU

    @property
    def scheme(self) -> Scheme:
        """The experts' scheme."""
        return self.recipe.expert_scheme

    @property
    def units(self) -> Iterator[Unit]:
        """All units, in output order."""
        return (unit for shard in self.shards for unit in shard.units)

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of tensor data that will be read."""
        return sum(u.bytes_in for u in self.units)

    @cached_property
    def bytes_out(self) -> int:
        """Bytes of shards that will be written."""
        return sum(s.nbytes for s in self.shards)

    @cached_property
    def source_digest(self) -> str:
        """Identity of the source."""
        return self.checkpoint.digest()

    @cached_property
    def digest(self) -> str:
        """Identity of the conversion: source, recipe, statistics and tool version."""
        parts = [self.source_digest, repr(self.recipe.as_dict()), self.stats_digest, __version__]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def output_config(self) -> dict[str, Any]:
        """The output's config.json."""
        layout, raw = self.recipe.layout, self.checkpoint.config
        if self.recipe.places and layout.mixed_config is not None:
            config = layout.mixed_config(raw, self._stage_schemes())
        else:
            config = layout.config(raw, self.scheme, self.kept)
        return _with_drafts(
            config, len(draft_stages(s.name for f in self.shards for s in f.outputs))
        )

    def _stage_schemes(self) -> dict[str, Scheme]:
        """The scheme of every stage's experts, where a layer has one."""
        places = (u.sources[0].module.partition(".ffn.experts.") for u in self.units)
        stages = dict.fromkeys(stage for stage, found, _ in places if found)
        return {stage: self.recipe.scheme_for(stage, PROJECTIONS[0]) for stage in stages}


@dataclass(frozen=True)
class PlannedUnits:
    """All units of an output, before they are dealt to files; see Plan for the other fields."""

    config: Dimensions
    units: tuple[Unit, ...]
    dropped: tuple[Dropped, ...]
    kept: tuple[str, ...]


def plan_units(
    checkpoint: Checkpoint, recipe: Recipe, structure: Structure | None = None
) -> PlannedUnits:
    """What becomes of every tensor. Raises as make_plan does.

    structure: the checkpoint taken apart, where that was done and checked before; headers are then
    enough, else the routing tables are read.
    """
    drafts = recipe.draft != "drop"
    found = structure or check_structure(checkpoint, recipe.unknown, drafts)
    config, names = found.config, found.names
    assert config is not None
    kept: tuple[str, ...] = ()
    if recipe.on_inexact == "keep":
        experts = {(n.stage, n.expert) for n in names.values() if n and n.expert is not None}
        scheme = recipe.expert_scheme.tiled(config.fp8_tile)
        kept = inexact_stages(checkpoint, scheme, sorted(experts))
    if recipe.layout.keeps_drafts and recipe.draft != "drop":
        kept += tuple(s for s in draft_stages(names) if s not in kept)
    recipe.layout.check(config, draft_stages(names) if recipe.draft == "convert" else [])
    check_places(recipe.places, places_of(names.values(), recipe.draft != "drop"))
    planner = _Planner(checkpoint, config, recipe, found, kept)
    units = (planner.unit(module) for module in planner.leading_modules())
    return PlannedUnits(config, tuple(u for u in units if u), tuple(planner.dropped), kept)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, stats_digest: str = "") -> Plan:
    """Plan the conversion of a checkpoint; reads no tensor data.

    (With `on_inexact = "keep"` it reads the experts' scales, to know which stages stay.)
    Raises MissingTensor, UnexpectedTensor, WrongDtype, UnsupportedPair or ConfigError naming the
    tensor and the remedy.
    """
    found = plan_units(checkpoint, recipe)
    if recipe.layout.index:
        shards = _shards_as_source(found.units)
    else:
        shards = gguf_shards(checkpoint, found.units, recipe.scheme, recipe.split_bytes)
    _check_accounted(checkpoint, shards, found.dropped)
    plan = Plan(checkpoint, found.config, recipe, shards, found.dropped, stats_digest, found.kept)
    plan.output_config()  # what config.json cannot say is refused now
    return plan


def _shards_as_source(units: Iterable[Unit]) -> tuple[ShardPlan, ...]:
    by_file: dict[str, list[Unit]] = {}
    for unit in units:
        file = next(iter(unit.sources[0].parts.values())).file
        by_file.setdefault(file, []).append(unit)
    return tuple(
        ShardPlan(_output_file(file), tuple(members)) for file, members in sorted(by_file.items())
    )


def _with_drafts(config: dict[str, Any], stages: int) -> dict[str, Any]:
    """A config.json that promises draft stages where there are some, and none where there is none.

    A count that the tensors contradict is put right.
    """
    if not stages:
        return without_drafts(config)
    if "num_nextn_predict_layers" in config and wrong_draft_count(config, stages):
        return {**config, "num_nextn_predict_layers": stages}
    return config


def without_drafts(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that promises no draft stages, so that no engine looks for them."""
    kept = {k: v for k, v in config.items() if not k.startswith("dspark_")}
    if "num_nextn_predict_layers" in kept:
        kept["num_nextn_predict_layers"] = 0
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = without_drafts(kept["text_config"])
    return kept


def _output_file(file: str) -> str:
    # Always with an index, so that only the index, written last, makes the folder a checkpoint.
    if file == SINGLE_NAME:
        return "model-00001-of-00001.safetensors"
    return f"{PurePosixPath(file).stem}.safetensors" if file.endswith(".gguf") else file


def _check_accounted(
    checkpoint: Checkpoint, shards: Iterable[ShardPlan], dropped: Iterable[Dropped]
) -> None:
    """Every source tensor is used by exactly one unit, or dropped with a reason."""
    used = Counter(
        part.name
        for shard in shards
        for unit in shard.units
        if not unit.again
        for stored in unit.sources
        for part in stored.parts.values()
    )
    used.update(d.name for d in dropped)
    for name in checkpoint.tensors:
        if used[name] != 1:
            raise UnexpectedTensor(
                f"{checkpoint.path / checkpoint.tensors[name].file}: tensor '{name}' does not fit "
                "the model config.json describes; the files belong to different models"
            )


class _Planner:
    """Turns modules into units for one recipe, collecting what is dropped."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Dimensions,
        recipe: Recipe,
        found: Structure,
        kept: tuple[str, ...],
    ) -> None:
        self.kept = kept
        self.stored = found.stored
        self.checkpoint = checkpoint
        self.config = config
        self.recipe = recipe
        self.layout = recipe.layout
        self.scheme = recipe.expert_scheme
        self.dropped: list[Dropped] = []
        self.by_module = {n.module: n for n in found.names.values() if n}
        self.tensors_of: dict[str, list[str]] = {}
        for tensor, parsed in found.names.items():
            if parsed is not None:
                self.tensors_of.setdefault(parsed.module, []).append(tensor)
        self.unknown = [n for n, parsed in found.names.items() if parsed is None]

    def leading_modules(self) -> Iterator[str]:
        """One module per unit: w1 leads its expert; every other module leads itself.

        Of a draft stage that is dropped, half an expert may have no w1.
        """
        dropped = self.recipe.draft == "drop"
        for module, name in self.by_module.items():
            alone = name.is_draft and dropped
            if name.expert is None or name.projection == PROJECTIONS[0] or alone:
                yield module
        yield from self.unknown

    def unit(self, module: str) -> Unit | None:
        """The unit a module leads, or None when it is dropped."""
        name = self.by_module.get(module)
        if name is None:
            spec = self.checkpoint.spec(module)
            if spec.dtype not in TORCH_DTYPES:
                raise WrongDtype(
                    f"{self.checkpoint.path / spec.file}: unknown tensor '{spec}' has a dtype that "
                    "cannot be copied; remove it from the source"
                )
            return _copy(StoredWeight(module, {"": spec}, spec.shape, None))
        if name.is_draft and self.recipe.draft == "drop":
            self._drop(module, name, "draft stages are dropped by the recipe")
            return None
        if reason := self.layout.leaves_out(name, self.config):
            self._drop(module, name, reason)
            return None
        if name.expert is not None:
            return self._expert(name.stage, name.expert)
        return self._dense(name, self.stored[module])

    def _drop(self, module: str, name: TensorName, reason: str) -> None:
        modules = [module]
        if name.expert is not None and not (name.is_draft and self.recipe.draft == "drop"):
            modules = [expert_module(name.stage, name.expert, p) for p in PROJECTIONS]
        for m in modules:
            self.dropped += [Dropped(tensor, reason) for tensor in self.tensors_of.get(m, ())]

    def _expert(self, stage: str, expert: int) -> Unit:
        sources = tuple(self.stored[expert_module(stage, expert, p)] for p in PROJECTIONS)
        kept = stage in self.kept
        if kept and all(_is_native(stored) for stored in sources):
            return _copy(*sources)
        if kept:
            self._check_kept(sources[0])
        outputs: list[TensorSpec] = []
        for stored in sources:
            rows, columns = stored.shape
            projection = stored.module.rpartition(".")[2]
            wanted = MXFP4 if kept else self._wanted(stage, projection)
            if wanted.fitting(columns) is None:
                raise UnsupportedPair(
                    f"'{stored.module}' has {columns} input channels, no multiple of "
                    f"{wanted.name}'s group_size {wanted.group_size}; "
                    "choose a smaller group"
                )
            layout = DEEPSEEK if kept else self.layout
            parts = layout.expert_parts(wanted, (rows, columns))
            outputs += [
                TensorSpec(f"{stored.module}.{suffix}", dtype, shape)
                for suffix, (dtype, shape) in parts.items()
            ]
        return Unit("experts", sources, tuple(outputs))

    def _wanted(self, stage: str, projection: str) -> Scheme:
        return self.recipe.scheme_for(stage, projection).tiled(self.config.fp8_tile)

    def _check_kept(self, stored: StoredWeight) -> None:
        """Only a layout's own wish for MXFP4 drafts may change what is to be kept."""
        if not (self.layout.keeps_drafts and stored.module.startswith("mtp.")):
            raise UnsupportedPair(
                f"{self.checkpoint.path}: '{stored.module}' is {_coding(stored)}, and --on-inexact "
                "keep keeps MXFP4 experts only; use --on-inexact nearest or refuse"
            )

    def _table(self, stored: StoredWeight) -> Unit:
        """An Engram's table: as FP8 rows, or in the type that a format without them asks."""
        choices = self.layout.table_types
        if choices:
            return self._blocks(stored, self.recipe.engram or choices[0])
        dtypes = {part: spec.dtype for part, spec in stored.parts.items()}
        if dtypes == _ROWS_OF_FP8 and stored.scheme == SCHEMES["mxfp8"]:
            return _copy(stored)
        return self._rows_of_32(stored, "scale", "F8_E8M0")

    def _dense(self, name: TensorName, stored: StoredWeight) -> Unit:
        if name.role == "engram tables":
            return self._table(stored)
        dense = self.recipe.dense_for(place_of(name))
        blocks = dense in GGML_TYPES and GGML_TYPES[dense].is_block_type
        if blocks or (dense == "bf16" and not name.is_linear):
            return self._blocks(stored, dense)
        if not name.is_linear:
            return self._plain(name, stored)
        rule = self.layout.dense(self.scheme, name, self.config)
        if rule == "bf16":
            if stored.scheme is None and stored.first.dtype == "BF16":
                return _copy(stored)
            spec = TensorSpec(f"{stored.module}.weight", "BF16", stored.shape)
            return Unit("bf16", (stored,), (spec,))
        if rule == "mxfp8":
            return self._rows_of_32(stored, self.layout.dense_scale, "U8")
        return self._tiles(stored, "F32" if rule == "f32_scale" else "F8_E8M0")

    def _rows_of_32(self, stored: StoredWeight, part: str, dtype: str) -> Unit:
        """A matrix as MXFP8: codes, and under `part` a scale for each row and 32 columns."""
        rows, columns = stored.shape
        if columns % 32:
            raise UnsupportedPair(
                f"{self.checkpoint.path}: '{stored.module}' has {columns} input channels, no "
                f"multiple of the 32 that share a scale in this format; use --engine neutral, "
                "which carries dense matrices as BF16"
            )
        outputs = (
            TensorSpec(f"{stored.module}.weight", "F8_E4M3", (rows, columns)),
            TensorSpec(f"{stored.module}.{part}", dtype, (rows, columns // 32)),
        )
        return Unit("mxfp8", (stored,), outputs)

    def _tiles(self, stored: StoredWeight, scale_dtype: str) -> Unit:
        """A dense matrix where FP8 tiles are declared: as it is, or coded so."""
        scale, (rows, columns), tile = scale_part(stored), stored.shape, self.config.fp8_tile
        tiles = (-(-rows // tile[0]), -(-columns // tile[1]))
        is_fp8 = stored.scheme is not None and stored.scheme.element == "e4m3"
        if not is_fp8 or scale is None or scale.shape != tiles:
            outputs = (
                TensorSpec(f"{stored.module}.weight", "F8_E4M3", (rows, columns)),
                TensorSpec(f"{stored.module}.{self.layout.dense_scale}", scale_dtype, tiles),
            )
            return Unit("fp8", (stored,), outputs)
        name_out = f"{stored.module}.{self.layout.dense_scale}"
        weight = stored.parts["weight"]
        if scale.dtype == scale_dtype and scale.name == name_out and len(stored.parts) == 2:
            return _copy(stored)
        action: Action = "f32_scale" if scale_dtype == "F32" else "e8m0_scale"
        outputs = (
            TensorSpec(weight.name, weight.dtype, weight.shape),
            TensorSpec(name_out, scale_dtype, scale.shape),
        )
        return Unit(action, (stored,), outputs)

    def _plain(self, name: TensorName, stored: StoredWeight) -> Unit:
        """A tensor outside all matrices: as it is, or the same numbers in the layout's dtype."""
        spec = next(iter(stored.parts.values()))
        dtype = self.layout.plain(name, spec) if self.layout.plain else spec.dtype
        if stored.scheme is not None:  # as llama.cpp's quantizer leaves embeddings and routers
            wide = name.role == "hyper-connection" or name.module.endswith(_WIDE)
            own = spec.name if len(stored.parts) == 1 else f"{stored.module}.weight"
            dtype = "F32" if wide or dtype == "F32" else "BF16"
            return Unit("bf16", (stored,), (TensorSpec(own, dtype, stored.shape),))
        if dtype == spec.dtype:
            return _copy(stored)
        return Unit("recast", (stored,), (TensorSpec(spec.name, dtype, spec.shape),))

    def _blocks(self, stored: StoredWeight, dense: str) -> Unit:
        """A matrix that is not a routed expert's, in the type the recipe names for it."""
        rows, columns = stored.shape
        kind = get_type(fitting_type(dense, columns))
        name = f"{stored.module}.weight"
        if stored.first.dtype == kind.dtype and stored.base is None:
            return _copy(stored)
        if not kind.is_block_type:
            return Unit("bf16", (stored,), (TensorSpec(name, kind.dtype, stored.shape),))
        spec = TensorSpec(name, kind.dtype, (rows, kind.row_bytes(columns)))
        return Unit("blocks", (stored,), (spec,))


def _is_native(stored: StoredWeight) -> bool:
    """MXFP4 under the release's own names and dtypes."""
    dtypes = {part: spec.dtype for part, spec in stored.parts.items()}
    return stored.base is None and dtypes == {"weight": "I8", "scale": "F8_E8M0"}


def _coding(stored: StoredWeight) -> str:
    return stored.scheme.name if stored.scheme else stored.first.dtype.lower()


def _copy(*sources: StoredWeight) -> Unit:
    parts = [part for stored in sources for part in stored.parts.values()]
    return Unit("copy", sources, tuple(TensorSpec(s.name, s.dtype, s.shape) for s in parts))
