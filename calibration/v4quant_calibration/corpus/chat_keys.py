"""Chats under other keys than `messages`, read only when asked for by name.

sharegpt: `conversations`, a list of `{"from": "human" | "gpt" | "system", "value": ...}`.
prompt-completion: one question and its answer, `prompt` and `completion`.
"""

from __future__ import annotations

from typing import Any

from v4quant_calibration.corpus.errors import CorpusError

MESSAGES = "messages"
CHAT_KEYS = (MESSAGES, "sharegpt", "prompt-completion")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "system": "system"}  # fmt: skip


def as_messages(where: str, row: Any, keys: str) -> list[dict[str, Any]]:
    """A row's chat as messages. Raises CorpusError for a row of another form."""
    if not isinstance(row, dict):
        raise CorpusError(f"{where} is not an object")
    if keys == "prompt-completion":
        pair = [row.get("prompt"), row.get("completion")]
        if not all(isinstance(text, str) for text in pair):
            raise CorpusError(f'{where} has no "prompt" and "completion" strings')
        return [{"role": r, "content": t} for r, t in zip(("user", "assistant"), pair, strict=True)]
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise CorpusError(f'{where} has no "conversations" list')
    messages = []
    for number, turn in enumerate(turns, 1):
        said = turn.get("from") if isinstance(turn, dict) else None
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise CorpusError(f"{where}: turn {number} is of no known speaker ({str(said)[:40]!r})")
        messages.append({"role": role, "content": turn["value"]})
    return messages
