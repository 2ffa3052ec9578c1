"""Chat messages, read strictly: what the release's published examples determine, nothing beyond.

A prompt that is nearly right still gives an answer, so a wrong guess here would never be noticed.
Whatever the examples leave open (unknown keys, content in parts, a second system message, a call
without arguments) is therefore refused with the message's number and a remedy, not improvised.

Read messages are exchanges: an *ask*, which is everything behind one user token, and the
*reply* to it. A user's or developer's message is an ask; so are all results of a reply's tool
calls together with the user message that follows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from v4quant_kernels.errors import V4QuantError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
TASKS = {"action": "<｜action｜>"}

# Inside a text these would be read as structure: the prompt would say what no message said.
_STRUCTURE = (BOS, EOS, USER, ASSISTANT, REMINDER, DSML, *TASKS.values())

_KEYS = {
    "system": ("content", "tools"),
    "developer": ("content", "tools"),
    "user": ("content", "task"),
    "latest_reminder": ("content",),
    # `mask` marks what was trained on; the published example shows that it is not rendered.
    "assistant": ("content", "reasoning_content", "tool_calls", "mask"),
    "tool": ("content", "tool_call_id"),
}


class EncodingError(V4QuantError):
    """A conversation that is malformed, or whose prompt the published examples do not determine."""


@dataclass(frozen=True)
class ToolCall:
    """A call: its parameters in the order given, and the id its result names, if any."""

    name: str
    arguments: dict[str, Any]
    id: str | None


@dataclass(frozen=True)
class Ask:
    """What one user token introduces. `results` are in the order of their calls."""

    role: str
    number: int
    results: tuple[str, ...] = ()
    text: str | None = None
    tools: tuple[str, ...] = ()
    task: str | None = None


@dataclass(frozen=True)
class Reply:
    """An assistant's message; `reasoning` is None where it is missing or empty."""

    number: int
    content: str
    reasoning: str | None
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class Conversation:
    """Messages in the form they are rendered from. `tools` are schemas, a JSON text each."""

    system: str | None
    tools: tuple[str, ...]
    reminder: str | None
    exchanges: tuple[tuple[Ask, Reply | None], ...]


@dataclass(frozen=True)
class _Message:
    """One checked object of the list: its keys that are not null."""

    number: int
    role: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"message {self.number} ({self.role})"

    def text(self, key: str = "content") -> str:
        value = self.values.get(key)
        if value is None:
            raise EncodingError(f"{self} has no {key}; give it as a string")
        if not isinstance(value, str):
            raise EncodingError(
                f"{self}: '{key}' is {_kind(value)}, but must be one string; content in parts "
                "(images included) is not supported"
            )
        return plain(value, f"{self}: '{key}'")


def read_conversation(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> Conversation:
    """Check messages and arrange them. `tools` given beside them belong to the system message.

    Raises EncodingError naming the message.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise EncodingError("messages must be a list of objects with a 'role' each")
    rest = [_message(i, m) for i, m in enumerate(messages, 1)]
    system, schemas = None, read_tools(tools, "tools")
    if rest and rest[0].role == "system":
        first = rest.pop(0)
        system = first.text()
        schemas = _one_set(schemas, read_tools(first.values.get("tools"), f"{first}: tools"), first)
    elif schemas:
        raise EncodingError(
            "tools are given, but the first message is no system message, which would list them; "
            'put {"role": "system", "content": "..."} first'
        )
    reminder = rest.pop(0).text() if rest and rest[0].role == "latest_reminder" else None
    exchanges = _exchanges(rest)
    for ask, _ in exchanges:
        if schemas and ask.tools:
            raise EncodingError(f"message {ask.number} ({ask.role}) gives tools a second time")
    return Conversation(system, schemas, reminder, exchanges)


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


def read_tools(tools: object, where: str) -> tuple[str, ...]:
    """Schemas of tools in the API's form (`type` and `function`), a JSON text each."""
    if tools is None:
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


def _message(number: int, message: object) -> _Message:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise EncodingError(f"{where} is {_kind(message)}, but must be an object with a 'role'")
    role = message.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        known = ", ".join(_KEYS)
        raise EncodingError(f"{where} has the role {role!r}; known are {known}")
    values = {k: v for k, v in message.items() if k != "role" and v is not None}
    for key in values:
        if key not in _KEYS[role]:
            raise EncodingError(
                f"{where} ({role}) has '{key}', whose effect on the prompt is not known; take it "
                f"out (known here are {', '.join(_KEYS[role])})"
            )
    return _Message(number, role, values)


def _exchanges(rest: list[_Message]) -> tuple[tuple[Ask, Reply | None], ...]:
    """Asks and replies in turn; a reply may be missing at the end only."""
    exchanges: list[tuple[Ask, Reply | None]] = []
    previous: Reply | None = None
    while rest:
        ask = _ask(rest, previous)
        previous = None
        if rest:
            if rest[0].role != "assistant":
                raise EncodingError(
                    f"{rest[0]} follows {ask.role} message {ask.number} where an assistant's "
                    "reply must stand; join them into one message"
                )
            previous = _reply(rest.pop(0))
        exchanges.append((ask, previous))
    if not exchanges:
        raise EncodingError("there is no user message to answer")
    return tuple(exchanges)


def _ask(rest: list[_Message], previous: Reply | None) -> Ask:
    """Take the next ask off the list: results of the previous reply's calls, or a message."""
    number, results = rest[0].number, []
    while rest and rest[0].role == "tool":
        results.append(rest.pop(0))
    calls = previous.calls if previous is not None else ()
    ordered = tuple(_in_order(number, results, calls))
    if results and (not rest or rest[0].role == "assistant"):
        return Ask("tool", number, ordered)
    message = rest.pop(0)
    if message.role not in ("user", "developer") or (results and message.role != "user"):
        expected = "user" if results else "user or developer"
        raise EncodingError(
            f"{message} stands where a {expected} message must stand; a system message comes "
            "first, a latest_reminder next, both once"
        )
    task = message.text("task") if "task" in message.values else None
    if task is not None and task not in TASKS:
        raise EncodingError(f"{message}: task {task!r} is not known; known is {', '.join(TASKS)}")
    tools = read_tools(message.values.get("tools"), f"{message}: tools")
    return Ask(message.role, message.number, ordered, message.text(), tools, task)


def _in_order(number: int, results: list[_Message], calls: tuple[ToolCall, ...]) -> list[str]:
    """Texts of tool results in the order of the calls they answer."""
    if results and not calls:
        raise EncodingError(f"{results[0]} answers no tool call; an assistant's call must precede")
    if len(results) != len(calls):
        raise EncodingError(
            f"before message {number} an assistant made {len(calls)} tool calls, but "
            f"{len(results)} results follow; give one for each"
        )
    if len(results) == 1 and "tool_call_id" not in results[0].values:
        return [results[0].text()]
    texts = {r.text("tool_call_id"): r.text() for r in results}
    ids = [c.id for c in calls if c.id is not None]
    if len(texts) != len(results) or len(set(ids)) != len(calls) or set(texts) != set(ids):
        raise EncodingError(
            f"{results[0]} and those after it: the tool_call_ids {sorted(texts)} are not those of "
            f"the {len(calls)} calls before them ({ids}), each once"
        )
    return [texts[i] for i in ids]


def _reply(message: _Message) -> Reply:
    calls = tuple(
        _call(c, f"{message}: tool call {i}")
        for i, c in enumerate(
            _objects(message.values.get("tool_calls", []), f"{message}: tool_calls"), 1
        )
    )
    # Who only calls tools need not say anything.
    content = message.text() if "content" in message.values or not calls else ""
    has_reasoning = "reasoning_content" in message.values
    reasoning = message.text("reasoning_content") if has_reasoning else ""
    for token in (THINK, END_THINK):
        if token in content or token in reasoning:
            raise EncodingError(
                f"{message} holds {token}; give the reasoning as 'reasoning_content', without tags"
            )
    return Reply(message.number, content, reasoning or None, calls)


def _call(call: Mapping[str, Any], where: str) -> ToolCall:
    function = call.get("function")
    if set(call) - {"id", "type", "function"} or call.get("type", "function") != "function":
        raise EncodingError(f"{where} must have 'type' \"function\", 'function', and perhaps 'id'")
    if not isinstance(function, Mapping) or set(function) != {"name", "arguments"}:
        raise EncodingError(f"{where}: its function must have a name and arguments, nothing else")
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise EncodingError(f"{where}: its arguments are not JSON") from None
    if not isinstance(arguments, Mapping) or not arguments:
        raise EncodingError(
            f"{where}: its arguments must be a JSON object with at least one parameter (how a call "
            "without any is written is not known)"
        )
    for name in (function["name"], *arguments):
        if not isinstance(name, str) or not name or set(name) & set('"<>\n'):
            raise EncodingError(f"{where}: {name!r} cannot stand as a name in the call's markup")
        plain(name, where)
    identity = call.get("id")
    if identity is not None and not isinstance(identity, str):
        raise EncodingError(f"{where}: its id is {_kind(identity)}, but must be a string")
    return ToolCall(function["name"], dict(arguments), identity)


def _one_set(
    beside: tuple[str, ...], inside: tuple[str, ...], message: _Message
) -> tuple[str, ...]:
    if beside and inside:
        raise EncodingError(f"tools are given beside the messages and again in {message}")
    return beside or inside


def _objects(value: object, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Mapping) for v in value):
        raise EncodingError(f"{where} must be a list of objects")
    return cast(list[Mapping[str, Any]], list(value))


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
