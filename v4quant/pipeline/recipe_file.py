"""pipeline: the file behind `v4quant run`, read and checked before any work starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from v4quant.recipe import Recipe, RecipeError, read_toml, recipe_from_table, unknown_key
from v4quant_calibration.corpus.chat_dialects import DEFAULT_MODE, MODES, is_mode
from v4quant_calibration.corpus.chat_keys import CHAT_KEYS, MESSAGES
from v4quant_calibration.defaults import MIN_TOKENS
from v4quant_kernels.near_names import did_you_mean, not_one_of

KEYS: dict[str, dict[str, str]] = {
    "": {
        "source": "a folder, `hf://owner/name`, or `builtin:tiny-v4`",
        "tokenizer": "a tokenizer.json, or its folder, in place of the source's own",
        "target": 'the repository to publish to, like "hf://owner/name"; for a ladder, '
        "the prefix of all names",
    },
    "calibrate": {
        "corpus": "texts, token ids or chats: file names or built-in corpora",
        "tokens": "how many tokens of it to read",
        "seq_len": "length of a window",
        "activations": "`plain`, `kv`, or `official` for the release's own rounding",
        "min_tokens": "tokens that every expert should see",
        "mode": "how chats that name no mode are encoded",
        "chat_keys": "under which keys rows have chats: `messages`, `sharegpt` or "
        "`prompt-completion`",
        "skip_bad_rows": "rows of each file that may be left out because they cannot be read",
        "propagate": "where codes are solved: later layers see converted ones",
    },
    "quantize": {
        "name": "in a ladder: name of the folder, suffix of the repository; by default the scheme",
        "scheme": "how routed experts are coded",
        "format": "the container; by default the scheme's own",
        "draft": "draft stages: `convert` or `drop`",
        "on_inexact": "when a cast cannot hold a value: `nearest`, `keep` or `refuse`",
        "unknown": "tensors no release has: `refuse`, or `copy` byte for byte",
        "engine": "write what this engine wants: `neutral`, `vllm` or `sglang`",
        "solver": "how codes are found: `rtn`, `optimal`, or `gptq`, which calibration solves; by "
        "default `gptq` where this machine does it within a day, else `optimal`",
        "dense": "type of the dense matrices, for gguf",
        "engram": "type of V4.1's n-gram tables, for gguf",
        "split_size": "largest file, like 45GB, for gguf",
        "schemes": "a table of places with their own schemes",
    },
    "verify": {
        "source": "compare every value with the source",
        "kernels": "run the kernels on tensors of the result",
    },
    "evaluate": {
        "corpus": "as for `calibrate`, but with different text",
        "tokens": "how many tokens of it to score",
        "seq_len": "length of a window",
        "activations": "as for `calibrate`",
        "mode": "as for `calibrate`",
        "chat_keys": "as for `calibrate`",
        "skip_bad_rows": "as for `calibrate`",
    },
}
"""Every key of a run file, by table, and what it says (docs/run-file.md is made of it)."""

PRESETS = Path(__file__).parent / "presets"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = {
    "checkpoint", "source", "candidate", "solution",
    "stats.v4q", "evaluation.json", "report.html", "report.md", "steps.json",
}  # fmt: skip
# A ladder's solutions begin so, what --overwrite makes ends so, and Windows has devices so called
# and drops a point at the end.
_TAKEN = re.compile(
    r"solution-.*|.*\.v4quant-(new|old)|.*\.|(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)


@dataclass(frozen=True)
class CorpusStep:
    """Which text a step reads, how much of it, how chats without a mode are encoded, under which
    keys they are, and how many rows that cannot be read may be left out.

    propagate: where calibration solves, layers are solved on what the converted ones give them.
    """

    corpus: tuple[str, ...]
    tokens: int | None = None
    seq_len: int | None = None
    activations: str = "plain"
    min_tokens: int = MIN_TOKENS
    mode: str = DEFAULT_MODE
    chat_keys: str = MESSAGES
    skip_bad_rows: int = 0
    propagate: bool = True


@dataclass(frozen=True)
class VerifyStep:
    """What verification does after conversion."""

    source: bool = True
    kernels: bool = True


@dataclass(frozen=True)
class Rung:
    """One conversion of a run. name: of its folder, and behind its repository's, in a ladder.

    names_solver: whether the file says how codes are found; else the machine's time decides.
    """

    name: str
    recipe: Recipe
    names_solver: bool = True


@dataclass(frozen=True)
class Pipeline:
    """A run file: source, then the steps that are present, in pipeline order.

    rungs: the conversions; more than one are a ladder. tokenizer: a tokenizer.json from elsewhere,
    "" for the source's own. target: the repository that receives the
    checkpoint ("hf://owner/name"; of a ladder, what all names begin with), or "" for folders.
    """

    source: str
    rungs: tuple[Rung, ...]
    calibrate: CorpusStep | None
    verify: VerifyStep | None
    evaluate: CorpusStep | None
    target: str = ""
    tokenizer: str = ""

    @property
    def recipe(self) -> Recipe:
        """The first conversion's recipe."""
        return self.rungs[0].recipe

    @property
    def is_ladder(self) -> bool:
        """Whether there are several conversions."""
        return len(self.rungs) > 1


MODELS = ("v4", "v41")


def load_pipeline(name: str, model: str = MODELS[0]) -> Pipeline:
    """Read a run file, or a preset by name (`demo`). Raises RecipeError naming the key.

    model: the one that a preset is for; a run file names its own.
    """
    if model not in MODELS:
        raise RecipeError(
            f"there is no model '{model}' to demonstrate; choose {' or '.join(MODELS)}"
        )
    own = name if model == MODELS[0] else f"{name}-{model}"
    path = PRESETS / f"{own}.toml"
    if not path.is_file() or "/" in name:
        path = Path(name)
        if model != MODELS[0] and path.is_file():
            raise RecipeError(f"{path}: names its own source, so --model {model} has no effect")
    if not path.is_file():
        presets = sorted(p.stem for p in PRESETS.glob("*.toml"))
        meant = did_you_mean(name, presets)
        raise RecipeError(f"{name}: no such run file; {meant}presets are: {', '.join(presets)}")
    table = read_toml(path)
    known = {"source", "tokenizer", "target", "calibrate", "quantize", "verify", "evaluate"}
    for key in table.keys() - known:
        raise RecipeError(f"{path}: {unknown_key(key, sorted(known))}")
    if not isinstance(table.get("source"), str):
        raise RecipeError(f"{path}: 'source' (a checkpoint folder) is missing")
    if not isinstance(table.get("target", ""), str):
        raise RecipeError(f"{path}: 'target' must be a repository like \"hf://owner/name\"")
    if not isinstance(table.get("tokenizer", ""), str):
        raise RecipeError(f"{path}: 'tokenizer' must be a path")
    return Pipeline(
        source=table["source"],
        rungs=_rungs(table.get("quantize"), path),
        calibrate=_step(CorpusStep, table, "calibrate", path),
        verify=_step(VerifyStep, table, "verify", path),
        evaluate=_step(CorpusStep, table, "evaluate", path),
        target=table.get("target", ""),
        tokenizer=table.get("tokenizer", ""),
    )


def _may_be_named(name: str) -> bool:
    """Whether a conversion's folder of this name is one everywhere, and beside the others."""
    taken = name.lower() in _RESERVED or _TAKEN.fullmatch(name)
    return bool(_NAME.fullmatch(name)) and not taken


def _rungs(tables: Any, path: Path) -> tuple[Rung, ...]:
    """The [quantize] table, or all of [[quantize]]; each may have a `name`, else its scheme is."""
    if isinstance(tables, dict):
        tables = [tables]
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise RecipeError(f"{path}: the [quantize] table is missing")
    several, rungs = len(tables) > 1, list[Rung]()
    for number, table in enumerate(tables, 1):
        where = f"{path} [quantize]" + (f" {number}" if several else "")
        recipe = recipe_from_table({k: v for k, v in table.items() if k != "name"}, where)
        name = table.get("name", recipe.scheme)
        if not isinstance(name, str) or not _may_be_named(name):
            raise RecipeError(
                f"{where}: name = {name!r} cannot name a folder beside the others; use letters, "
                f"digits, '.', '_' and '-', no device of Windows and none of "
                f"{', '.join(sorted(_RESERVED))}"
            )
        if name.lower() in {r.name.lower() for r in rungs}:
            raise RecipeError(f"{where}: two conversions are called '{name}'; give one a name")
        rungs.append(Rung(name, recipe, "solver" in table))
    return tuple(rungs)


Step = TypeVar("Step", CorpusStep, VerifyStep)

_CHOICES = {"activations": ("plain", "kv", "official"), "chat_keys": CHAT_KEYS}
_MAY_BE_ZERO = ("skip_bad_rows",)
_TYPES: dict[str, tuple[type, ...]] = {
    "tokens": (int,),
    "seq_len": (int,),
    "min_tokens": (int,),
    "activations": (str,),
    "mode": (str,),
    "chat_keys": (str,),
    "skip_bad_rows": (int,),
    "source": (bool,),
    "kernels": (bool,),
    "propagate": (bool,),
}


def _step(kind: type[Step], table: Mapping[str, Any], name: str, path: Path) -> Step | None:
    values = table.get(name)
    if values is None:
        return None
    where = f"{path} [{name}]"
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: must be a table")
    allowed = [f.name for f in fields(kind)]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in allowed:
            raise RecipeError(f"{where}: {unknown_key(key, allowed)}")
        if key == "corpus":
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise RecipeError(f"{where}: 'corpus' must be a list of file names")
            checked[key] = tuple(value)
        elif not isinstance(value, _TYPES[key]) or (
            isinstance(value, bool) and bool not in _TYPES[key]
        ):
            raise RecipeError(f"{where}: '{key}' is {value!r}, expected {_TYPES[key][0].__name__}")
        elif type(value) is int and value < (0 if key in _MAY_BE_ZERO else 1):
            raise RecipeError(f"{where}: '{key}' is {value}, expected a positive number")
        elif key == "mode" and not is_mode(str(value)):
            raise RecipeError(
                f"{where}: 'mode' is '{value}'; {did_you_mean(str(value), MODES)}expected one of "
                f"{', '.join(MODES)}, think-1 to think-100"
            )
        elif key in _CHOICES and value not in _CHOICES[key]:
            raise RecipeError(f"{where}: '{key}' is {not_one_of(str(value), _CHOICES[key])}")
        else:
            checked[key] = value
    if kind is CorpusStep and not checked.get("corpus"):
        raise RecipeError(f"{where}: 'corpus' is missing")
    return kind(**checked)
