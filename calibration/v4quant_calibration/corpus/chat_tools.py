"""Tools in chats: their schemas, and the calls an assistant makes of them.

Both are read in the API's form. Data sets with columns of one type keep schemas, arguments and
calls as JSON text, which is read as what it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from v4quant_calibration.corpus.chat_marks import EncodingError, kind, plain, to_json

_TOOL = "function"


@dataclass(frozen=True)
class ToolCall:
    """A call: its parameters in the order given, and the id its result names, if any."""

    name: str
    arguments: dict[str, Any]
    id: str | None


def read_tools(tools: object, where: str) -> tuple[str, ...]:
    """Schemas of tools in the API's form (`type` and `function`), a JSON text each.

    The list may itself be JSON text. Raises EncodingError.
    """
    if tools is None or tools == "":
        return ()
    schemas = []
    for number, tool in enumerate(_objects(tools, where), 1):
        name = f"{where}: number {number}"
        if set(tool) != {"type", "function"} or tool["type"] != "function":
            raise EncodingError(
                f'{name} must be {{"type": "function", "function": {{...}}}} and nothing else'
            )
        function = tool["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise EncodingError(f"{name}: its function has no name")
        schemas.append(to_json(dict(function), name))
    return tuple(schemas)


def read_calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    """An assistant's calls. Raises EncodingError."""
    found = _objects(calls, f"{where}: tool_calls")
    return tuple(_call(call, f"{where}: tool call {i}") for i, call in enumerate(found, 1))


def _call(call: Mapping[str, Any], where: str) -> ToolCall:
    function = call.get("function")
    # `index` is a call's place in a streamed answer; the list has it in place already.
    if set(call) - {"id", "type", "function", "index"} or call.get("type", _TOOL) != _TOOL:
        raise EncodingError(f"{where} must have 'type' \"function\", 'function', and perhaps 'id'")
    if not isinstance(function, Mapping) or not {"name"} <= set(function) <= {"name", "arguments"}:
        raise EncodingError(f"{where}: its function must have a name and arguments, nothing else")
    arguments = function.get("arguments", {})
    if arguments is None or arguments == "":  # a function without parameters
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise EncodingError(f"{where}: its arguments are not JSON") from None
    if not isinstance(arguments, Mapping):
        raise EncodingError(f"{where}: its arguments must be a JSON object")
    for name in (function["name"], *arguments):
        if not isinstance(name, str) or not name or set(name) & set('"<>\n'):
            raise EncodingError(f"{where}: {name!r} cannot stand as a name in the call's markup")
        plain(name, where)
    identity = call.get("id")
    if identity is not None and not isinstance(identity, str):
        raise EncodingError(f"{where}: its id is {kind(identity)}, but must be a string")
    return ToolCall(function["name"], dict(arguments), identity)


def _objects(value: object, where: str) -> list[Mapping[str, Any]]:
    """A list of objects, or its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise EncodingError(f"{where} must be a list of objects, or JSON of one") from None
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Mapping) for v in value):
        raise EncodingError(f"{where} must be a list of objects")
    return cast(list[Mapping[str, Any]], list(value))
