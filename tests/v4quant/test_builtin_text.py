"""The texts that ship: halves that share nothing, a licence for each, every mode, any budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import v4quant
from v4quant.builtin import (
    CALIBRATION,
    HELDOUT,
    MIXED_CALIBRATION,
    MIXED_HELDOUT,
    TINY_V4,
    resolve_corpus,
    resolve_source,
)
from v4quant_calibration.corpus.chat_dialects import DIALECTS
from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus

DATA = Path(v4quant.__file__).parent / "data"
SHINGLE = 64
# Idioms and one author's licence header; Python's modules have them in common.
CODE = "heldout-code.txt"


def texts(file: Path) -> list[str]:
    """What a model is given of a file, without the JSON around it."""
    content = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return [content]
    found: list[str] = []
    for line in content.splitlines():
        row = json.loads(line)
        if "text" in row:
            found.append(row["text"])
        for message in row.get("messages", []):
            calls = [c["function"]["arguments"] for c in message.get("tool_calls", [])]
            found += [message["content"], message.get("reasoning_content", ""), *calls]
    return found


def test_the_halves_share_nothing() -> None:
    seen = {
        hash(text[i : i + SHINGLE])
        for file in resolve_corpus([MIXED_CALIBRATION])
        for text in texts(file)
        for i in range(len(text) - SHINGLE + 1)
    }
    for file in resolve_corpus([MIXED_HELDOUT]):
        shared = held = 0
        for text in texts(file):
            held += len(text)
            shared += sum(
                hash(text[i : i + SHINGLE]) in seen for i in range(len(text) - SHINGLE + 1)
            )
        print(file.name, shared, held)
        assert shared <= (held * 0.02 if file.name == CODE else 0), file.name


def test_every_file_has_its_licence() -> None:
    notice = (DATA / "NOTICE").read_text(encoding="utf-8")
    files = sorted((DATA / "text").iterdir())
    assert files == sorted(resolve_corpus([MIXED_CALIBRATION, MIXED_HELDOUT]))
    for file in files:
        assert f"text/{file.name}" in notice
    # Of the files beyond the first two kinds there are a few hundred kilobytes.
    more = set(files) - set(resolve_corpus([CALIBRATION, HELDOUT]))
    assert sum(file.stat().st_size for file in more) < 500_000


def test_the_published_figures_keep_their_text() -> None:
    for name, half in ((CALIBRATION, "calibration"), (HELDOUT, "heldout")):
        assert [f.name for f in resolve_corpus([name])] == [f"{half}-code.txt", f"{half}-prose.txt"]


@pytest.mark.parametrize("name", [MIXED_CALIBRATION, MIXED_HELDOUT])
def test_any_budget_is_met_and_every_mode_is_a_part(name: str) -> None:
    folder = resolve_source(TINY_V4)
    config = json.loads((folder / "config.json").read_text())
    files = resolve_corpus([name])

    def load(tokens: int) -> dict[str, int]:
        request = CorpusRequest(None, tokens, config["bos_token_id"], config["vocab_size"])
        return {
            p.name: p.tokens for p in load_corpus(files, folder / "tokenizer.json", request).parts
        }

    parts = load(60_000)
    print(parts)
    half = name.rpartition("-")[2]
    assert set(parts) == {
        *(f"{half}-{kind}" for kind in ("code", "prose", "docs", "c-js", "languages")),
        *(f"{half}-chats ({mode})" for mode in DIALECTS["preview"].efforts),
    }
    assert 60_000 <= sum(parts.values()) < 70_000
    # What the chats lack, the others give.
    assert (
        parts[f"{half}-prose"]
        > 10_000
        > sum(parts[f"{half}-chats ({m})"] for m in DIALECTS["preview"].efforts)
    )
