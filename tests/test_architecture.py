"""What import contracts cannot see: imports hidden in functions, and the size of rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "v4quant", "calibration/v4quant_calibration", "formats/v4quant_formats",
    "kernels/v4quant_kernels",
)  # fmt: skip
FILES = sorted(f for p in PACKAGES for f in (ROOT / p).rglob("*.py"))
# Compilers take time to load: `native/__init__.py` says that its rooms are entered late.
LATE = ("v4quant_kernels.native.", "v4quant_kernels.native", "v4quant_kernels.gpu.")
LONGEST = 440


def hidden_imports(file: Path) -> list[str]:
    """Imports of ours inside functions without a comment that says why, but for LATE rooms.

    A comment on the first of several lines counts for all of them.
    """
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = []
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        explained = False
        for node in function.body:
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            for item in inner:
                module = getattr(item, "module", None) or item.names[0].name
                explained = explained or "#" in lines[item.lineno - 1]
                ours = module.startswith("v4quant") and not module.startswith(LATE)
                if ours and not explained:
                    found.append(f"{file.relative_to(ROOT)}:{item.lineno}: {module}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_hides_in_a_function(package: str) -> None:
    hidden = [h for f in FILES if f.is_relative_to(ROOT / package) for h in hidden_imports(f)]
    assert not hidden, hidden


def name_comparisons(file: Path) -> list[str]:
    """Comparisons of a scheme's name with a literal; the scheme's row answers what they ask."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        names = [
            side
            for side in sides
            if isinstance(side, ast.Attribute)
            and side.attr == "name"
            and "scheme" in ast.unparse(side.value)
        ]
        literal = any(isinstance(c, ast.Constant) for side in sides for c in ast.walk(side))
        if names and literal:
            found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_facts_of_a_scheme_are_asked_of_its_row() -> None:
    assert not [line for file in FILES for line in name_comparisons(file)]


def test_comparisons_of_names_are_found(tmp_path: Path) -> None:
    source = "a = q.scheme.name == 'mxfp4'\nb = scheme.name in ('int8', x)\nc = s.name == t.name\n"
    copy = tmp_path / "made_up.py"
    copy.write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        assert len(name_comparisons(copy)) == 2


def test_rooms_are_small() -> None:
    lines = {str(f.relative_to(ROOT)): len(f.read_bytes().splitlines()) for f in FILES}
    large = {name: count for name, count in lines.items() if count > LONGEST}
    assert not large, large


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(f.relative_to(ROOT))
        for f in FILES
        if f.stat().st_size and ast.get_docstring(ast.parse(f.read_bytes())) is None
    ]
    assert not silent, silent


def test_no_text_depends_on_the_locale_or_on_line_ends() -> None:
    """Text is read with its encoding named and written as bytes: elsewhere UTF-8 is no default, and
    Windows turns line ends over, after which digests and notes no longer agree."""
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            named = any(k.arg == "encoding" for k in node.keywords)
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            opens = node.func.attr in ("open", "fdopen") and modes and modes[-1] in ("r", "w", "a")
            reads = node.func.attr == "read_text" and not node.args
            if ((opens or reads) and not named) or node.func.attr == "write_text":
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found, found
