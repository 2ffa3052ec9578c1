"""What a GGUF's pairs outside the architecture must be: kinds, ranges, and one another's lengths.

Weights are read without them, so nothing here stops a conversion; but llama.cpp refuses a pair of
another kind, and whoever reads tokens by a wrong one reads another text. Each is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gguf import GGML_QUANT_VERSION, TokenType

_TOKENIZER = "tokenizer.ggml."
_WORDS = {int: "an integer", float: "a float", str: "a string", bool: "true or false"}
_KINDS: dict[str, type] = {
    **dict.fromkeys(("general.name", "general.type"), str),
    **dict.fromkeys(("general.file_type", "general.quantization_version"), int),
    **dict.fromkeys(("general.sampling.temp", "general.sampling.top_p"), float),
    **dict.fromkeys((f"{_TOKENIZER}model", f"{_TOKENIZER}pre", "tokenizer.chat_template"), str),
}
_LISTS = {"tokens": str, "merges": str, "token_type": int, "scores": float}
_KINDS_OF_TOKENS = range(max(TokenType) + 1)


def odd_pairs(metadata: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a file's general.* and tokenizer.* pairs, one sentence each."""
    for key, value in metadata.items():
        name = key.removeprefix(_TOKENIZER)
        wanted = _KINDS.get(key)
        if key.startswith(_TOKENIZER) and name.endswith("_token_id"):
            wanted = int
        elif key.startswith(f"{_TOKENIZER}add_"):
            wanted = bool
        if wanted is not None and type(value) is not wanted:
            yield f"{key} is {str(value)[:40]!r}, not {_WORDS[wanted]}; llama.cpp refuses the file"
        elif key.startswith(_TOKENIZER) and name in _LISTS:
            yield from _of_list(key, value, _LISTS[name])
    kind, version = (metadata.get(f"general.{k}") for k in ("type", "quantization_version"))
    if isinstance(kind, str) and kind != "model":
        yield f"general.type is {kind[:40]!r}, not 'model'"
    if type(version) is int and version != GGML_QUANT_VERSION:
        known = f"blocks are read as version {GGML_QUANT_VERSION}'s"
        yield f"general.quantization_version is {version}; {known}"
    yield from _of_tokens(metadata)


def _of_list(key: str, value: object, wanted: type) -> Iterator[str]:
    if not isinstance(value, list) or not all(type(item) is wanted for item in value):
        yield f"{key} is no list of {'texts' if wanted is str else 'numbers'}"


def _of_tokens(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Ids that name no token, kinds that there are not, tokens that are there twice."""
    tokens, kinds = (metadata.get(f"{_TOKENIZER}{k}") for k in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        return
    for key, number in metadata.items():
        is_id = key.startswith(_TOKENIZER) and key.endswith("_token_id") and type(number) is int
        # llama.cpp's own "none" is -1, which older writers stored as unsigned.
        if is_id and not 0 <= number < len(tokens) and number not in (-1, 2**32 - 1):
            yield f"{key} is {number}, but there are {len(tokens):,} tokens"
    if len({*tokens}) != len(tokens):
        yield f"{_TOKENIZER}tokens has {len(tokens) - len({*tokens})} tokens twice"
    if isinstance(kinds, list) and len(kinds) != len(tokens):
        yield f"{_TOKENIZER}token_type has {len(kinds):,} entries for {len(tokens):,} tokens"
    if isinstance(kinds, list) and any(k not in _KINDS_OF_TOKENS for k in kinds):
        yield f"{_TOKENIZER}token_type has kinds of token that there are not"
