"""Chat messages, read strictly: what the releases' encoders are known to do, nothing beyond.

A prompt that is nearly right still gives an answer, so a wrong guess here would never be noticed.
Whatever is left open (unknown keys, content in parts, a developer's message for V4.1) is therefore
refused with the message's number and a remedy, not improvised.

Read messages are exchanges: *asks*, and the *reply* to them. An ask is what stands behind one user
token: user messages and results of tool calls in a row are one, the results sorted into the order
of the calls they answer. A developer's message is an ask, and so is, for V4.1, a system message
behind the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from v4quant_calibration.corpus.chat_marks import (
    END_THINK,
    TASKS,
    THINK,
    EncodingError,
    kind,
    plain,
    to_json,
)
from v4quant_calibration.corpus.chat_tools import ToolCall, read_calls, read_tools

_KEYS = {
    "system": ("content", "tools", "response_format"),
    "developer": ("content", "tools"),
    "user": ("content", "task"),
    "latest_reminder": ("content",),
    # `mask` marks what was trained on; the published example shows that it is not rendered.
    "assistant": ("content", "reasoning_content", "tool_calls", "mask"),
    "tool": ("content", "tool_call_id"),
}


class Roles(Protocol):
    """What a release's format has places for."""

    @property
    def name(self) -> str:
        """The release."""

    @property
    def middle_system(self) -> bool:
        """System messages behind the first one."""

    @property
    def developer(self) -> bool:
        """Messages of developers."""

    @property
    def response_format(self) -> bool:
        """A schema for the reply in a system message."""


@dataclass(frozen=True)
class System:
    """A system message: its text, and the schema of replies as JSON text."""

    text: str
    response_format: str | None


@dataclass(frozen=True)
class Block:
    """A piece of a user turn; `call` is the id of the call that a result names."""

    text: str
    is_result: bool = False
    call: str | None = None


@dataclass(frozen=True)
class Ask:
    """What one user token introduces, or a system message in the middle (`system`).

    `role` and `number` are those of its first message.
    """

    role: str
    number: int
    blocks: tuple[Block, ...] = ()
    system: System | None = None
    tools: tuple[str, ...] = ()
    task: str | None = None


@dataclass(frozen=True)
class Reply:
    """An assistant's message; `reasoning` is empty where there is none."""

    number: int
    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class Conversation:
    """Messages in the form they are rendered from. `tools` are schemas, a JSON text each."""

    system: System | None
    tools: tuple[str, ...]
    reminder: str | None
    exchanges: tuple[tuple[tuple[Ask, ...], Reply | None], ...]


@dataclass(frozen=True)
class _Message:
    """One checked object of the list: its keys that are not null."""

    number: int
    role: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"message {self.number} ({self.role})"

    def text(self, key: str = "content") -> str:
        value = _only_part(self.values.get(key))
        if value is None:
            raise EncodingError(f"{self} has no {key}; give it as a string")
        if not isinstance(value, str):
            raise EncodingError(
                f"{self}: '{key}' is {kind(value)}, but must be one string; content in "
                "several parts (images included) is not supported"
            )
        return plain(value, f"{self}: '{key}'")


def _only_part(value: object) -> object:
    """Content of one part is that part's text; how several are joined, no example shows."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        part = dict(value[0])
        if part.keys() == {"type", "text"} and part["type"] == "text":
            return part["text"]
    return value


def read_conversation(
    messages: Sequence[Mapping[str, Any]],
    roles: Roles,
    tools: Sequence[Mapping[str, Any]] | None = None,
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
        system = _system(first, roles)
        schemas = _one_set(schemas, read_tools(first.values.get("tools"), f"{first}: tools"), first)
    reminder = rest.pop(0).text() if rest and rest[0].role == "latest_reminder" else None
    exchanges = _exchanges(rest, roles)
    given = bool(schemas)
    for ask in (ask for asks, _ in exchanges for ask in asks):
        if given and ask.tools:
            raise EncodingError(f"message {ask.number} ({ask.role}) gives tools a second time")
        given = given or bool(ask.tools)
    return Conversation(system, schemas, reminder, exchanges)


def _message(number: int, message: object) -> _Message:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise EncodingError(f"{where} is {kind(message)}, but must be an object with a 'role'")
    role = message.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        known = ", ".join(_KEYS)
        raise EncodingError(f"{where} has the role {role!r}; known are {known}")
    values = {k: v for k, v in message.items() if k != "role" and v is not None}
    # Servers write what did not occur as empty lists (annotations, audio); nothing is lost by them.
    values = {k: v for k, v in values.items() if k in _KEYS[role] or v != []}
    for key in values:
        if key not in _KEYS[role]:
            raise EncodingError(
                f"{where} ({role}) has '{key}', whose effect on the prompt is not known; take it "
                f"out (known here are {', '.join(_KEYS[role])})"
            )
    return _Message(number, role, values)


def _exchanges(
    rest: list[_Message], roles: Roles
) -> tuple[tuple[tuple[Ask, ...], Reply | None], ...]:
    """Asks and replies in turn; a reply may be missing at the end only."""
    exchanges: list[tuple[tuple[Ask, ...], Reply | None]] = []
    order: dict[str, int] = {}
    while rest:
        asks = _asks(rest, order, roles)
        reply = _reply(rest.pop(0)) if rest else None
        if reply is not None and reply.calls:
            order = {c.id: i for i, c in enumerate(reply.calls) if c.id}
        exchanges.append((asks, reply))
    if not exchanges:
        raise EncodingError("there is no user message to answer")
    return tuple(exchanges)


def _asks(rest: list[_Message], order: dict[str, int], roles: Roles) -> tuple[Ask, ...]:
    """Take the asks before the next reply off the list, at least one."""
    asks: list[Ask] = []
    while rest and rest[0].role != "assistant":
        if rest[0].role in ("user", "tool"):
            asks.append(_user_turn(rest, order))
        else:
            asks.append(_other_ask(rest.pop(0), asks, roles))
        if len(asks) > 1 and not roles.middle_system:
            raise EncodingError(
                f"message {asks[1].number} ({asks[1].role}) follows {asks[0].role} message "
                f"{asks[0].number} where an assistant's reply must stand; join them into one"
            )
    if not asks:
        raise EncodingError(f"{rest[0]} stands where a user message must stand")
    return tuple(asks)


def _user_turn(rest: list[_Message], order: dict[str, int]) -> Ask:
    """Users' messages and results in a row. A task ends the row: what follows is another turn."""
    first, blocks, task = rest[0], [], None
    while rest and rest[0].role in ("user", "tool") and task is None:
        message = rest.pop(0)
        is_result = message.role == "tool"
        has_id = is_result and "tool_call_id" in message.values
        blocks.append(
            Block(message.text(), is_result, message.text("tool_call_id") if has_id else None)
        )
        if "task" in message.values:
            task = message.text("task")
            if task not in TASKS:
                known = ", ".join(TASKS)
                raise EncodingError(f"{message}: task {task!r} is not known; known is {known}")
            if len(blocks) > 1:
                raise EncodingError(f"{message}: a task needs a turn of its own")
    return Ask(first.role, first.number, _in_order(blocks, order), task=task)


def _other_ask(message: _Message, before: list[Ask], roles: Roles) -> Ask:
    """A developer's message, or a system message in the middle, where the release has them."""
    tools = read_tools(message.values.get("tools"), f"{message}: tools")
    if message.role == "system" and roles.middle_system:
        return Ask("system", message.number, system=_system(message, roles), tools=tools)
    if message.role == "developer" and roles.developer and not before:
        return Ask("developer", message.number, (Block(message.text()),), tools=tools)
    if message.role == "developer" and not roles.developer:
        raise EncodingError(
            f"{message}: what release {roles.name} makes of developers' messages is not known; "
            "make it a system message"
        )
    raise EncodingError(
        f"{message} stands where a user or developer message must stand; a system message comes "
        "first, a latest_reminder next, both once"
    )


def _system(message: _Message, roles: Roles) -> System:
    """A system message's text and the schema for replies."""
    form = message.values.get("response_format")
    if form is None:
        return System(message.text(), None)
    if not roles.response_format:
        raise EncodingError(
            f"{message} has 'response_format', whose effect on the prompt of release {roles.name} "
            "is not known; take it out"
        )
    if not isinstance(form, Mapping):
        raise EncodingError(f"{message}: response_format must be an object")
    return System(message.text(), to_json(dict(form), f"{message}: response_format"))


def _in_order(blocks: list[Block], order: dict[str, int]) -> tuple[Block, ...]:
    """Results sorted into the order of the calls, in the places where results stand.

    As in the release's encoder the sort is stable, and a result that names no call of the last
    reply counts as answering the first.
    """
    results = [b for b in blocks if b.is_result]
    results.sort(key=lambda b: order.get(b.call or "", 0))
    following = iter(results)
    return tuple(next(following) if b.is_result else b for b in blocks)


def _reply(message: _Message) -> Reply:
    calls = read_calls(message.values.get("tool_calls", []), str(message))
    # Who only calls tools need not say anything.
    content = message.text() if "content" in message.values or not calls else ""
    has_reasoning = "reasoning_content" in message.values
    reasoning = message.text("reasoning_content") if has_reasoning else ""
    for token in (THINK, END_THINK):
        if token in content or token in reasoning:
            raise EncodingError(
                f"{message} holds {token}; give the reasoning as 'reasoning_content', without tags"
            )
    return Reply(message.number, content, reasoning, calls)


def _one_set(
    beside: tuple[str, ...], inside: tuple[str, ...], message: _Message
) -> tuple[str, ...]:
    if beside and inside:
        raise EncodingError(f"tools are given beside the messages and again in {message}")
    return beside or inside
