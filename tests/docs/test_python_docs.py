"""docs/python.md: its reference is the code's own."""

from __future__ import annotations

from tests.support.scripts import load_script

GENERATOR = load_script("gen_python_docs")


def test_the_reference_is_the_codes_own() -> None:
    assert GENERATOR.page() == GENERATOR.PAGE.read_text(encoding="utf-8")
