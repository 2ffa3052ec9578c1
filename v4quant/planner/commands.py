"""The commands that make, check and serve a candidate, as one would type them.

Lists of words until the end, when `v4quant.shell` quotes them for the shell of the system they are
for. vLLM and SGLang run on Linux only, so what starts them is for `sh` whatever the rest is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from v4quant.conversion.gguf_files import part_names
from v4quant.planner.candidates import Candidate
from v4quant.planner.llama_cpp import RPC_PORT
from v4quant.planner.machines import Machine
from v4quant.recipe import Recipe
from v4quant.shell import Shell, command_line, quoted
from v4quant_formats.gguf.file_names import clean_name, quant_label
from v4quant_formats.layouts.choices import DEFAULT_SPLIT

_HUB = "hf://"
_CLONE = "git clone https://github.com/ggml-org/llama.cpp"
_CONFIGURE = "cmake -S llama.cpp -B llama.cpp/build"
_BUILD = "cmake --build llama.cpp/build --config Release -j --target"
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
    candidate: Candidate,
    machine: Machine,
    source: str,
    max_memory: str,
    model: str = "",
    shell: Shell = "sh",
) -> Commands:
    """What to type. source: a folder or `hf://` repository, which is downloaded first. model: the
    name that GGUF files get, where it is not the folder's."""
    folder, fetch = _local(source)
    name = folder.rstrip("/\\").replace("\\", "/").rpartition("/")[2].replace(":", "-")
    model = model or clean_name(name)
    loads = ["--engine", candidate.engine, *_gpu(machine), *_split(candidate)]
    if candidate.recipe is None and not candidate.budget:
        out = source.removeprefix(_HUB).partition("@")[0] if fetch else folder
        check = [] if fetch else [["v4quant", "verify", folder, *loads]]
        fetch, make = [], []
    else:
        out = f"{name}-{_short(candidate)}"
        check = [
            ["v4quant", "verify", out, "--source", folder],
            ["v4quant", "verify", out, *loads],
        ]
        if candidate.loss.basis != "exact":
            check.append(
                ["v4quant", "evaluate", out, "--reference", folder, "--tokens", "8192",
                 "--max-memory", max_memory, "--report", f"{out}.html"]
            )  # fmt: skip
        make = _make(candidate, folder, out, max_memory)
    also = (_sglang(candidate.sglang, out),) if candidate.sglang else ()
    fetched, made, checked = (
        tuple(command_line(words, shell) for words in group) for group in (fetch, make, check)
    )
    if candidate.engine == "llama.cpp":
        serve = _llama_server(candidate, machine, out, model, shell)
    else:
        server = command_line(["vllm", "serve", out, *_words(candidate.options)], "sh")
        if candidate.engine == "sglang":
            server = _sglang(candidate.options, out)
        linux = () if shell == "sh" else (_remark("# in WSL, as it runs on Linux only", shell),)
        serve = (*candidate.before, *linux, server)
    return Commands(fetched, made, checked, serve, also)


def _local(source: str) -> tuple[str, list[list[str]]]:
    """The folder a source is read from, and how it gets there."""
    if not source.startswith(_HUB):
        return source, []
    repo, _, revision = source.removeprefix(_HUB).partition("@")
    folder = repo.rpartition("/")[2]
    at = ["--revision", revision] if revision else []
    return folder, [["hf", "download", repo, *at, "--local-dir", folder]]


def _short(candidate: Candidate) -> str:
    """What is added to the model's name; mixtures for two engines are two folders."""
    if candidate.recipe is not None:
        return candidate.recipe.scheme
    return "mixed" if candidate.engine == "vllm" else "mixed-GGUF"


def _make(candidate: Candidate, folder: str, out: str, max_memory: str) -> list[list[str]]:
    memory = ["--max-memory", max_memory]
    level = candidate.cost.level if candidate.cost is not None else None
    solves = level is not None and level.solves
    stats = ["--stats", f"{out}-solved"] if solves else []
    lines = []
    if level is not None and level.weighs:
        stats = ["--stats", f"{out}.v4q"]
        lines.append(
            ["v4quant", "calibrate", folder, "--out", f"{out}.v4q", "--tokens", str(level.tokens),
             *memory]
        )  # fmt: skip
    if candidate.recipe is None:
        recipe = ["--recipe", f"{out}.toml"]
        lines.append(
            ["v4quant", "allocate", folder, "--out", f"{out}.toml", "--budget",
             str(candidate.budget), *_allocation(candidate), "--measure-kl",
             *([] if solves else stats)]
        )  # fmt: skip
    else:
        recipe = _recipe_options(candidate.recipe)
    if solves:
        assert level is not None
        solve = recipe if candidate.recipe is None else _solve_options(candidate.recipe)
        lines.append(
            ["v4quant", "calibrate", folder, "--out", f"{out}-solved", *solve, "--tokens",
             str(level.tokens), *level.options, *memory]
        )  # fmt: skip
    lines.append(["v4quant", "quantize", folder, out, *recipe, *stats, *memory])
    return lines


def _allocation(candidate: Candidate) -> list[str]:
    if candidate.engine == "llama.cpp":
        tables = ["--engram", candidate.engram] if candidate.engram else []
        return ["--format", "gguf", "--dense", candidate.dense, *tables, "--draft", "drop"]
    drafts = any("draft stages" in note for note in candidate.notes)
    engine = ["--format", "compressed-tensors", "--engine", "vllm"]
    return [*engine, *(["--draft", "drop"] if drafts else [])]


def _recipe_options(recipe: Recipe) -> list[str]:
    told = {
        "scheme": recipe.scheme,
        "format": recipe.format,
        "engine": recipe.engine if recipe.engine != "neutral" else "",
        "dense": recipe.dense,
        "engram": recipe.engram,
        "draft": recipe.draft if recipe.draft != "convert" else "",
    }
    return [word for key, value in told.items() if value for word in (f"--{key}", value)]


def _solve_options(recipe: Recipe) -> list[str]:
    return ["--solve", recipe.scheme, *(["--dense", recipe.dense] if recipe.dense else [])]


def _words(options: Sequence[str]) -> list[str]:
    """`--option value` as two words; a value may hold spaces."""
    return [word for option in options for word in option.split(" ", 1)]


def _llama_server(
    candidate: Candidate, machine: Machine, out: str, name: str, shell: Shell
) -> tuple[str, ...]:
    """To build llama.cpp, what its system must be told first, and the server."""
    backend = machine.unified or ("amd" if machine.is_amd else "")
    flags = [_BACKENDS["cpu" if machine.card is None else backend]]
    targets, before = ["llama-server"], [_remark(line, shell) for line in candidate.before]
    if any(option.startswith("--rpc ") for option in candidate.options):
        flags.append(_REMOTE)
        targets.append("ggml-rpc-server")
        worker = [_program("ggml-rpc-server", shell), "--host", "0.0.0.0", "--port", str(RPC_PORT)]
        before += [
            _remark("# on every other box, after the lines above:", shell),
            command_line([*worker, "--cache"], shell),
            _remark("# and on the box that serves:", shell),
        ]
    build = (_CLONE, " ".join([_CONFIGURE, *flags]), " ".join([_BUILD, *targets]))
    server = command_line([_program("llama-server", shell), "-m"], shell)
    rest = command_line(_words(candidate.options), shell)
    if candidate.recipe is not None:
        model = quoted(_joined((out, _model_file(candidate, name)), shell), shell)
        return (*build, *before, f"{server} {model} {rest}")
    # Of a mixture the name of the file is not known: it ends in the scheme that most of it has.
    part = "-00001-of-*" if candidate.size > DEFAULT_SPLIT else ""
    return (*build, *before, _with_found_file(server, out, f"{name}-*{part}.gguf", rest, shell))


def _with_found_file(server: str, out: str, pattern: str, rest: str, shell: Shell) -> str:
    """The server with the file of `out` that a pattern means, which only `sh` puts in itself."""
    found = _joined((out, pattern), shell)
    if shell == "powershell":
        return f"{server} (Resolve-Path {quoted(found, shell)}) {rest}"
    if shell == "cmd":
        return f'for %f in ("{found}") do {server} "%f" {rest}'
    return f"{server} {quoted(f'{out}/', shell)}{pattern} {rest}"


def _remark(line: str, shell: Shell) -> str:
    """A line that may be a remark, in the shell's own form."""
    return f"rem{line[1:]}" if shell == "cmd" and line.startswith("#") else line


def _program(name: str, shell: Shell) -> str:
    """Where llama.cpp's build puts a program; Visual Studio's has a folder a configuration."""
    parts = ("llama.cpp", "build", "bin")
    return _joined((*parts, name) if shell == "sh" else (*parts, "Release", f"{name}.exe"), shell)


def _joined(parts: Sequence[str], shell: Shell) -> str:
    return ("/" if shell == "sh" else "\\").join(parts)


def _sglang(options: Sequence[str], folder: str) -> str:
    """SGLang's server, behind the variables of the environment among its options."""
    variables = [o for o in options if not o.startswith("--")]
    start = ["python", "-m", "sglang.launch_server", "--model-path", folder]
    rest = _words([o for o in options if o.startswith("--")])
    return command_line([*variables, *start, *rest], "sh")


def _model_file(candidate: Candidate, name: str) -> str:
    """The file that llama.cpp is given: the first part."""
    assert candidate.recipe is not None
    return part_names(f"{name}-{quant_label(candidate.recipe.scheme)}", candidate.files)[0]


def _gpu(machine: Machine) -> list[str]:
    return ["--gpu", machine.generation] if machine.generation else []


def _split(candidate: Candidate) -> list[str]:
    cards = len(candidate.where.cards)
    return ["--tp", str(cards)] if candidate.engine != "llama.cpp" and cards > 1 else []
