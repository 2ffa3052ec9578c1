"""The chat template of GGUF files gives the encoder's prompts, byte for byte."""

from __future__ import annotations

import json
import random
import secrets
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from v4quant_calibration.corpus.chat_dialects import DIALECTS
from v4quant_calibration.corpus.chat_encoding import encode_messages
from v4quant_formats.gguf.tokenizer import V4_CHAT_TEMPLATE, V41_CHAT_TEMPLATE

REPOSITORY = Path(__file__).parents[3]
GENERATED = json.loads(
    (REPOSITORY / "tests" / "data" / "encoding" / "generated.json").read_text(encoding="utf-8")
)
Message = dict[str, Any]


@cache
def template(path: Path = V4_CHAT_TEMPLATE) -> Template:
    """As engines have it: sandboxed, JSON unescaped."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["from_json"] = json.loads
    return environment.from_string(path.read_text(encoding="utf-8"))


def render(messages: list[Message], **more: Any) -> str:
    return template().render(messages=messages, add_generation_prompt=True, **more)


def settings(mode: str) -> dict[str, Any]:
    return {
        "non-think": {},
        "think-high": {"thinking": True},
        "think-max": {"enable_thinking": True, "reasoning_effort": "max"},
    }[mode]


@pytest.mark.parametrize("case", GENERATED, ids=range(len(GENERATED)))
def test_the_releases_pairs(case: dict[str, Any]) -> None:
    mode = "think-max" if case["reasoning_effort"] == "max" else "think-high"
    mode = "non-think" if case["thinking_mode"] == "chat" else mode
    assert render(case["messages"], **settings(mode)) == case["prompt"]


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "é": [1]}}}
    for name in ("find", "add")
]


def conversation(rng: random.Random) -> list[Message]:
    """A conversation the encoder accepts, of every shape it knows."""
    with_tools = rng.random() < 0.6
    messages: list[Message] = []
    if with_tools or rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(["Be brief.", "", "Ö\n"])})
        if with_tools:
            messages[0]["tools"] = TOOLS[: rng.randint(1, 2)]
    if rng.random() < 0.3:
        messages.append({"role": "latest_reminder", "content": "Today is Friday."})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": rng.choice(["hi", "why?\n\n", "<b>"])})
        while with_tools and rng.random() < 0.5:
            messages += _calls(rng)
            if rng.random() < 0.3:
                messages.append({"role": "user", "content": "and then?"})
        messages.append({"role": "assistant", "content": "yes", "reasoning_content": "hm"})
    if rng.random() < 0.5:
        messages.pop()
    return messages


def _calls(rng: random.Random) -> list[Message]:
    """A reply of one to three calls, and their results in any order."""
    names = [f"call-{i}" for i in range(rng.randint(1, 3))]
    arguments: Message = {"q": "a < b", "n": 3, "list": [1, {"é": None}], "on": True}
    calls = []
    for name in names:
        chosen = dict(rng.sample(list(arguments.items()), rng.randint(0, 4)))
        given = json.dumps(chosen) if rng.random() < 0.5 else chosen
        calls.append({"id": name, "type": "function",
                      "function": {"name": "find", "arguments": given}})  # fmt: skip
    results = [{"role": "tool", "tool_call_id": n, "content": f"found {n}"} for n in names]
    rng.shuffle(results)
    reply = {"role": "assistant", "tool_calls": calls, "reasoning_content": "let me see"}
    return [reply, *results]


def test_conversations_of_every_shape() -> None:
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    rng = random.Random(seed)
    shapes = set()
    for _ in range(150):
        messages, mode = conversation(rng), rng.choice(tuple(DIALECTS["preview"].efforts))
        dropping = {} if rng.random() < 0.5 else {"drop_thinking": False}
        wanted = encode_messages(messages, mode, drop_thinking=not dropping)
        if messages[0]["role"] == "system" and rng.random() < 0.5:
            beside = messages[0].pop("tools", None)
            got = render(messages, tools=beside, **dropping, **settings(mode))
        else:
            got = render(messages, **dropping, **settings(mode))
        assert got == wanted, json.dumps(messages)
        shapes.add((mode, bool(dropping), "tool_result" in wanted, len(messages) > 4))
    assert len(shapes) > 12


def test_developers_tasks_and_no_reply_asked_for() -> None:
    asks: list[Message] = [{"role": "developer", "content": "Do it.", "tools": TOOLS}]
    assert render(asks, thinking=True) == encode_messages(asks, "think-high")
    task: list[Message] = [{"role": "user", "content": "go", "task": "action"}]
    assert render(task) == encode_messages(task, "non-think")
    silent = template().render(messages=[{"role": "user", "content": "hi"}])
    assert silent == "<｜begin▁of▁sentence｜><｜User｜>hi"


V41_SETTINGS: dict[str, dict[str, Any]] = {
    "non-think": {},
    "think-low": {"thinking": True, "reasoning_effort": "low"},
    "think-high": {"thinking": True},
    "think-37": {"enable_thinking": True, "reasoning_effort": 37},
    "think-max": {"thinking": True, "reasoning_effort": "max"},
}


def test_v41_conversations_of_every_shape() -> None:
    """System messages in the middle stand before a user's message or at the end."""
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    rng = random.Random(seed)
    middle = 0
    for _ in range(150):
        messages, mode = conversation(rng), rng.choice(list(V41_SETTINGS))
        places = [
            i
            for i in range(1, len(messages) + 1)
            if messages[i - 1]["role"] == "assistant" and "tool_calls" not in messages[i - 1]
        ]
        if places and rng.random() < 0.6:
            system = {"role": "system", "content": rng.choice(["", "new rule"])}
            if rng.random() < 0.3:
                system["response_format"] = {"é": [1]}
            messages.insert(rng.choice(places), system)
            middle += 1
        wanted = encode_messages(messages, mode, release="v41")
        given = {"messages": messages, "add_generation_prompt": True, **V41_SETTINGS[mode]}
        assert template(V41_CHAT_TEMPLATE).render(**given) == wanted, json.dumps(messages)
    assert middle > 20


def test_v41_tools_alone_make_an_empty_system_message() -> None:
    asked: list[Message] = [{"role": "user", "content": "hi"}]
    for mode, more in V41_SETTINGS.items():
        given = {"messages": asked, "tools": TOOLS, "add_generation_prompt": True, **more}
        wanted = encode_messages(asked, mode, tools=TOOLS, release="v41")
        assert template(V41_CHAT_TEMPLATE).render(**given) == wanted
