"""A tokenizer for synthetic checkpoints: byte-level BPE of any vocabulary size.

Engram's rows follow from which token ids mean the same text but for case, so a V4.1 needs a
tokenizer whose compressed vocabulary has exactly the size its config.json says. The vocabulary is
made for that: three special tokens, single bytes, lower-case words ("ab", "ac", ... "aab"), each a
compressed id of its own, then the same words with a capital, which share theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import count, islice, product
from typing import Any

from v4quant.synthetic.errors import RequestError
from v4quant_formats.engram import token_map
from v4quant_formats.gguf.tokenizer import PRE_TOKENIZERS

HEAD_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
_NAMED = ("<｜User｜>", "<｜Assistant｜>", "<｜System｜>", "<think>", "</think>")
# The release's own: text is split by these before bytes are merged, and llama.cpp knows them.
(_SPLITS,) = PRE_TOKENIZERS.values()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def compressed_size(vocab_size: int, specials: Mapping[int, str]) -> int:
    """A compressed vocabulary of which about a third of the words has capital twins."""
    least, most = _bounds(vocab_size, tuple(sorted(specials.items())))
    return most - (most - least) // 3


def make_tokenizer(vocab_size: int, compressed: int, specials: Mapping[int, str]) -> Any:
    """A `tokenizers.Tokenizer` with so many ids, of which `compressed` differ beyond case.

    specials: tokens that must have certain ids. Raises RequestError when there is no such one.
    """
    fixed = _fixed(vocab_size, specials)
    least, most = _bounds(vocab_size, tuple(sorted(specials.items())))
    if not least <= compressed <= most:
        raise RequestError(
            f"a vocabulary of {vocab_size} can be made to compress to {least} to {most} ids, not "
            f"{compressed}"
        )
    fresh = compressed - _keys(fixed)
    words = list(islice(_words(), fresh))
    again = [word.capitalize() for word in words[: vocab_size - len(fixed) - fresh]]
    return _build(vocab_size, fixed, [*words, *again], specials)


def special_tokens(vocab_size: int, noise: int, image: int) -> dict[int, str]:
    """Ids of the special tokens: the two that config.json names, the others below the last."""
    found = {noise: "<｜noise｜>", image: "<｜deepseek_image｜>"}
    free = (i for i in range(vocab_size - 1, len(HEAD_TOKENS), -1) if i not in found)
    return found | dict(zip(free, _NAMED, strict=False))


def _fixed(vocab_size: int, specials: Mapping[int, str]) -> list[str]:
    """Specials and single bytes, common ones first: as many as fit."""
    bytes_ = list(_byte_characters().values())
    room = vocab_size - len(HEAD_TOKENS) - len(specials)
    if room < 1:
        raise RequestError(f"a vocabulary of {vocab_size} has no room for special tokens")
    return [*HEAD_TOKENS, *specials.values(), *bytes_[:room]]


def _keys(tokens: list[str]) -> int:
    """Compressed ids of specials and bytes."""
    found = token_map(_build(len(tokens), tokens, [], dict(enumerate(tokens[:3]))), len(tokens))
    return max(found) + 1


@lru_cache(maxsize=8)
def _bounds(vocab_size: int, specials: tuple[tuple[int, str], ...]) -> tuple[int, int]:
    """The fewest and the most compressed ids a vocabulary can be made to have."""
    fixed = _fixed(vocab_size, dict(specials))
    words, keys = vocab_size - len(fixed), _keys(fixed)
    return keys + (words + 1) // 2, keys + words


def _words() -> Iterator[str]:
    """Lower-case words by length; a word's beginning always comes before it."""
    for length in count(2):
        for letters in product(_LETTERS, repeat=length):
            yield "".join(letters)


def _byte_characters() -> dict[int, str]:
    """The character byte-level BPE writes for every byte, letters first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in table]
    table |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    first = [*_LETTERS.encode(), ord(" "), ord("\n"), *_LETTERS.upper().encode()]
    order = dict.fromkeys([*first, *plain, *others])
    return {byte: table[byte] for byte in order}


def _build(vocab_size: int, fixed: list[str], words: list[str], specials: Mapping[int, str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    vocab = {token: number for number, token in enumerate(HEAD_TOKENS)}
    vocab |= {token: number for number, token in specials.items()}
    taken = set(vocab.values())
    free = (i for i in range(vocab_size) if i not in taken)
    for token in [*fixed, *words]:
        if token not in vocab:
            vocab[token] = next(free)
    merges = [(word[:-1], word[-1]) for word in words]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    splits = [Split(Regex(pattern), "isolated") for pattern in _SPLITS]
    tokenizer.pre_tokenizer = Sequence([*splits, ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    names = dict.fromkeys([*HEAD_TOKENS, *specials.values()])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in names]
    )
    return tokenizer
