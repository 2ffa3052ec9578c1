"""What the documents mention exists: files, links, functions, classes, commands and options."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache

import click
import pytest

from tests.docs.pages import ROOT, Page, pages
from v4quant.cli import cli

PACKAGES = ("v4quant", "kernels", "formats", "calibration")
SOURCES = (*PACKAGES, "scripts")
# Files that conversions and runs write, not this repository.
WRITTEN = {
    "v4quant-onnx.json", "config.json", "v4quant.json", "tokenizer.json", "report.html",
    "v4quant-recipe.toml",
}  # fmt: skip
every_page = pytest.mark.parametrize("page", pages(), ids=lambda p: p.name)


@cache
def defined_names() -> frozenset[str]:
    """Functions, classes and module constants of our own sources."""
    names: set[str] = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
                elif isinstance(node, ast.Assign):
                    names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return frozenset(names)


@cache
def file_names() -> frozenset[str]:
    """Base names of all files of the sources and tests."""
    return frozenset(p.name for f in (*SOURCES, "tests", "docs") for p in (ROOT / f).rglob("*.*"))


def paths_of(page: Page) -> list[str]:
    """Code spans that are paths of this repository."""
    top = {p.name for p in ROOT.iterdir()}
    words = [word for span in page.spans for word in span.split()]
    return [
        w for w in words if re.fullmatch(r"[\w.\-/]+", w) and w.split("/")[0] in top and "/" in w
    ]


def test_there_is_something_to_check() -> None:
    assert {p.name for p in pages()} >= {"README.md", "docs/architecture.md", "docs/formats.md"}
    assert sum(len(paths_of(p)) for p in pages()) > 60
    assert sum(len(p.command_lines) for p in pages()) > 15
    assert len(defined_names()) > 500


@every_page
def test_paths_exist(page: Page) -> None:
    missing = [path for path in paths_of(page) if not (ROOT / path).exists()]
    assert not missing, missing


@every_page
def test_file_names_exist(page: Page) -> None:
    bare = [s for s in page.spans if re.fullmatch(r"[\w\-]+\.(py|toml|json|html)", s)]
    present = file_names() | {p.name for p in ROOT.iterdir()} | WRITTEN
    assert set(bare) <= present, set(bare) - present


@every_page
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links:
        target = link.partition("#")[0]
        if "://" not in link and target:
            assert (page.path.parent / target).exists(), link


@every_page
def test_names_are_defined(page: Page) -> None:
    functions = {s.removesuffix("()") for s in page.spans if re.fullmatch(r"\w+\(\)", s)}
    classes = {s for s in page.spans if re.fullmatch(r"[A-Z][a-z0-9]+(?:[A-Z]\w*)?|[A-Z]Tensor", s)}
    constants = {s for s in page.spans if re.fullmatch(r"(?:SCHEMES|LAYOUTS)", s)}
    unknown = (functions | classes | constants) - defined_names() - {"Example"}
    assert not unknown, unknown


@every_page
def test_environment_variables_are_read(page: Page) -> None:
    sources = "".join(
        p.read_text(encoding="utf-8", errors="ignore")
        for f in (*SOURCES, "tests", ".ci")
        for p in (ROOT / f).rglob("*")
        if p.is_file() and (p.suffix == ".py" or not p.suffix)
    )
    options = {o.envvar for command in walk(cli) for o in command.params if o.envvar}
    for name in re.findall(r"\b(?:V4QUANT|TRITON)_[A-Z_]+\b", page.text):
        assert name in sources or name in options, name


def walk(command: click.Command) -> list[click.Command]:
    """A command and everything below it."""
    children = command.commands.values() if isinstance(command, click.Group) else ()
    return [command, *(c for child in children for c in walk(child))]


def check_command_line(line: str) -> None:
    """Parse a command line as the program would. Raises click.UsageError."""
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="v4quant")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command, context = found, click.Context(found, context, info_name=name)
    if isinstance(command, click.Group):
        return
    options, _, _ = command.make_parser(context).parse_args(list(words))
    # A bare mention of a command or of one option need not have all arguments.
    for parameter in command.params:
        given = options.get(parameter.name or "")
        if isinstance(parameter, click.Option) and isinstance(given, str):
            parameter.type.convert(given, parameter, context)
    if len([w for w in words if not w.startswith("-")]) >= 2:
        with command.make_context(command.name or "", list(words), parent=context.parent):
            pass


@pytest.mark.parametrize("line", sorted({line for page in pages() for line in page.command_lines}))
def test_command_lines_parse(line: str) -> None:
    try:
        check_command_line(line)
    except click.UsageError as error:
        pytest.fail(f"{line}: {error.format_message()}")


@pytest.mark.parametrize(
    "line",
    [
        "v4quant quantise a b",
        "v4quant quantize a b --shceme fp8",
        "v4quant evaluate a --activations some",
        "v4quant bench bread",
        "v4quant quantize a b c",
        "v4quant calibrate a b --floor 0 --out c",
    ],
)
def test_wrong_command_lines_are_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        check_command_line(line)


@every_page
def test_pages_name_nothing_outside(page: Page) -> None:
    outside = re.findall(r"(?<![\w.])/(?:work|tmp|root|home)\b[^\s`]*", page.text)
    assert not outside, outside
