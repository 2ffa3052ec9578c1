"""The chat encoding of DeepSeek-V4: from messages to the exact prompt.

The release ships no chat template; a program builds the text. The prompt opens with BOS, then the
bare system text. An exchange is a user token, the text, an assistant token, `<think>` or
`</think>`, the reply, EOS. Thinking is switched by that one tag: `</think>` says that the
reasoning is already over. In a thinking mode only the last exchange keeps its reasoning, unless
tools are given (or `drop_thinking` is False): then all do, so that a chain of calls keeps its plan.

Tools are described behind the system text (or a developer's). A call is written as DSML, markup
with XML's looks but unescaped text; results come back in one user turn, in the order of the calls.
"Think max" is high thinking with a fixed text before everything else.

Sources: the input/output pairs published with the April release and further outputs of its
encoder. Known from descriptions only, not verified by any pair: that tools keep all reasoning when
there are several user turns; `drop_thinking=False`; and `release="0731"`, where the effort prefixes
differ (low has none, high has the preview's max) and all else is taken to be equal. Refused because
nothing determines it: 0731's own max prefix, tasks other than `action`, and what `chat_messages`
refuses.

Tokenize the prompt in one pass, without adding special tokens: BOS is in it, and cutting the text
where turns meet changes the merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from v4quant_calibration.corpus.chat_messages import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    REMINDER,
    TASKS,
    THINK,
    USER,
    Conversation,
    EncodingError,
    Reply,
    ToolCall,
    plain,
    read_conversation,
    to_json,
)

MODES = ("non-think", "think-high", "think-max")
RELEASES = ("preview", "0731")
DEFAULT_MODE = "non-think"

# The texts below are part of the format: the model was trained with exactly these characters.
MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)

_TOOLS_BEFORE = f"""

## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning \
inside {THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_AFTER = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


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
    mode: "non-think", "think-high" or "think-max". Reasoning that the mode does not show is left
        out. What 0731 calls low is the preview's think-high.
    tools: in the API's form; those of the system message when given beside the messages.
    drop_thinking: leave the reasoning of earlier exchanges out when there are no tools.

    Raises EncodingError, which names the message, for what is malformed or not determined.
    """
    effort = _effort_prefix(mode, release)
    thinking = mode != "non-think"
    conversation = read_conversation(messages, tools)
    with_tools = bool(conversation.tools) or any(ask.tools for ask, _ in conversation.exchanges)
    dropping = thinking and drop_thinking and not with_tools
    _check_determined(conversation, thinking, dropping)
    parts = [BOS, effort, conversation.system or "", _tools_text(conversation.tools)]
    if conversation.reminder is not None:
        parts.append(REMINDER + conversation.reminder)
    last = len(conversation.exchanges) - 1
    for index, (ask, reply) in enumerate(conversation.exchanges):
        shown = thinking and (not dropping or index == last)
        blocks = [f"<tool_result>{r}</tool_result>" for r in ask.results]
        blocks += [] if ask.text is None else [ask.text]
        parts += [USER, "\n\n".join(blocks), _tools_text(ask.tools)]
        parts += [ASSISTANT, THINK if shown else END_THINK]
        parts.append("" if ask.task is None else TASKS[ask.task])
        if reply is not None:
            parts.append(_reply_text(reply, shown))
    return _encodable("".join(parts))


def _effort_prefix(mode: str, release: str) -> str:
    """The text before everything else that a release has for a mode."""
    if mode not in MODES:
        raise EncodingError(f"there is no mode '{mode}'; choose one of {', '.join(MODES)}")
    if release not in RELEASES:
        raise EncodingError(f"there is no release '{release}'; known are {', '.join(RELEASES)}")
    if release == "0731" and mode == "think-max":
        raise EncodingError(
            "the prefix that 0731 has for think-max is in no example v4quant was made from; use "
            "think-high, or encode with the release's own program"
        )
    return MAX_EFFORT if mode == ("think-high" if release == "0731" else "think-max") else ""


def _check_determined(conversation: Conversation, thinking: bool, dropping: bool) -> None:
    """Refuse conversations in which the examples leave open what is shown or dropped."""
    exchanges = conversation.exchanges
    for index, (ask, _) in enumerate(exchanges):
        name = f"message {ask.number} ({ask.role})"
        if ask.task is not None and (thinking or index < len(exchanges) - 1):
            raise EncodingError(
                f"{name}: a task is determined for the last user message in mode non-think only"
            )
        if dropping and ask.results:
            raise EncodingError(
                f"{name} is a tool result, but no tools are given, which leaves open what reasoning"
                " is dropped; give the tools, use non-think, or keep all reasoning"
            )
        if dropping and ask.role == "developer" and len(exchanges) > 1:
            raise EncodingError(
                f"{name}: what is dropped around a developer's message without tools is not known;"
                " make it a user message, or use non-think"
            )


def _tools_text(schemas: Sequence[str]) -> str:
    """What follows the text of the message that gives the tools."""
    return _TOOLS_BEFORE + "\n".join(schemas) + _TOOLS_AFTER if schemas else ""


def _reply_text(reply: Reply, shown: bool) -> str:
    """A reply from behind its opening tag to EOS."""
    where = f"message {reply.number} (assistant)"
    reasoning = ""
    if shown:
        if reply.reasoning is None:
            raise EncodingError(
                f"{where} has no reasoning_content, which its place in a thinking mode shows; give "
                "it, or use non-think"
            )
        reasoning = reply.reasoning + END_THINK
    calls = ""
    if reply.calls:
        invokes = "\n".join(_invoke(call, where) for call in reply.calls)
        calls = f"\n\n<{DSML}tool_calls>\n{invokes}\n</{DSML}tool_calls>"
    return reasoning + reply.content + calls + EOS


def _invoke(call: ToolCall, where: str) -> str:
    """One call in DSML: strings as they are, everything else as JSON."""
    lines = []
    for name, value in call.arguments.items():
        field = f"{where}: parameter '{name}'"
        is_text = isinstance(value, str)
        text = plain(value, field) if is_text else to_json(value, field)
        kind = "true" if is_text else "false"
        lines.append(f'<{DSML}parameter name="{name}" string="{kind}">{text}</{DSML}parameter>')
    return "\n".join([f'<{DSML}invoke name="{call.name}">', *lines, f"</{DSML}invoke>"])


def _encodable(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise EncodingError(
            f"a message holds half a surrogate pair ({prompt[error.start]!r}), which has no UTF-8 "
            "form for the tokenizer; mend the text"
        ) from None
    return prompt
