"""What a conversion cannot carry is said before it begins, and --tokenizer supplies it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader

import v4quant
from tests.support.conversion import convert
from tests.support.rewritten_gguf import rewrite
from v4quant.builtin import resolve_source
from v4quant.recipe import Recipe
from v4quant_formats.errors import UnknownTokenizer

TINY = resolve_source("builtin:tiny-v4")
TOKENIZER = "tokenizer.ggml"


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model as one GGUF file."""
    folder = tmp_path_factory.mktemp("lone")
    convert(TINY, folder / "out", Recipe("mxfp4", format="gguf", draft="drop"))
    (made,) = (folder / "out").glob("*.gguf")
    return made.rename(folder / "model.gguf")


def said(source: Path, format: str, caplog: pytest.LogCaptureFixture, **more: Path) -> str:
    """What planning the conversion warns of."""
    caplog.clear()
    scheme = "bf16" if format == "deepseek" else "mxfp4"
    recipe = v4quant.make_recipe(scheme=scheme, format=format)
    with caplog.at_level(logging.WARNING):
        v4quant.plan_quantize(source, "out", recipe=recipe, **more)
    return " ".join(r.getMessage() for r in caplog.records if "not be complete" in r.getMessage())


@pytest.mark.parametrize(
    ("without", "gguf", "folder"),
    [
        ((f"{TOKENIZER}.tokens",), "no tokenizer", "no tokenizer"),
        (("tokenizer.chat_template",), "no chat template", ""),
        ((f"{TOKENIZER}.bos_token_id", f"{TOKENIZER}.eos_token_id"), "eos_token_id", ""),
        ((f"{TOKENIZER}.merges",), "merges' is absent", "refused"),
        ((f"{TOKENIZER}.token_type",), "special tokens become", "refused"),
        ((f"{TOKENIZER}.pre",), "default rule", "refused"),
    ],
)
def test_a_gguf_without_words(
    without: tuple[str, ...],
    gguf: str,
    folder: str,
    lone: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bare = rewrite(lone, tmp_path / "model.gguf", without=without)
    told = said(bare, "gguf", caplog)
    assert gguf in told and "--tokenizer" in told
    if folder == "refused":
        with pytest.raises(UnknownTokenizer, match="--tokenizer"):
            said(bare, "deepseek", caplog)
    else:
        assert folder in said(bare, "deepseek", caplog)
    for format in ("gguf", "deepseek"):
        assert not said(bare, format, caplog, tokenizer=TINY)
    assert not said(lone, "gguf", caplog) and not said(lone, "deepseek", caplog)


def test_the_given_tokenizer_travels(lone: Path, tmp_path: Path) -> None:
    bare = rewrite(lone, tmp_path / "model.gguf", without=(f"{TOKENIZER}.tokens",))
    words = tmp_path / "words"
    words.mkdir()
    shutil.copy(TINY / "tokenizer.json", words)
    shutil.copy(TINY / "tokenizer_config.json", words)
    v4quant.quantize(bare, tmp_path / "a", scheme="q8_0", format="gguf", tokenizer=words)
    (made,) = (tmp_path / "a").glob("*.gguf")
    fields = GGUFReader(made).fields
    release = GGUFReader(lone).fields
    for key in ("tokens", "merges", "token_type", "bos_token_id", "eos_token_id"):
        own, given = (f[f"{TOKENIZER}.{key}"].contents() for f in (release, fields))
        assert own == given, key
    assert "tokenizer.chat_template" in fields and "general.name" in fields
    v4quant.quantize(bare, tmp_path / "b", scheme="bf16", format="deepseek", tokenizer=words)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (TINY / name).read_bytes()
    # Another tokenizer is another conversion, and not taken for a finished one.
    table = json.loads((words / "tokenizer.json").read_text())
    table["added_tokens"] = table["added_tokens"][:-1]
    (words / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(v4quant.V4QuantError, match="not empty"):
        v4quant.quantize(bare, tmp_path / "a", scheme="q8_0", format="gguf", tokenizer=words)


def test_a_folder_without_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert "link out of the folder" in said(folder, "deepseek", caplog)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").touch()
    told = said(folder, "deepseek", caplog)
    assert "no tokenizer" in told and "tokenizer.model is not carried" in told
    assert "no tokenizer" in said(folder, "gguf", caplog)
    assert not said(TINY, "gguf", caplog) and not said(TINY, "deepseek", caplog)
