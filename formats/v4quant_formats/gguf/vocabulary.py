"""What a GGUF file's metadata lacks before llama.cpp reads and writes text with it.

A file without a tokenizer, or with half of one, is loaded by some programs and refused by others;
weights tell nothing of it. The list is the same before a conversion, which says what it cannot
carry, and in preflight, which says what llama.cpp will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

_TOKENIZER = "tokenizer.ggml"

# Key of the tokenizer -> what llama.cpp does without it.
_WITHOUT = {
    "pre": "text is split by a default rule into other tokens",
    "token_type": "special tokens become plain text",
    "bos_token_id": "another token begins the text",
    "eos_token_id": "another token ends it",
}


@dataclass(frozen=True)
class Lack:
    """Something that is not in the metadata. error: llama.cpp then reads no text, or no file."""

    severity: Literal["error", "warning", "note"]
    problem: str


def lacks(metadata: Mapping[str, Any], rows: int) -> Iterator[Lack]:
    """What is missing, or contradicts the embedding's number of rows."""
    tokens = metadata.get(f"{_TOKENIZER}.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    if count == 0:
        yield Lack("error", "no tokenizer: llama.cpp reads and writes token ids only, no text")
        return
    if count != rows:
        problem = f"the tokenizer has {count:,} tokens, the embedding {rows:,} rows"
        yield Lack("error", problem)
    for key in ("model", "merges"):
        if not metadata.get(f"{_TOKENIZER}.{key}"):
            problem = f"'{_TOKENIZER}.{key}' is absent; llama.cpp cannot read text"
            yield Lack("error", problem)
    for key, consequence in _WITHOUT.items():
        value = metadata.get(f"{_TOKENIZER}.{key}")
        if value is None:
            yield Lack("warning", f"'{_TOKENIZER}.{key}' is absent: {consequence}")
        elif key.endswith("_id") and not (type(value) is int and 0 <= value < count):
            yield Lack("warning", f"'{_TOKENIZER}.{key}' is {str(value)[:40]}, no token's number")
        elif key == "token_type" and (not isinstance(value, list) or len(value) != count):
            yield Lack("error", f"'{_TOKENIZER}.token_type' has no entry for every token")
    if not metadata.get("tokenizer.chat_template"):
        yield Lack("note", "no chat template; servers fall back to another model's")
