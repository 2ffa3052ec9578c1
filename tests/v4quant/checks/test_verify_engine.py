"""`verify --engine`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.conversion import TINY
from v4quant.cli import cli

Converted = Callable[[str], Path]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["verify", *arguments])


def test_a_good_file(converted: Converted) -> None:
    found = run(str(converted("int4-g32")), "--engine", "vllm", "--tp", "2")
    assert found.exit_code == 0, found.output
    for text in ("vLLM should load it", "sm90 (H100", "1 or 2 GPUs", "memory of one of 2"):
        assert text in found.stdout, text


def test_a_checkpoint_without_manifest() -> None:
    """Other people's checkpoints have none."""
    assert not (TINY / "v4quant.json").exists()
    assert run(str(TINY), "--engine", "sglang").exit_code == 0


def test_a_file_for_another_engine(converted: Converted) -> None:
    found = run(str(converted("int4-g32@vllm")), "--engine", "sglang")
    assert found.exit_code == 3
    assert "SGLang would NOT load it" in found.stdout and "remedy: " in found.stdout


def test_a_card_without_kernels(converted: Converted) -> None:
    found = run(str(converted("mxfp4")), "--engine", "vllm", "--gpu", "sm86")
    assert found.exit_code == 3 and "does not run on sm86" in found.stdout


def test_json(converted: Converted) -> None:
    table = json.loads(run(str(converted("nvfp4")), "--engine", "sglang", "--json").stdout)
    assert table["loads"] is False and table["engine"] == "sglang"
    assert {f["severity"] for f in table["findings"]} == {"error", "note"}  # no tokenizer
    assert set(table["memory"]) == {"tp", "context", "weights", "kv_cache", "tables"}


@pytest.mark.parametrize("value", ["vlllm", "VLLM", ""])
def test_a_mistyped_engine(value: str, converted: Converted) -> None:
    found = run(str(converted("mxfp4")), "--engine", value)
    assert found.exit_code == 2 and "vllm" in found.output


def test_with_a_source_both_are_checked(converted: Converted) -> None:
    found = run(str(converted("mxfp4")), "--engine", "vllm", "--source", str(TINY))
    assert found.exit_code == 0, found.output
    assert "vLLM should load it" in found.stdout and "All checks passed" in found.stdout
