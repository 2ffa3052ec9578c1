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
LONGEST = 460


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
