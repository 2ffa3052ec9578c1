"""The chat encoding of DeepSeek-V4 and V4.1: from messages to the exact prompt.

The releases ship no chat template; a program builds the text. The prompt opens with BOS, then the
system text. An exchange is a user token, the text, an assistant token, `<think>` or `</think>`,
the reply, EOS. Thinking is switched by that one tag: `</think>` says that the reasoning is already
over. In a thinking mode only the last exchange keeps its reasoning, unless tools are given (or
`drop_thinking` is False): then all do, so that a chain of calls keeps its plan. A reply without
reasoning has an empty thought there.

Tools are described behind the system text (or a developer's). A call is written as DSML, markup
with XML's looks but unescaped text; results come back in one user turn, in the order of the calls.
What differs between the releases is data in `chat_dialects`.

Sources: the input/output pairs published with the April release, further outputs of its encoder,
and for V4.1 the rules on which public ports of its encoder agree. Known from descriptions only,
not verified by any pair: that tools keep all reasoning when there are several user turns;
`drop_thinking=False`; and `release="0731"`, where the effort prefixes differ (low has none, high
has the preview's max) and all else is taken to be equal. Refused because nothing determines it:
0731's own max prefix, tasks other than `action`, and what `chat_messages` refuses.

Tokenize the prompt in one pass, without adding special tokens: BOS is in it, and cutting the text
where turns meet changes the merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from v4quant_calibration.corpus.chat_dialects import (
    NON_THINK,
    Dialect,
    dialect_of,
    tools_text,
)
from v4quant_calibration.corpus.chat_marks import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    REMINDER,
    TASKS,
    THINK,
    USER,
    EncodingError,
    plain,
    to_json,
)
from v4quant_calibration.corpus.chat_messages import (
    Ask,
    Conversation,
    Reply,
    System,
    read_conversation,
)
from v4quant_calibration.corpus.chat_tools import ToolCall

_RESPONSE_FORMAT = (
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    mode: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    release: str = "preview",
    drop_thinking: bool = True,
) -> str:
    """The prompt of a conversation, BOS included; with a user's message last it asks for a reply.

    messages: objects with `role` (system, developer, user, assistant, tool, latest_reminder) and
        `content`; assistants may have `reasoning_content` and `tool_calls`, results a
        `tool_call_id`. Null values count as absent.
    mode: "non-think", "think-high" or "think-max"; V4.1 also has "think-low", "think-xhigh" and
        "think-1" to "think-100". Reasoning that the mode does not show is left out. What 0731
        calls low is the preview's think-high.
    tools: in the API's form; those of the first system message, which is empty if there is none.
    release: "preview", "0731" (V4) or "v41".
    drop_thinking: leave the reasoning of earlier exchanges out when there are no tools.

    Raises EncodingError, which names the message, for what is malformed or not determined.
    """
    dialect = dialect_of(release)
    effort = dialect.effort(mode)
    thinking = mode != NON_THINK
    conversation = read_conversation(messages, dialect, tools)
    with_tools = bool(conversation.tools) or any(
        ask.tools for asks, _ in conversation.exchanges for ask in asks
    )
    dropping = thinking and drop_thinking and not with_tools
    _check_determined(conversation, thinking, dropping)
    parts = [BOS, _opening(conversation, effort, dialect)]
    if conversation.reminder is not None:
        parts.append(REMINDER + conversation.reminder)
    last = len(conversation.exchanges) - 1
    for index, (asks, reply) in enumerate(conversation.exchanges):
        shown = thinking and (not dropping or index == last)
        parts += [_ask_text(ask, dialect) for ask in asks]
        parts += [ASSISTANT, THINK if shown else END_THINK]
        parts.append("" if asks[-1].task is None else TASKS[asks[-1].task])
        if reply is not None:
            parts.append(_reply_text(reply, shown, dialect))
    return _encodable("".join(parts))


def _opening(conversation: Conversation, effort: str, dialect: Dialect) -> str:
    """Effort, system text and tools. Tools alone make an empty system message."""
    first = conversation.system
    if first is None and conversation.tools:
        first = System("", None)
    if first is None:
        return dialect.system + effort if effort else ""
    return dialect.system + effort + _system_text(first, conversation.tools, dialect)


def _system_text(system: System, tools: tuple[str, ...], dialect: Dialect) -> str:
    """A system message from behind its token."""
    form = "" if system.response_format is None else _RESPONSE_FORMAT + system.response_format
    return system.text + tools_text(tools, dialect) + form


def _ask_text(ask: Ask, dialect: Dialect) -> str:
    """A user turn, or a system message in the middle."""
    if ask.system is not None:
        return dialect.system + _system_text(ask.system, ask.tools, dialect)
    blocks = [f"<tool_result>{b.text}</tool_result>" if b.is_result else b.text for b in ask.blocks]
    return USER + "\n\n".join(blocks) + tools_text(ask.tools, dialect)


def _check_determined(conversation: Conversation, thinking: bool, dropping: bool) -> None:
    """Refuse conversations in which the examples leave open what is shown or dropped."""
    exchanges = conversation.exchanges
    for index, (asks, _) in enumerate(exchanges):
        for ask in asks:
            name = f"message {ask.number} ({ask.role})"
            if ask.task is not None and (thinking or index < len(exchanges) - 1):
                raise EncodingError(
                    f"{name}: a task is determined for the last user message in mode non-think only"
                )
            if dropping and any(b.is_result for b in ask.blocks):
                raise EncodingError(
                    f"{name} holds a tool result, but no tools are given, which leaves open what "
                    "reasoning is dropped; give the tools, use non-think, or keep all reasoning"
                )
            if dropping and ask.role == "developer" and len(exchanges) > 1:
                raise EncodingError(
                    f"{name}: what is dropped around a developer's message without tools is not "
                    "known; make it a user message, or use non-think"
                )


def _reply_text(reply: Reply, shown: bool, dialect: Dialect) -> str:
    """A reply from behind its opening tag to EOS."""
    where = f"message {reply.number} (assistant)"
    reasoning = reply.reasoning + END_THINK if shown else ""
    calls = ""
    if reply.calls:
        invokes = "\n".join(_invoke(call, where, dialect) for call in reply.calls)
        calls = f"\n\n<{dialect.calls}>\n{invokes}\n</{dialect.calls}>"
    return reasoning + reply.content + calls + EOS


def _invoke(call: ToolCall, where: str, dialect: Dialect) -> str:
    """One call in DSML: strings as they are, everything else as JSON. No parameters: an empty line
    in their place."""
    lines = []
    tag = dialect.parameter
    for name, value in call.arguments.items():
        field = f"{where}: parameter '{name}'"
        is_text = isinstance(value, str)
        text = plain(value, field) if is_text else to_json(value, field)
        kind = "true" if is_text else "false"
        lines.append(f'<{tag} name="{name}" string="{kind}">{text}</{tag}>')
    inner = "\n".join(lines)
    return f'<{dialect.invoke} name="{call.name}">\n{inner}\n</{dialect.invoke}>'


def _encodable(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise EncodingError(
            f"a message holds half a surrogate pair ({prompt[error.start]!r}), which has no UTF-8 "
            "form for the tokenizer; mend the text"
        ) from None
    return prompt
