"""Units: what becomes of every tensor, module by module, before anything is dealt to files.

A unit is what must be seen together: an expert's w1, w3 and w2; a weight and its scale; matrices
that engines fuse. What no unit takes is dropped with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from v4quant.conversion.units import Action, Dropped, Unit
from v4quant.recipe import Recipe
from v4quant.targets import check_places, place_of, places_of
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import (
    PROJECTIONS,
    TensorName,
    draft_stages,
    expert_module,
)
from v4quant_formats.errors import UnsupportedPair, WrongDtype
from v4quant_formats.layouts.deepseek import DEEPSEEK
from v4quant_formats.model_config import Dimensions
from v4quant_formats.spec import TORCH_NAMES, TensorSpec
from v4quant_formats.structure import Structure, check_structure
from v4quant_formats.weights import StoredWeight, scale_part
from v4quant_kernels.ggml_types import GGML_TYPES, fitting_type, get_type
from v4quant_kernels.scheme import MXFP4, SCHEMES, Scheme

# What engines read V4.1's tables as, whatever config.json says.
_ROWS_OF_FP8 = {"weight": "F8_E4M3", "scale": "F8_E8M0"}
# Tensors that releases hold in float32.
_WIDE = ("attn_sink", "ape", "gate.bias", "gate.bias_vl")


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
        from v4quant.conversion.exactness import inexact_stages  # reads data, so it needs torch

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
            if spec.dtype not in TORCH_NAMES:
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
                f"{self.checkpoint.path}: '{stored.module}' is {stored.coding}, and --on-inexact "
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
        spec = stored.first
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


def _copy(*sources: StoredWeight) -> Unit:
    parts = [part for stored in sources for part in stored.parts.values()]
    return Unit("copy", sources, tuple(TensorSpec(s.name, s.dtype, s.shape) for s in parts))
