"""Every command that reads text takes chats under other keys, and counts bad rows left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import v4quant
from tests.support.rewritten_gguf import rewrite
from v4quant.builtin import resolve_source
from v4quant.cli import cli

TINY = resolve_source("builtin:tiny-v4")
TURNS = [{"from": "human", "value": "What is a house?"}, {"from": "gpt", "value": "A home. " * 9}]
READING = ("--chat-keys", "sharegpt", "--skip-bad-rows", "2")
SHORT = ("--tokens", "64", "--seq-len", "16", "--json")
RUN = """
source = "builtin:tiny-v4"
[calibrate]
corpus = ["{text}"]
tokens = 64
seq_len = 16
min_tokens = 1
chat_keys = "sharegpt"
skip_bad_rows = 2
[quantize]
scheme = "int8-g32"
draft = "drop"
[evaluate]
corpus = ["{text}"]
tokens = 64
seq_len = 16
chat_keys = "sharegpt"
skip_bad_rows = 2
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rows = [json.dumps({"conversations": TURNS}) for _ in range(20)]
    rows[3], rows[9] = "{broken", json.dumps({"text": "of another kind"})
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    return tmp_path / "chats.jsonl"


def printed(*words: object) -> Any:
    found = CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=False)
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout)


def test_evaluate(text: Path) -> None:
    found = printed("evaluate", TINY, "--corpus", text, *READING, *SHORT)
    assert found["skipped_rows"] == 2
    told = CliRunner().invoke(cli, ["evaluate", str(TINY), "--corpus", str(text), *READING,
                                    *SHORT[:-1]])  # fmt: skip
    assert "rows left out" in told.stdout


def test_calibrate(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.v4q"
    words = ("--out", out, "--min-tokens", 1, "--corpus", text)
    found = printed("calibrate", TINY, *words, *READING, *SHORT)
    assert found["skipped_rows"] == 2 and out.exists()


def test_run(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(RUN.format(text=text))
    words = [str(w) for w in ("run", file, "--out", tmp_path / "out", "--json")]
    found = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert json.loads(found.stdout)["evaluation"]["skipped_rows"] == 2
    assert "2 of the rows read are unusable and were left out" in found.stderr


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "allocate"])
def test_one_bad_row_too_many_is_told(command: str, text: Path, tmp_path: Path) -> None:
    more = {
        "evaluate": (),
        "calibrate": ("--out", tmp_path / "s"),
        "allocate": ("--out", tmp_path / "r", "--bpw", 9, "--measure-kl"),
    }[command]
    words = [command, TINY, *more, "--corpus", text, "--chat-keys", "sharegpt", *SHORT]
    found = CliRunner().invoke(cli, [*map(str, words), "--skip-bad-rows", "1"])
    assert found.exit_code == 1
    told = str(found.exception)
    assert "line 10" in told and "1 bad row before it" in told


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    """For a lone .gguf without one, the release's; text is then what it is of the release."""
    with_one = tmp_path / "out"
    v4quant.quantize(TINY, with_one, scheme="mxfp4", format="gguf", draft="drop")
    [model] = with_one.glob("*.gguf")
    lone = rewrite(model, tmp_path / "lone.gguf", without=("tokenizer.ggml.tokens",))
    (tmp_path / "a.txt").write_text("The house was quiet. " * 40)
    text = ("--corpus", tmp_path / "a.txt", *SHORT)
    found = CliRunner().invoke(cli, [str(w) for w in ("evaluate", lone, *text)])
    assert found.exit_code == 1 and "give it by --tokenizer" in str(found.exception)
    release = TINY / "tokenizer.json"
    mine = printed("evaluate", lone, *text, "--tokenizer", release)
    theirs = printed("evaluate", model, *text)
    assert mine["tokens"] == theirs["tokens"] and mine["perplexity"] == theirs["perplexity"]
    out = ("--out", tmp_path / "stats.v4q", "--min-tokens", 1)
    assert printed("calibrate", lone, *out, *text, "--tokenizer", release)["tokens"] >= 64
