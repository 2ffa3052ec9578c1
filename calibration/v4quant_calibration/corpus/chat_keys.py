"""Chats under other keys than `messages`, read only when asked for by name.

sharegpt: `conversations`, a list of `{"from": "human" | "gpt" | "system", "value": ...}` or of
    `{"role": ..., "content": ...}`, and perhaps `system` beside it.
prompt-completion: one question and its answer, `prompt` and `completion`: two texts, or two lists
    of messages; and perhaps `system` beside them.

`mode` and `tools` of the row stay what they are.
"""

from __future__ import annotations

from typing import Any

from v4quant_calibration.corpus.errors import CorpusError

MESSAGES = "messages"
CHAT_KEYS = (MESSAGES, "sharegpt", "prompt-completion")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "chatgpt": "assistant", "model": "assistant", "system": "system"}  # fmt: skip


def as_chat(where: str, row: Any, keys: str) -> dict[str, Any]:
    """A row with its chat under `messages`. Raises CorpusError for a row of another form."""
    if not isinstance(row, dict):
        raise CorpusError(f"{where} is not an object")
    read = _pair if keys == "prompt-completion" else _turns
    return {"messages": read(where, row), "mode": row.get("mode"), "tools": row.get("tools")}


def _pair(where: str, row: dict[str, Any]) -> list[Any]:
    pair = [row.get("prompt"), row.get("completion")]
    if all(isinstance(part, list) for part in pair):
        return [*_system(where, row), *(message for part in pair for message in part or ())]
    if not all(isinstance(part, str) for part in pair):
        raise CorpusError(f'{where} has no "prompt" and "completion" strings')
    roles = zip(("user", "assistant"), pair, strict=True)
    return [*_system(where, row), *({"role": r, "content": t} for r, t in roles)]


def _system(where: str, row: dict[str, Any]) -> list[Any]:
    """The system message that stands beside a chat. Raises CorpusError for what is no text."""
    text = row.get("system")
    if text is not None and not isinstance(text, str):
        raise CorpusError(f'{where}: "system" is no string')
    return [{"role": "system", "content": text}] if text else []


def _turns(where: str, row: dict[str, Any]) -> list[Any]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise CorpusError(f'{where} has no "conversations" list')
    messages = _system(where, row)
    for number, turn in enumerate(turns, 1):
        said, value = _said(turn)
        role = _ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise CorpusError(f"{where}: turn {number} is of no known speaker ({str(said)[:40]!r})")
        if not isinstance(value, str):
            raise CorpusError(f'{where}: turn {number} has no "value" string')
        messages.append({"role": role, "content": value})
    return messages


def _said(turn: Any) -> tuple[Any, Any]:
    """Who spoke, and what, by either pair of keys."""
    if not isinstance(turn, dict):
        return None, None
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    return turn.get(who), turn.get(what)
