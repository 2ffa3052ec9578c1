"""Provenance: from which text, and how, statistics or a solution were made.

It travels from `calibrate` through the statistics or the solution into a conversion's manifest, so
that a model card can print the command that makes them again. Files of text are known by name,
size and SHA-256, never by the folder they lay in. What it says has no part in any arithmetic, and
a solution's digest does not cover it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from v4quant_calibration.corpus.chat_dialects import DEFAULT_MODE
from v4quant_calibration.corpus.chat_keys import MESSAGES
from v4quant_calibration.defaults import MIN_TOKENS

Option = str | int | bool
# Long names of `calibrate`'s options that decide its numbers, and their defaults.
DEFAULTS: dict[str, Option | None] = {
    "tokens": None,
    "seq-len": None,
    "mode": DEFAULT_MODE,
    "chat-keys": MESSAGES,
    "skip-bad-rows": 0,
    "activations": "plain",
    "products": "f32",
    "min-tokens": MIN_TOKENS,
    "device": "cpu",
}
_MOST = 1000  # entries; a header that claims more is not ours


@dataclass(frozen=True)
class CorpusText:
    """One text as it was given: a file's name, or `builtin:...`, and the SHA-256 of its bytes."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """corpus: in the order given. options: long names of `calibrate`'s options that decided the
    numbers, without dashes, where they are not the defaults. solved: what of a recipe was solved
    for (`solved_part`), empty for statistics."""

    corpus: tuple[CorpusText, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    solved: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        corpus = [
            {"name": text.name, "bytes": text.nbytes, "sha256": text.sha256} for text in self.corpus
        ]
        solved = {"solved": dict(self.solved)} if self.solved else {}
        return {"corpus": corpus, "options": dict(self.options), **solved}


def provenance_from(table: object) -> Provenance | None:
    """Inverse of `as_dict`; None for a table of any other form, since nothing depends on it."""
    if not isinstance(table, dict):
        return None
    rows, options, solved = table.get("corpus"), table.get("options", {}), table.get("solved", {})
    if not isinstance(rows, list) or not rows or len(rows) > _MOST or not isinstance(solved, dict):
        return None
    if not isinstance(options, dict) or not all(
        isinstance(k, str) and isinstance(v, str | int) for k, v in options.items()
    ):
        return None
    texts = []
    for row in rows:
        match row:
            case {"name": str(name), "bytes": int(nbytes), "sha256": str(sha256)}:
                texts.append(CorpusText(name, nbytes, sha256))
            case _:
                return None
    return Provenance(tuple(texts), options, solved)
