"""What differs between the chat formats of the releases, as data.

V4 opens with the bare system text and switches effort by a fixed text for "max". V4.1 marks system
text with a token wherever it stands, says the effort as a number in every thinking prompt, and
writes the tags of tool calls with a space in front of their names.

Sources: V4's as `chat_encoding` says. V4.1's: the rules of the release's encoder as independent
public ports agree on them. They disagree on the numbers behind the names: those here are of the
current release; the first one had low 25, high 50, xhigh 75, max 100. A mode with a number
(`think-50`) says the same to both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from v4quant_calibration.corpus.chat_marks import DSML, END_THINK, SYSTEM, THINK, EncodingError
from v4quant_kernels.near_names import did_you_mean

NON_THINK = "non-think"
MODES = (NON_THINK, "think-low", "think-high", "think-xhigh", "think-max")
DEFAULT_MODE = NON_THINK
DEFAULT_RELEASE = "preview"
HIGHEST_EFFORT = 100

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

_V41_EFFORT = (
    "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
)
_TOOLS_AFTER = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


@dataclass(frozen=True)
class Dialect:
    """One release's format.

    system: the token before system text. calls, invoke, parameter: names of the tags, the DSML
    token in front. efforts: the text of each mode before the first message. numeric: format of
    that text for any effort from 1 to 100, where the release has it. unknown: modes whose text is
    not known, and why.
    """

    name: str
    system: str
    calls: str
    invoke: str
    parameter: str
    efforts: Mapping[str, str]
    numeric: str | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)
    middle_system: bool = False  # system messages behind the first one
    developer: bool = True  # developer messages and what follows from them
    response_format: bool = False

    def effort(self, mode: str) -> str:
        """The text that a mode puts before everything else. Raises EncodingError."""
        if not isinstance(mode, str):
            raise EncodingError(f"there is no mode {mode!r}")
        if mode in self.unknown:
            raise EncodingError(self.unknown[mode])
        if mode in self.efforts:
            return self.efforts[mode]
        number = mode.removeprefix("think-")
        if self.numeric and mode != number and number.isascii() and number.isdecimal():
            if len(number) <= 3 and 1 <= int(number) <= HIGHEST_EFFORT:
                return self.numeric.format(int(number))
            raise EncodingError(f"'{mode}': an effort lies between 1 and {HIGHEST_EFFORT}")
        more = " or think-1 to think-100" if self.numeric else ""
        raise EncodingError(
            f"there is no mode '{mode}'; {did_you_mean(mode, self.efforts)}choose one of "
            f"{', '.join(self.efforts)}{more}"
        )


def _v4(name: str, efforts: dict[str, str], unknown: dict[str, str]) -> Dialect:
    tags = (f"{DSML}tool_calls", f"{DSML}invoke", f"{DSML}parameter")
    return Dialect(name, "", *tags, efforts, unknown=unknown)


_V41_NUMBERS = {"think-low": 50, "think-high": 75, "think-xhigh": 75, "think-max": 100}

DIALECTS = {
    d.name: d
    for d in (
        _v4("preview", {NON_THINK: "", "think-high": "", "think-max": MAX_EFFORT}, {}),
        _v4(
            "0731",
            {NON_THINK: "", "think-high": MAX_EFFORT},
            {
                "think-max": "the prefix that 0731 has for think-max is in no example v4quant was "
                "made from; use think-high, or encode with the release's own program"
            },
        ),
        Dialect(
            "v41",
            SYSTEM,
            f"{DSML} calls",
            f"{DSML} invoke",
            f"{DSML} parameter",
            {NON_THINK: ""} | {m: _V41_EFFORT.format(n) for m, n in _V41_NUMBERS.items()},
            numeric=_V41_EFFORT,
            middle_system=True,
            developer=False,
            response_format=True,
        ),
    )
}
RELEASES = tuple(DIALECTS)


def is_mode(text: str) -> bool:
    """Whether some release has a mode of this name."""
    number = text.removeprefix("think-")
    return text in MODES or (
        number != text and len(number) <= 3 and number.isascii() and number.isdecimal()
    )


def dialect_of(release: str) -> Dialect:
    """A release's format. Raises EncodingError when there is none of that name."""
    if release not in DIALECTS:
        meant, known = did_you_mean(release, RELEASES), ", ".join(RELEASES)
        raise EncodingError(f"there is no release '{release}'; {meant}known are {known}")
    return DIALECTS[release]


def tools_text(schemas: tuple[str, ...], dialect: Dialect) -> str:
    """What follows the text of the message that gives the tools; nothing without any."""
    if not schemas:
        return ""
    calls, invoke, parameter = dialect.calls, dialect.invoke, dialect.parameter
    return (
        f"""

## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{calls}>" block like the following:

<{calls}>
<{invoke} name="$TOOL_NAME">
<{parameter} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{parameter}>
...
</{invoke}>
<{invoke} name="$TOOL_NAME2">
...
</{invoke}>
</{calls}>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning \
inside {THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

"""
        + "\n".join(schemas)
        + _TOOLS_AFTER
    )
