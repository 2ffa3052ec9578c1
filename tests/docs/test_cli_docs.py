"""docs/cli.md is the commands' own help, and every command's help shows how it is used."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import click
import pytest

from tests.support.scripts import load_script
from v4quant.pipeline.recipe_file import KEYS, CorpusStep, VerifyStep
from v4quant.recipe import Recipe

ROOT = Path(__file__).parents[2]


GENERATOR = load_script("gen_cli_docs")
COMMANDS: dict[str, click.Context] = dict(GENERATOR.commands())


def test_page_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    # By words, because another version of click may break lines elsewhere.
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split()
    assert written == GENERATOR.page().split(), "run: python scripts/gen_cli_docs.py"


def test_run_file_page_has_every_key_there_is() -> None:
    written = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    assert written == GENERATOR.run_page(), "run: python scripts/gen_cli_docs.py"
    steps = {f.name for f in fields(CorpusStep)}
    assert set(KEYS["calibrate"]) == steps
    assert set(KEYS["evaluate"]) == steps - {"min_tokens", "propagate"}
    assert set(KEYS["quantize"]) == {f.name for f in fields(Recipe)} | {"name"}
    assert set(KEYS["verify"]) == {f.name for f in fields(VerifyStep)}


def test_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = GENERATOR.page()
    monkeypatch.setenv("COLUMNS", "40")
    assert GENERATOR.page() == before
    assert all(len(line) <= 110 for line in before.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    told = " ".join(COMMANDS[name].get_help().split())
    used = name if name != "v4quant" else "v4quant run demo"
    assert used in told.split("Options:")[1], told


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    for option in COMMANDS[name].command.params:
        if isinstance(option, click.Option):
            assert option.help, option.opts
