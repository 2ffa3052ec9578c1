"""The text of one row: its `text`, or its chat in the release's encoding.

Everything that can be wrong with a row itself is found here, before a tokenizer is asked, so that
`--skip-bad-rows` leaves out bad rows and never hides a tokenizer that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from v4quant_calibration.corpus.chat_encoding import encode_messages
from v4quant_calibration.corpus.chat_keys import MESSAGES, as_chat
from v4quant_calibration.corpus.chat_marks import EncodingError
from v4quant_calibration.corpus.errors import CorpusError


@dataclass(frozen=True)
class RowText:
    """What is tokenized of a row. mode: how a chat was encoded, which then begins with BOS; None
    for plain text, which does not."""

    text: str
    mode: str | None = None


def row_text(where: str, row: Any, mode: str, release: str, keys: str) -> RowText:
    """A row's `text` or chat, of which the other may be null.

    mode: of chats whose row names none. keys: where chats are, one of `CHAT_KEYS`. Raises
    CorpusError that begins with `where`.
    """
    if isinstance(row, CorpusError):
        raise row
    if keys != MESSAGES:
        return _chat(where, as_chat(where, row, keys), mode, release)
    held = [k for k in ("text", "messages") if isinstance(row, dict) and row.get(k) is not None]
    if len(held) == 2:
        raise CorpusError(f'{where} has "text" and "messages"; which of them is meant is not clear')
    if not held or (held == ["text"] and not isinstance(row["text"], str)):
        raise CorpusError(
            f'{where} has no "text" string, nor "messages" instead (chats under other keys: '
            "--chat-keys)"
        )
    return RowText(row["text"]) if held == ["text"] else _chat(where, row, mode, release)


def _chat(where: str, row: dict[str, Any], mode: str, release: str) -> RowText:
    own = mode if row.get("mode") is None else row["mode"]
    try:
        prompt = encode_messages(row["messages"], own, tools=row.get("tools"), release=release)
    except EncodingError as error:
        raise CorpusError(f"{where}: {error}") from None
    return RowText(prompt, own)
