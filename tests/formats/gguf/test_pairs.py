"""Pairs of a GGUF file beside the architecture's: every odd one is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.rewritten_gguf import rewrite
from v4quant.api.conversion import quantize
from v4quant_formats.errors import UnknownTokenizer, WrongMetadata
from v4quant_formats.gguf.carried import carried_files
from v4quant_formats.gguf.checkpoint import metadata_of
from v4quant_formats.gguf.pairs import odd_pairs
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.structure import find_defects
from v4quant_kernels.progress import SilentProgress

Pairs = dict[str, Any]
T = "tokenizer.ggml"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "out"
    quantize("builtin:tiny-v4", out, scheme="q8_0", draft="drop", progress=SilentProgress())
    return next(out.glob("*.gguf"))


@pytest.fixture(scope="module")
def pairs(file: Path) -> Pairs:
    return dict(metadata_of(file))


ODD: list[tuple[Callable[[Pairs], object], str]] = [
    (lambda p: p.update({"general.type": "adapter"}), "not 'model'"),
    (lambda p: p.update({"general.name": 7}), "general.name is '7', not a string"),
    (lambda p: p.update({"general.quantization_version": 3}), "read as version 2's"),
    (lambda p: p.update({"general.file_type": "7"}), "not an integer"),
    (lambda p: p.update({"general.sampling.temp": 1}), "not a float"),
    (lambda p: p.update({"tokenizer.chat_template": ["x"]}), "not a string"),
    (lambda p: p.update({f"{T}.bos_token_id": "0"}), "not an integer"),
    (lambda p: p.update({f"{T}.eos_token_id": 10**6}), "but there are"),
    (lambda p: p.update({f"{T}.add_bos_token": 1}), "not true or false"),
    (lambda p: p.update({f"{T}.tokens": 7}), "no list of texts"),
    (lambda p: p[f"{T}.tokens"].__setitem__(9, p[f"{T}.tokens"][8]), "1 tokens twice"),
    (lambda p: p[f"{T}.merges"].append(3), "no list of texts"),
    (lambda p: p[f"{T}.token_type"].__setitem__(3, 77), "there are not"),
    (lambda p: p[f"{T}.token_type"].pop(), "entries for"),
]


@pytest.mark.parametrize(("change", "text"), ODD)
def test_odd_pairs_are_named(change: Callable[[Pairs], object], text: str, pairs: Pairs) -> None:
    copied = {k: list(v) if isinstance(v, list) else v for k, v in pairs.items()}
    assert not list(odd_pairs(copied))
    change(copied)
    assert any(text in problem for problem in odd_pairs(copied)), list(odd_pairs(copied))


def test_the_check_of_structure_names_them(file: Path, tmp_path: Path) -> None:
    keys = {f"{T}.eos_token_id": 10**6, "general.quantization_version": 3}
    rewrite(file, tmp_path / file.name, keys=keys)
    with open_checkpoint(tmp_path) as opened:
        notes = find_defects(opened).notes
    assert len(notes) == 3, notes  # config.json's id is another statement
    (tmp_path / "x").mkdir()
    keys = {"deepseek4.embedding_length_out": 7}
    with pytest.raises(WrongMetadata, match="embedding_length_out"):
        open_checkpoint(rewrite(file, tmp_path / "x" / file.name, keys=keys))


def test_a_tokenizer_that_holds_no_water_is_not_made(pairs: Pairs) -> None:
    for key, change in (("merges", lambda v: [*v, "a\u2603 b"]), ("tokens", lambda v: [*v, v[0]])):
        odd = {**pairs, f"{T}.{key}": change(pairs[f"{T}.{key}"])}
        if key == "tokens":
            odd[f"{T}.token_type"] = [*odd[f"{T}.token_type"], 1]
        with pytest.raises(UnknownTokenizer, match=r"pair of tokens|twice"):
            carried_files(odd, "x.gguf")["tokenizer.json"]()
