"""The commands that make, check and serve a candidate, as one would type them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from v4quant.conversion.gguf_files import part_names
from v4quant.planner.candidates import Candidate
from v4quant.planner.llama_cpp import RPC_PORT
from v4quant.planner.machines import Machine
from v4quant.recipe import Recipe
from v4quant_formats.gguf.file_names import clean_name, quant_label
from v4quant_formats.layouts.choices import DEFAULT_SPLIT

_HUB = "hf://"
_BUILD = (
    "git clone https://github.com/ggml-org/llama.cpp",
    "cmake -S llama.cpp -B llama.cpp/build {flag}",
    "cmake --build llama.cpp/build --config Release -j --target {targets}",
)
_REMOTE = "-DGGML_RPC=ON"
_BACKENDS = {
    "metal": "-DGGML_METAL=ON", "vulkan": "-DGGML_VULKAN=ON", "cuda": "-DGGML_CUDA=ON",
    "": "-DGGML_CUDA=ON", "amd": "-DGGML_HIP=ON", "cpu": "-DGGML_NATIVE=ON",
}  # fmt: skip


@dataclass(frozen=True)
class Commands:
    """Shell lines by purpose; a step that is not needed has none.

    sglang: another way to serve the same files.
    """

    fetch: tuple[str, ...]
    make: tuple[str, ...]
    check: tuple[str, ...]
    serve: tuple[str, ...]
    sglang: tuple[str, ...] = ()


def commands_for(
    candidate: Candidate, machine: Machine, source: str, max_memory: str, model: str = ""
) -> Commands:
    """What to type. source: a folder or `hf://` repository, which is downloaded first. model: the
    name that GGUF files get, where it is not the folder's."""
    folder, fetch = _local(source)
    name = folder.rstrip("/\\").replace("\\", "/").rpartition("/")[2].replace(":", "-")
    model = model or clean_name(name)
    if candidate.recipe is None and not candidate.budget:
        served = source.removeprefix(_HUB).partition("@")[0] if fetch else folder
        line = f"v4quant verify {_q(folder)} --engine {candidate.engine}{_gpu(machine)}"
        check = [] if fetch else [line + _split(candidate)]
        serve = _serve(candidate, machine, served, model)
        return Commands((), (), tuple(check), serve, _sglang(candidate, served))
    out = f"{name}-{_short(candidate)}"
    check = [
        f"v4quant verify {_q(out)} --source {_q(folder)}",
        f"v4quant verify {_q(out)} --engine {candidate.engine}{_gpu(machine)}{_split(candidate)}",
    ]
    if candidate.loss.basis != "exact":
        check.append(
            f"v4quant evaluate {_q(out)} --reference {_q(folder)} --tokens 8192 "
            f"--max-memory {max_memory} --report {_q(out)}.html"
        )
    make = tuple(_make(candidate, folder, out, max_memory))
    return Commands(fetch, make, tuple(check), _serve(candidate, machine, out, model))


def _local(source: str) -> tuple[str, tuple[str, ...]]:
    """The folder a source is read from, and how it gets there."""
    if not source.startswith(_HUB):
        return source, ()
    repo, _, revision = source.removeprefix(_HUB).partition("@")
    folder = repo.rpartition("/")[2]
    at = f" --revision {_q(revision)}" if revision else ""
    return folder, (f"hf download {_q(repo)}{at} --local-dir {_q(folder)}",)


def _short(candidate: Candidate) -> str:
    """What is added to the model's name; mixtures for two engines are two folders."""
    if candidate.recipe is not None:
        return candidate.recipe.scheme
    return "mixed" if candidate.engine == "vllm" else "mixed-GGUF"


def _make(candidate: Candidate, folder: str, out: str, max_memory: str) -> list[str]:
    memory = f" --max-memory {max_memory}"
    level = candidate.cost.level if candidate.cost is not None else None
    solves = level is not None and level.solves
    stats = f" --stats {_q(out)}-solved" if solves else ""
    lines = []
    if level is not None and level.weighs:
        stats = f" --stats {_q(out)}.v4q"
        lines.append(
            f"v4quant calibrate {_q(folder)} --out {_q(out)}.v4q --tokens {level.tokens}{memory}"
        )
    weighed = stats if not solves else ""
    if candidate.recipe is None:
        recipe = f"--recipe {_q(out)}.toml"
        lines.append(
            f"v4quant allocate {_q(folder)} --out {_q(out)}.toml --budget {candidate.budget} "
            f"{_allocation(candidate)} --measure-kl{weighed}"
        )
    else:
        recipe = _recipe_options(candidate.recipe)
    if solves:
        assert level is not None
        solve = recipe if candidate.recipe is None else _solve_options(candidate.recipe)
        extra = "".join(f" {o}" for o in level.options)
        lines.append(
            f"v4quant calibrate {_q(folder)} --out {_q(out)}-solved {solve} "
            f"--tokens {level.tokens}{extra}{memory}"
        )
    lines.append(f"v4quant quantize {_q(folder)} {_q(out)} {recipe}{stats}{memory}")
    return lines


def _allocation(candidate: Candidate) -> str:
    if candidate.engine == "llama.cpp":
        tables = f" --engram {candidate.engram}" if candidate.engram else ""
        return f"--format gguf --dense {candidate.dense}{tables} --draft drop"
    return f"--format compressed-tensors --engine vllm{_drafts(candidate)}"


def _drafts(candidate: Candidate) -> str:
    return " --draft drop" if any("draft stages" in note for note in candidate.notes) else ""


def _recipe_options(recipe: Recipe) -> str:
    options = [f"--scheme {recipe.scheme}", f"--format {recipe.format}"]
    if recipe.engine != "neutral":
        options.append(f"--engine {recipe.engine}")
    if recipe.dense:
        options.append(f"--dense {recipe.dense}")
    if recipe.engram:
        options.append(f"--engram {recipe.engram}")
    if recipe.draft != "convert":
        options.append(f"--draft {recipe.draft}")
    return " ".join(options)


def _solve_options(recipe: Recipe) -> str:
    dense = f" --dense {recipe.dense}" if recipe.dense else ""
    return f"--solve {recipe.scheme}{dense}"


def _serve(candidate: Candidate, machine: Machine, out: str, name: str) -> tuple[str, ...]:
    options = " ".join(candidate.options)
    if candidate.engine == "vllm":
        return (*candidate.before, f"vllm serve {_q(out)} {options}")
    backend = machine.unified or ("amd" if machine.is_amd else "")
    flag = _BACKENDS["cpu" if machine.card is None else backend]
    targets, before = "llama-server", candidate.before
    if any(option.startswith("--rpc ") for option in candidate.options):
        flag, targets = f"{flag} {_REMOTE}", f"{targets} ggml-rpc-server"
        worker = f"llama.cpp/build/bin/ggml-rpc-server --host 0.0.0.0 --port {RPC_PORT} --cache"
        before = (*before, f"{worker}  # on every other box, after the lines above")
    build = tuple(line.format(flag=flag, targets=targets) for line in _BUILD)
    server = f"llama.cpp/build/bin/llama-server -m {_model_file(candidate, out, name)} {options}"
    return (*build, *before, server)


def _sglang(candidate: Candidate, folder: str) -> tuple[str, ...]:
    if not candidate.sglang:
        return ()
    options = " ".join(candidate.sglang)
    return (f"python -m sglang.launch_server --model-path {_q(folder)} {options}",)


def _model_file(candidate: Candidate, out: str, name: str) -> str:
    """The file that llama.cpp is given; of a mixture, as which it will be chosen is not known."""
    if candidate.recipe is None:
        part = "-00001-of-*" if candidate.size > DEFAULT_SPLIT else ""
        return f"{_q(out)}/{_q(name)}-*{part}.gguf"
    stem = f"{name}-{quant_label(candidate.recipe.scheme)}"
    return _q(f"{out}/{part_names(stem, candidate.files)[0]}")


def _gpu(machine: Machine) -> str:
    return f" --gpu {machine.generation}" if machine.generation else ""


def _split(candidate: Candidate) -> str:
    cards = len(candidate.where.cards)
    return f" --tp {cards}" if candidate.engine == "vllm" and cards > 1 else ""


def _q(text: str) -> str:
    return shlex.quote(text)
