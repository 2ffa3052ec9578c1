"""The tokens that structure a prompt, and texts that may stand between them.

Inside a text such a token would be read as structure: the prompt would say what no message said.
"""

from __future__ import annotations

import json

from v4quant_kernels.errors import V4QuantError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SYSTEM = "<｜System｜>"
REMINDER = "<｜latest_reminder｜>"
IMAGE = "<｜deepseek_image｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
TASKS = {"action": "<｜action｜>"}

_STRUCTURE = (BOS, EOS, USER, ASSISTANT, SYSTEM, REMINDER, IMAGE, DSML, *TASKS.values())


class EncodingError(V4QuantError):
    """A conversation that is malformed, or whose prompt nothing that is known determines."""


def plain(text: str, where: str) -> str:
    """The text itself. Raises EncodingError when it holds a token of the prompt's structure."""
    for token in _STRUCTURE:
        if token in text:
            raise EncodingError(
                f"{where} holds {token}, which the model would read as structure of the prompt; "
                "give messages, not an encoded prompt, or take the token out"
            )
    return text


def to_json(value: object, where: str) -> str:
    """One line of JSON with the separators and unescaped characters of the examples."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingError(f"{where} cannot be written as JSON ({error})") from None
    return plain(text, where)


def kind(value: object) -> str:
    """What a value is, for messages."""
    return "null" if value is None else f"a {type(value).__name__}"
