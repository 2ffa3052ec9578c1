"""Edits of the files that say what tokens are: each contradiction is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from v4quant.builtin import resolve_source
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.structure import find_defects
from v4quant_formats.vocabulary_files import odd_vocabulary

SOURCES = [resolve_source(f"builtin:tiny-{name}") for name in ("v4", "v41")]
Tables = dict[str, dict[str, Any]]
T, C, G = "tokenizer.json", "tokenizer_config.json", "generation_config.json"


def odd(tables: Tables, folder: Path) -> list[str]:
    """What is said of the first model with these files in place of its own."""
    for name, table in tables.items():
        (folder / name).write_text(json.dumps(table))
    with open_checkpoint(SOURCES[0]) as opened:
        config = json.loads((folder / "config.json").read_text())
        return list(odd_vocabulary(replace(opened, path=folder, config=config)))


def swap_ids(t: Tables) -> None:
    first, second = t[T]["added_tokens"][:2]
    first["id"], second["id"] = second["id"], first["id"]


def forget_half(t: Tables) -> None:
    vocabulary = t[T]["model"]["vocab"]
    for token in [k for k, n in vocabulary.items() if n >= 1024]:
        del vocabulary[token]


EDITS: list[tuple[Callable[[Tables], object], str]] = [
    (swap_ids, "config.json's bos_token_id is 0, tokenizer.json has"),
    (forget_half, "merges tokens that its vocabulary has not"),
    (lambda t: t[T]["added_tokens"][0].update(special=False), "as plain text"),
    (lambda t: t[T]["added_tokens"][1].update(id=10**6), "beyond config.json's vocab_size 2048"),
    (lambda t: t[T]["added_tokens"][5].update(id=4), "two tokens each"),
    (lambda t: (t[T]["added_tokens"].pop(0), t[T]["model"]["vocab"].pop("<｜begin▁of▁sentence｜>")),
     "texts begin"),
    (lambda t: t[T].update(normalizer={"type": "Lowercase"}), "a normalizer"),
    (lambda t: t[T].update(pre_tokenizer=None), "into bytes"),
    (lambda t: t[T]["model"].update(type="WordPiece"), "not byte-level BPE"),
    (lambda t: t[T]["model"].update(merges=[]), "lacks the merges"),
    (lambda t: t[T].clear(), "not byte-level BPE"),
    (lambda t: t["config.json"].update(eos_token_id=7), "eos_token_id is 7"),
    (lambda t: t[G].update(eos_token_id=9), "generation_config.json's eos_token_id is 9"),
    (lambda t: t[C].update(bos_token="hello"), "bos_token is 'hello', which"),
    (lambda t: t[C].update(eos_token={"content": "<think>"}), "config.json says 1"),
    (lambda t: t[C].update(chat_template="{{ x }}"), "not V4's"),
    (lambda t: t.update({"added_tokens.json": {"<new>": 3}}), "added_tokens.json says"),
    (lambda t: t.update({"special_tokens_map.json": {"eos_token": "<end>"}}), "'<end>', which"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "text"), EDITS)
def test_contradictions_are_named(
    edit: Callable[[Tables], object], text: str, tmp_path: Path
) -> None:
    names = (T, C, G, "config.json")
    tables = {n: json.loads((SOURCES[0] / n).read_text()) for n in names}
    assert odd(tables, tmp_path) == []
    edit(tables)
    told = odd(tables, tmp_path)
    assert any(text in problem for problem in told), told


def test_two_templates_and_a_file_that_is_cut(tmp_path: Path) -> None:
    for name in (T, C, G, "config.json"):
        shutil.copy(SOURCES[0] / name, tmp_path)
    settings = json.loads((tmp_path / C).read_text())
    (tmp_path / "chat_template.jinja").write_text("<｜User｜>{{ a }}")
    assert odd({C: {**settings, "chat_template": "<｜User｜>{{ a }}\n"}}, tmp_path) == []
    [told] = odd({C: {**settings, "chat_template": "<｜User｜>{{ b }}"}}, tmp_path)
    assert "two different chat templates" in told
    (tmp_path / T).write_text((SOURCES[0] / T).read_text()[:999])
    assert any("cannot be read as JSON" in p for p in odd({C: settings}, tmp_path))


@pytest.mark.parametrize("source", SOURCES)
def test_the_models_own_are_sound(source: Path) -> None:
    with open_checkpoint(source) as opened:
        assert find_defects(opened).notes == ()
