"""Normalizers that explode are told from tokenizer.json, and real ones are not."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from v4quant_calibration.corpus.tokenizer import TextTokenizer, TokenizerError
from v4quant_calibration.corpus.tokenizer_growth import growth


def tokenizer(**steps: Any) -> dict[str, Any]:
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    for name, step in steps.items():
        setattr(made, name, step)
    table: dict[str, Any] = json.loads(made.to_str())
    return table


def write(folder: Path, table: dict[str, Any]) -> TextTokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(table))
    return TextTokenizer(path)


DOUBLES = [normalizers.Replace("a", "aa") for _ in range(34)]
EXPLODING = {
    "literal": {"normalizer": normalizers.Sequence(DOUBLES)},
    "nested": {"normalizer": normalizers.Sequence([normalizers.Sequence(DOUBLES)])},
    "one": {"normalizer": normalizers.Replace("a", "a" * 10**6)},
    "nothing": {"normalizer": normalizers.Replace("", "a" * 5000)},
    "bytes": {
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.ByteLevel(add_prefix_space=False) for _ in range(40)]
        )
    },
    "prepended": {"normalizer": normalizers.Prepend("a" * 10**6)},
}


@pytest.mark.parametrize("kind", EXPLODING)
def test_exploding_ones_are_refused_before_the_first_text(kind: str, tmp_path: Path) -> None:
    tokenize = write(tmp_path, tokenizer(**EXPLODING[kind]))
    started = time.monotonic()
    with pytest.raises(TokenizerError, match="many times longer"):
        tokenize("aé a")
    assert time.monotonic() - started < 20


def test_a_text_that_would_grow_is_refused(tmp_path: Path) -> None:
    tokenize = write(tmp_path, tokenizer(normalizer=normalizers.Replace("a", "a" * 200)))
    assert len(tokenize("aaa")) == 1
    with pytest.raises(TokenizerError, match="many times longer"):
        tokenize("a" * 2**20)
    assert len(tokenize("b" * 2**20)) == 1, "what does not grow is no concern"


def test_bounds_hold_for_random_steps() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    texts = ["", "a b  c", "ﷺ\u0390½" * 5, "İ ǅ ᾃ", "\U0001d15e"]
    makers = [
        normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD, normalizers.Lowercase,
        normalizers.BertNormalizer, normalizers.ByteLevel, normalizers.StripAccents,
        lambda: normalizers.Replace(rng.choice(["a", " ", "ab"]), "x" * rng.randrange(9)),
    ]  # fmt: skip
    for _ in range(200):
        chain = normalizers.Sequence([rng.choice(makers)() for _ in range(rng.randrange(1, 4))])
        bound = growth(tokenizer(normalizer=chain)["normalizer"])
        for text in texts:
            assert len(chain.normalize_str(text).encode()) <= bound * len(text.encode()), seed
