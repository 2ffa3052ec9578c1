"""Recipe: which tensor gets which scheme, and what to do when exactness or knowledge runs out.

A recipe is a small TOML file or the command line's options; both end up in the same frozen
`Recipe`. Unknown keys are errors: a misspelt option must not quietly do nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from v4quant.sizes import parse_size
from v4quant.targets import EXPERTS, WHOLE, Place, group_of, place_name, read_places
from v4quant_calibration.defaults import SOLVER_NAMES
from v4quant_formats.errors import FormatError
from v4quant_formats.layouts.choices import DEFAULT_SPLIT, ENGINE_CHOICES, NEUTRAL
from v4quant_formats.layouts.layout import Layout
from v4quant_formats.layouts.table import choose_layout
from v4quant_formats.small_files import read_small
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.near_names import did_you_mean, not_one_of
from v4quant_kernels.scheme import SCHEMES, Scheme, get_scheme

_CHOICES = {
    "draft": ("convert", "drop"),
    "on_inexact": ("nearest", "keep", "refuse"),
    "unknown": ("refuse", "copy"),
    "engine": ENGINE_CHOICES,
    "solver": SOLVER_NAMES,
}

MIN_SPLIT = 10**6
_MAX_BYTES = 2**20


class RecipeError(V4QuantError):
    """A recipe file or option that cannot be understood."""


@dataclass(frozen=True)
class Recipe:
    """What `quantize` shall do.

    scheme: how routed experts (draft stages included) are coded.
    format: the container; "" means the scheme's default.
    draft: convert MTP/DSpark stages like the trunk, or drop them.
    on_inexact: a cast that cannot hold every value takes the nearest and counts what changed, keeps
        the stage's experts in the source format, or refuses.
    unknown: tensors no V4 release has are refused, or copied byte for byte.
    engine: write the variant of the format that this engine wants, or the neutral one.
    solver: how integer codes are found: rtn, optimal, or gptq (which needs a solution of
        `calibrate --solve`).
    dense: how dense matrices are coded, for formats that leave a choice (gguf); "" is exact BF16.
    engram: how the tables of V4.1's Engram are coded, for formats that leave a choice (gguf); "" is
        exact BF16 there, and byte for byte elsewhere.
    split_size: largest file, like 45GB, for formats that write one file (gguf); "" is 45GB.
    schemes: (place, scheme) of layers and projections that differ from `scheme` and `dense`, the
        table [schemes] of a file (places.py), for formats that can say so (gguf; by whole layers
        compressed-tensors with engine vllm).
    """

    scheme: str
    format: str = ""
    draft: str = "convert"
    on_inexact: str = "nearest"
    unknown: str = "refuse"
    engine: str = NEUTRAL
    solver: str = "optimal"
    dense: str = ""
    engram: str = ""
    split_size: str = ""
    schemes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Check every choice. Raises RecipeError, UnsupportedScheme or UnsupportedPair."""
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise RecipeError(f"recipe: {key} = {not_one_of(getattr(self, key), allowed)}")
        object.__setattr__(self, "format", self.layout.name)
        if self.on_inexact == "keep" and not self.layout.can_keep:
            wider = self.expert_scheme.wider
            remedy = f", or {wider}, which holds every MXFP4 value" if wider else ""
            raise RecipeError(
                f"on_inexact = 'keep' does not work with {self.scheme} in {self.format}: that "
                f"format declares one scheme for all experts; use nearest or refuse{remedy}"
            )
        self._check_gguf()
        self._check_places()
        if self.solver == "gptq" and not self._can_be_solved():
            raise RecipeError(
                "recipe: solver = 'gptq' is for integers and GGUF's block types; "
                f"{self.scheme} is cast from MXFP4"
            )

    def _can_be_solved(self) -> bool:
        """Whether anything is coded by a scheme that error feedback is for."""
        names = {self.scheme, self.dense, *self.places.values()} & SCHEMES.keys()
        return any(get_scheme(name).coder for name in names)

    def _check_gguf(self) -> None:
        """What only formats that leave a choice take."""
        for key, types in (("dense", self.layout.dense_types), ("engram", self.layout.table_types)):
            value, where = getattr(self, key), f" in {self.format}"
            if value and not types:
                raise RecipeError(f"recipe: {key} = '{value}'{where} has no effect there")
            if value and value not in types:
                raise RecipeError(f"recipe: {key} = {not_one_of(value, types, where)}")
        if self.split_size and self.layout.index:
            raise RecipeError(f"recipe: split_size has no effect in {self.format}; it is for gguf")
        if self.split_bytes < MIN_SPLIT:
            raise RecipeError(
                f"recipe: split_size = '{self.split_size}' is below {MIN_SPLIT // 10**6}MB"
            )

    def _check_places(self) -> None:
        """Schemes of places: known, and of a format that can mix them."""
        if self.places and not self.layout.mixes:
            raise RecipeError(
                f"recipe: [schemes] does not work in {self.format} for {self.engine}: its config "
                "declares one scheme for all experts; gguf says the type of every tensor, and "
                "compressed-tensors with engine = 'vllm' the scheme of every layer"
            )
        for (stage, group), scheme in self.places.items():
            allowed = self.layout.schemes if group in EXPERTS else self.layout.dense_types
            allowed = (*allowed, "f32") if group == "hyper" else allowed
            if scheme not in allowed:
                told = "dense matrices are as the format has them"
                if allowed:
                    told = not_one_of(scheme, allowed)
                raise RecipeError(f"recipe: [schemes] {place_name((stage, group))} = {told}")
            if group in EXPERTS and self.layout.mixes == "layer":
                self._check_layer(stage)

    def _check_layer(self, stage: str) -> None:
        """A layer's experts have one scheme, where the engine fuses them under one."""
        gate, down = self.scheme_for(stage, "w1").name, self.scheme_for(stage, "w2").name
        if gate != down:
            raise RecipeError(
                f"recipe: [schemes] gives {stage}.gate_up {gate} and {stage}.down {down}; "
                f"{self.engine} builds a layer's experts in one scheme, so give both the same"
            )

    @cached_property
    def places(self) -> dict[Place, str]:
        """The table [schemes] by place, ranges written out."""
        return read_places(self.schemes)

    def asking_text(self, how: str) -> list[str]:
        """Its schemes whose search asks for statistics of a text: `how` is "needed" or "wanted".

        Embedding and head may have any type, in llama.cpp too: a lookup has no inputs to weigh.
        """
        places = {name for (_, group), name in self.places.items() if group not in WHOLE}
        asked = {self.scheme, self.dense, *places} & SCHEMES.keys()
        return sorted(name for name in asked if SCHEMES[name].text == how)

    def scheme_for(self, stage: str, projection: str) -> Scheme:
        """The scheme of a stage's experts' w1, w2 or w3 (where its rows fit the scheme)."""
        return get_scheme(self.places.get((stage, group_of(projection)), self.scheme))

    def dense_for(self, place: Place | None) -> str:
        """How a place's matrices other than routed experts' are coded; "" for as they are."""
        if place is None:
            return ""
        return self.places.get(place, self.dense if place[1] == "dense" else "")

    @property
    def expert_schemes(self) -> tuple[Scheme, ...]:
        """All schemes that experts may get."""
        own = {name for (_, group), name in self.places.items() if group in EXPERTS}
        return tuple(get_scheme(name) for name in sorted({self.scheme, *own}))

    @property
    def split_bytes(self) -> int:
        """The largest file, in bytes (where the format asks)."""
        return parse_size(self.split_size) if self.split_size else DEFAULT_SPLIT

    @property
    def expert_scheme(self) -> Scheme:
        """The scheme of the routed experts."""
        return get_scheme(self.scheme)

    @property
    def layout(self) -> Layout:
        """The container layout."""
        return choose_layout(self.expert_scheme, self.format or None, self.engine)

    def as_dict(self) -> dict[str, Any]:
        """All fields, resolved, for the manifest; the same form as a TOML file's table."""
        return {**asdict(self), "schemes": dict(self.schemes)}


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What is said of a key that a table cannot have."""
    return f"unknown key '{key}'; {did_you_mean(key, known)}known are {', '.join(known)}"


def recipe_from_table(table: Mapping[str, Any], where: str) -> Recipe:
    """Build a recipe from a TOML table. Raises RecipeError naming the key."""
    known = {f.name for f in fields(Recipe)}
    for key, value in table.items():
        if key not in known:
            raise RecipeError(f"{where}: {unknown_key(key, sorted(known))}")
        if key == "schemes":
            texts = isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
            if not texts:
                raise RecipeError(f"{where}: 'schemes' must be a table of places and schemes")
        elif not isinstance(value, str):
            raise RecipeError(f"{where}: '{key}' must be a string")
    if "scheme" not in table:
        raise RecipeError(f"{where}: 'scheme' is missing")
    schemes = tuple(table.get("schemes", {}).items())
    return Recipe(**{**table, "schemes": schemes})


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises RecipeError with file and reason."""
    try:
        return tomllib.loads(read_small(path, _MAX_BYTES).decode())
    except FormatError as error:
        raise RecipeError(str(error)) from None
    except (ValueError, RecursionError) as error:  # tables in tables, numbers of 5,000 digits
        raise RecipeError(f"{path}: cannot be read as TOML ({error})") from None
