"""`import v4quant`: what it offers, that commands are thin faces of it, that it loads lazily."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import v4quant
from tests.support.conversion import TINY
from v4quant.cli import COMMANDS, cli

CLI = Path(v4quant.__file__).parent / "cli"
VERBS = {
    "allocate", "calibrate", "diff", "encode", "evaluate", "export_onnx", "inspect", "plan",
    "push", "quantize", "run", "verify",
}  # fmt: skip
# A command may also say what its verb would do, and build the recipe it hands over.
BESIDE = {"quantize": {"make_recipe", "plan_quantize"}, "push": {"plan_push"},
          "run": {"plan_run"},
          "export_onnx": {"plan_export_onnx"}}  # fmt: skip
WITHOUT_LIBRARY = {"bench", "completion"}
HEAVY = ("torch", "numba", "gguf", "triton", "huggingface_hub", "tokenizers", "onnx")
RENAMED = {
    ("calibrate", "recipe_file"): "recipe", ("allocate", "utilization"): "gpu_memory_utilization",
    ("evaluate", "others"): "candidates", ("allocate", "stats_file"): "stats",
    ("export_onnx", "stats_file"): "stats", ("plan", "run_path"): "write",
    ("push", "repo_id"): "repo", ("quantize", "stats_file"): "stats",
    ("quantize", "recipe_file"): "recipe",
}  # fmt: skip
OWN = {
    "as_json", "dry_run", "quiet", "verbose", "log_file",  # how a result is printed
    "ids", "messages",  # encode: where the chat comes from and what is shown of it
}  # fmt: skip


def test_every_name_loads() -> None:
    assert list(v4quant.__all__) == sorted(v4quant.__all__)
    assert set(v4quant._HOMES) == set(v4quant.__all__)
    for name in v4quant.__all__:
        assert getattr(v4quant, name).__doc__, name
    assert set(v4quant.__all__) >= VERBS
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        v4quant.quantise  # noqa: B018


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_options_are_keywords_with_types(verb: str) -> None:
    signature = inspect.signature(getattr(v4quant, verb), eval_str=False)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter
    assert signature.return_annotation is not inspect.Signature.empty


def test_quantize_takes_what_make_recipe_takes() -> None:
    """The recipe's keywords, with the same types and defaults; `quantize` adds its own."""
    recipe = inspect.signature(v4quant.make_recipe).parameters
    quantize = inspect.signature(v4quant.quantize).parameters
    assert recipe and {name: quantize.get(name) for name in recipe} == dict(recipe)
    beside = set(inspect.signature(v4quant.plan_quantize).parameters) - {"recipe"}
    assert beside <= set(quantize)


def library_calls(file: Path) -> set[str]:
    """Functions of the library that a file calls, as `v4quant.name(...)`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "v4quant"
    }


@pytest.mark.parametrize("module", sorted(set(COMMANDS.values()) - WITHOUT_LIBRARY))
def test_a_command_calls_one_function(module: str) -> None:
    calls = library_calls(CLI / f"{module}.py")
    assert calls & VERBS == {module}
    assert calls - VERBS <= BESIDE.get(module, set())


def parameters() -> list[tuple[str, click.Parameter]]:
    """Every option and argument of the commands that have a verb."""
    found = []
    for name, module in COMMANDS.items():
        if module not in WITHOUT_LIBRARY:
            found += [(module, p) for p in cli.commands[name].params]
    return found


@pytest.mark.parametrize(("verb", "parameter"), parameters(), ids=str)
def test_options_have_the_librarys_defaults(verb: str, parameter: click.Parameter) -> None:
    name = str(parameter.name)
    if name in OWN or (verb, name) == ("encode", "tokenizer"):
        return
    name = RENAMED.get((verb, name), name.rstrip("_"))
    signature = inspect.signature(getattr(v4quant, verb))
    if verb == "quantize" and name not in signature.parameters:
        signature = inspect.signature(v4quant.make_recipe)
    assert name in signature.parameters, f"{verb}() has no {name}"
    default = signature.parameters[name].default
    if isinstance(parameter, click.Argument) or parameter.required:
        assert default is inspect.Parameter.empty
        return
    mine: Any = parameter.get_default(click.Context(cli))
    if "UNSET" in repr(mine):  # how click 8.3 says that there is no default
        mine = None
    if parameter.multiple:
        mine = tuple(mine or ())
        default = (default,) if isinstance(default, str) else default
    assert mine == default or (not mine and not default), f"{verb} {name}: {mine} {default}"


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["--nope"], ["quantise"], ["completion", "bash"],
     ["quantize", "--nope"], *([name, "--help"] for name in COMMANDS)],
    ids=" ".join,
)  # fmt: skip
def test_a_start_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from v4quant.cli import main\n"
        f"sys.argv = ['v4quant', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        f"print('loaded:', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.rstrip().endswith("loaded: []"), done.stdout[-200:]


def test_plans_are_made_without_torch(tmp_path: Path) -> None:
    """Of a release, of a folder, of GGUF files: its import would take longer than all the rest."""
    gguf = tmp_path / "gguf"
    v4quant.quantize(TINY, gguf, scheme="q4_k", format="gguf")
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from v4quant.cli import cli\n"
        "words = ['--machine', '2x3090', '--ram', '128GB', '--context', '4096']\n"
        f"for source in ('flash', {str(TINY)!r}, {str(gguf)!r}):\n"
        "    cli(['plan', source, *words], standalone_mode=False)\n"
        f"write = ['--write', {str(tmp_path / 'run.toml')!r}, '--engine', 'llama.cpp']\n"
        f"cli(['plan', {str(TINY)!r}, *words, *write], standalone_mode=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("machine: 2 x RTX 3090") == 4 and (tmp_path / "run.toml").exists()


def completed(words: str, incomplete: str) -> str:
    """What bash's completion offers."""
    done = subprocess.run(
        [sys.executable, "-m", "v4quant"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={
            "PYTHONPATH": ":".join(sys.path),
            "_V4QUANT_COMPLETE": "bash_complete",
            "COMP_WORDS": f"v4quant {words} {incomplete}",
            "COMP_CWORD": str(len(words.split()) + 1),
        },
    )
    return done.stdout


@pytest.mark.parametrize(
    ("words", "incomplete", "offered"),
    [
        ("", "quan", "quantize"),
        ("quantize a b --scheme", "int4", "int4-g128"),
        ("quantize a b --scheme", "q4", "q4_k"),
        ("quantize a b --engine", "v", "vllm"),
        ("quantize a b --format", "gg", "gguf"),
        ("verify out --engine", "llama", "llama.cpp"),
        ("run", "dem", "demo"),
        ("inspect", "builtin", "builtin:tiny-v4"),
        ("quantize", "some", "dir,some"),
    ],
)
def test_completion(words: str, incomplete: str, offered: str) -> None:
    assert offered in completed(words, incomplete)


def test_three_lines_convert_a_checkpoint(tmp_path: Path) -> None:
    """As a stranger's script does, in a process of its own."""
    script = (
        "import v4quant\n"
        f"done = v4quant.quantize({str(TINY)!r}, {str(tmp_path / 'out')!r}, scheme='int4-g32')\n"
        f"print(done.lossy_tensors, v4quant.verify(done.output, source={str(TINY)!r}).ok)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    lossy, ok = done.stdout.split()
    assert int(lossy) > 0 and ok == "True" and done.stderr == ""


def test_a_notebook_sees_bars(tmp_path: Path) -> None:
    """An interactive session (sys.ps1) is shown progress without asking for it."""
    script = (
        "import sys; sys.ps1 = '>>> '\n"
        "import v4quant\n"
        f"v4quant.quantize({str(TINY)!r}, {str(tmp_path / 'out')!r}, scheme='mxfp4')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert "100%" in done.stderr and done.stdout == ""


def test_a_floor_of_no_tokens_is_refused(tmp_path: Path) -> None:
    """Statistics with such a floor could not be read again."""
    with pytest.raises(v4quant.V4QuantError, match="min_tokens is 0"):
        v4quant.calibrate(TINY, tmp_path / "stats", min_tokens=0)
    assert not (tmp_path / "stats").exists()


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(v4quant.V4QuantError, match="give one of"):
        v4quant.allocate(TINY, tmp_path / "recipe.toml")
    with pytest.raises(v4quant.V4QuantError, match="no scheme given"):
        v4quant.quantize(TINY, tmp_path / "out")
