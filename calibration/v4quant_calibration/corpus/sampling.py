"""How much of a long text is tokenized: evenly spread parts of it, when few tokens are asked for.

Tokenizing takes 180 bytes of memory and some microseconds per character, so a text of 100 MB takes
18 GB and half an hour, whatever is asked of it. Short texts (a million characters) are taken whole.
Of longer ones only so many characters are read that they surely hold what is asked, spread evenly
as windows are; where all of it is wanted, it is tokenized a piece after another, cut at line ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from v4quant_calibration.corpus.errors import CorpusError

WHOLE = 2**20
"""Characters of a text that are always tokenized, in one pass."""
CHARS_A_TOKEN = 16
"""More than a token has on average in any text; the whole is taken where this was too few."""
_TOKENIZING = 200 * WHOLE
# Bytes a byte of a file takes while it is read: as bytes and text, rows as lines and values, too.
_TEXT, _ROWS, _IDS = 2, 4, 9
_INFLATED = 5


def wanted_chars(tokens: int | None) -> int | None:
    """Characters that are enough for so many tokens; None for all there are."""
    return None if tokens is None else max(WHOLE, CHARS_A_TOKEN * tokens)


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most WHOLE characters, cut after a line end where there is one."""
    start = 0
    while start < len(text):
        stop = min(start + WHOLE, len(text))
        if stop < len(text) and (line := text.rfind("\n", start, stop)) > start:
            stop = line + 1
        yield text[start:stop]
        start = stop


def excerpts(text: str, chars: int, length: int) -> list[str]:
    """Parts of `length` characters, `chars` in all, spread evenly; each begins with a line, or a
    word, where one begins soon."""
    count = max(1, chars // length)
    starts = [i * len(text) // count for i in range(count)] + [len(text)]
    found = []
    for start, following in pairwise(starts):
        soon = start + length // 4
        line = text.find("\n", start, soon)
        if line < 0:
            line = text.find(" ", start, soon)
        first = line + 1 if start and line >= 0 else start
        found.append(text[first : min(first + length, following)])
    return found


def rows_apart(file: Path, chars: int | None) -> int:
    """Every how many-th row of a file holds `chars` characters in all (1: every row)."""
    return 1 if chars is None else max(1, file.stat().st_size // chars)


def check_memory(file: Path, rows: bool, limit: int | None) -> None:
    """Raise CorpusError when reading a file takes more than `limit` bytes of memory."""
    if limit is None or not file.is_file():
        return
    ids = file.suffix in (".npy", ".safetensors")
    each = _IDS if ids else _ROWS if rows else _TEXT
    size = file.stat().st_size * (_INFLATED if file.suffix in (".gz", ".zst") else 1)
    needed = each * size + (0 if ids else min(_TOKENIZING, 200 * size))
    if needed > limit:
        raise CorpusError(
            f"{file}: reading it takes about {needed / 1e9:.2f} GB, and --max-memory leaves "
            f"{max(limit, 0) / 1e9:.2f} GB for it; split the file or raise the limit"
        )
