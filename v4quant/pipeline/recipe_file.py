"""pipeline: the file behind `v4quant run`, read and checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from v4quant.recipe import Recipe, RecipeError, read_toml, recipe_from_table
from v4quant_calibration.corpus.chat_dialects import DEFAULT_MODE, MODES, is_mode
from v4quant_calibration.defaults import MIN_TOKENS

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class CorpusStep:
    """Which text a step reads, how much of it, and how chats without a mode are encoded."""

    corpus: tuple[str, ...]
    tokens: int | None = None
    seq_len: int | None = None
    activations: str = "plain"
    min_tokens: int = MIN_TOKENS
    mode: str = DEFAULT_MODE


@dataclass(frozen=True)
class VerifyStep:
    """What verification does after conversion."""

    source: bool = True
    kernels: bool = True


@dataclass(frozen=True)
class Pipeline:
    """A run file: source, then the steps that are present, in pipeline order.

    target: the repository that receives the checkpoint ("hf://owner/name"), or "" for a folder.
    """

    source: str
    recipe: Recipe
    calibrate: CorpusStep | None
    verify: VerifyStep | None
    evaluate: CorpusStep | None
    target: str = ""


def load_pipeline(name: str) -> Pipeline:
    """Read a run file, or a preset by name (`demo`). Raises RecipeError naming the key."""
    path = PRESETS / f"{name}.toml"
    if not path.is_file() or "/" in name:
        path = Path(name)
    if not path.is_file():
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        raise RecipeError(f"{name}: no such run file; presets are: {presets}")
    table = read_toml(path)
    known = {"source", "target", "calibrate", "quantize", "verify", "evaluate"}
    for key in table.keys() - known:
        raise RecipeError(f"{path}: unknown key '{key}'; known are {', '.join(sorted(known))}")
    if not isinstance(table.get("source"), str):
        raise RecipeError(f"{path}: 'source' (a checkpoint folder) is missing")
    if not isinstance(table.get("target", ""), str):
        raise RecipeError(f"{path}: 'target' must be a repository like \"hf://owner/name\"")
    if not isinstance(table.get("quantize"), dict):
        raise RecipeError(f"{path}: the [quantize] table is missing")
    return Pipeline(
        source=table["source"],
        recipe=recipe_from_table(table["quantize"], f"{path} [quantize]"),
        calibrate=_step(CorpusStep, table, "calibrate", path),
        verify=_step(VerifyStep, table, "verify", path),
        evaluate=_step(CorpusStep, table, "evaluate", path),
        target=table.get("target", ""),
    )


Step = TypeVar("Step", CorpusStep, VerifyStep)

_CHOICES = {"activations": ("plain", "kv", "official")}
_TYPES: dict[str, tuple[type, ...]] = {
    "tokens": (int,),
    "seq_len": (int,),
    "min_tokens": (int,),
    "activations": (str,),
    "mode": (str,),
    "source": (bool,),
    "kernels": (bool,),
}


def _step(kind: type[Step], table: Mapping[str, Any], name: str, path: Path) -> Step | None:
    values = table.get(name)
    if values is None:
        return None
    where = f"{path} [{name}]"
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: must be a table")
    allowed = {f.name for f in fields(kind)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in allowed:
            raise RecipeError(f"{where}: unknown key '{key}'; known are {', '.join(allowed)}")
        if key == "corpus":
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise RecipeError(f"{where}: 'corpus' must be a list of file names")
            checked[key] = tuple(value)
        elif not isinstance(value, _TYPES[key]) or (
            isinstance(value, bool) and bool not in _TYPES[key]
        ):
            raise RecipeError(f"{where}: '{key}' is {value!r}, expected {_TYPES[key][0].__name__}")
        elif type(value) is int and value < 1:
            raise RecipeError(f"{where}: '{key}' is {value}, expected a positive number")
        elif key == "mode" and not is_mode(str(value)):
            raise RecipeError(
                f"{where}: 'mode' is '{value}', expected one of {', '.join(MODES)}, think-1 to "
                "think-100"
            )
        elif key in _CHOICES and value not in _CHOICES[key]:
            raise RecipeError(
                f"{where}: '{key}' is '{value}', expected one of {', '.join(_CHOICES[key])}"
            )
        else:
            checked[key] = value
    if kind is CorpusStep and not checked.get("corpus"):
        raise RecipeError(f"{where}: 'corpus' is missing")
    return kind(**checked)
