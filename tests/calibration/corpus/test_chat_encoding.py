"""The chat encoding: byte-exact on every published case, and refusal of what no case determines."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer

from v4quant.cli import cli
from v4quant_calibration.corpus.chat_dialects import DIALECTS, MAX_EFFORT
from v4quant_calibration.corpus.chat_encoding import encode_messages
from v4quant_calibration.corpus.chat_marks import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    IMAGE,
    SYSTEM,
    USER,
    EncodingError,
)
from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus
from v4quant_calibration.corpus.errors import CorpusError

REPOSITORY = Path(__file__).parents[3]
# Made with the release's encoder for this project.
GENERATED = json.loads(
    (REPOSITORY / "tests" / "data" / "encoding" / "generated.json").read_text(encoding="utf-8")
)
# The release's own pairs are not ours to distribute.
PREVIEW = REPOSITORY.parent / "shared" / "encoding" / "preview"
TOKENIZER = REPOSITORY / "v4quant" / "data" / "tiny-v4" / "tokenizer.json"

Message = dict[str, Any]
MODES = tuple(DIALECTS["preview"].efforts)

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def user(text: str = "hi", **more: Any) -> Message:
    return {"role": "user", "content": text, **more}


def system(text: str = "Be brief.", **more: Any) -> Message:
    return {"role": "system", "content": text, **more}


def assistant(text: str | None = "yes", **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def result(text: str = "found", identity: str | None = None) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": identity}


def call(arguments: Any = '{"q": "a"}', identity: str | None = None, name: str = "find") -> Message:
    found: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return found if identity is None else {"id": identity, **found}


def calling(*calls: Message, **more: Any) -> Message:
    return assistant(None, tool_calls=list(calls), **more)


def mode_of(case: dict[str, Any]) -> str:
    if case["thinking_mode"] == "chat":
        return "non-think"
    return "think-max" if case["reasoning_effort"] == "max" else "think-high"


@pytest.mark.parametrize("case", GENERATED, ids=range(len(GENERATED)))
def test_outputs_of_the_releases_encoder(case: dict[str, Any]) -> None:
    assert encode_messages(case["messages"], mode_of(case)) == case["prompt"]


@pytest.mark.parametrize(
    ("number", "mode"),
    [(1, "think-high"), (2, "think-high"), (3, "think-high"), (4, "non-think")],
)
def test_published_pairs(number: int, mode: str) -> None:
    if not PREVIEW.is_dir():
        pytest.skip("the release's encoding pairs are not beside the repository")
    given = json.loads((PREVIEW / f"test_input_{number}.json").read_text(encoding="utf-8"))
    # Bytes: reading as text would hide a difference in line ends.
    wanted = (PREVIEW / f"test_output_{number}.txt").read_bytes()
    if isinstance(given, dict):
        prompt = encode_messages(given["messages"], mode, tools=given["tools"])
        first = {**given["messages"][0], "tools": given["tools"]}
        assert encode_messages([first, *given["messages"][1:]], mode) == prompt
    else:
        prompt = encode_messages(given, mode)
    assert prompt.encode() == wanted


def draw_chat(draw: random.Random) -> list[Message]:
    """Turns of odd texts: empty, with line breaks, wide characters and thinking tags of users."""
    texts = ["", " ", "a\nb", "你好", "\U0001f600", "<|User|>", "</tool_result>", "{}", "\u2028"]
    messages = [system(draw.choice(texts))] if draw.random() < 0.5 else []
    for _ in range(draw.randrange(1, 5)):
        messages.append(user(draw.choice([*texts, "what is <think>?"])))
        messages.append(assistant(draw.choice(texts), reasoning_content=draw.choice(["r", "s\n"])))
    return messages[:-1] if draw.random() < 0.5 else messages


@pytest.mark.parametrize("mode", MODES)
def test_random_chats_can_be_read_back(mode: str) -> None:
    """What stands between the turn tokens is what the messages said, and nothing else."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed: {seed}")
    draw = random.Random(seed)
    for _ in range(50):
        messages = draw_chat(draw)
        given = [m for m in messages if m["role"] != "system"]
        opening, *turns = encode_messages(messages, mode).split(USER)
        head = messages[0]["content"] if messages[0]["role"] == "system" else ""
        assert opening == BOS + (MAX_EFFORT if mode == "think-max" else "") + head
        assert len(turns) == (len(given) + 1) // 2
        for number, turn in enumerate(turns):
            ask, answer = turn.split(ASSISTANT)
            assert ask == given[2 * number]["content"]
            last = number == len(turns) - 1
            tag = "<think>" if last and mode != "non-think" else "</think>"
            assert answer.startswith(tag)
            if 2 * number + 1 == len(given):
                assert answer == tag
                continue
            reply = given[2 * number + 1]
            shown = reply["reasoning_content"] + "</think>" if tag == "<think>" else ""
            assert answer == tag + shown + reply["content"] + EOS


def test_reasoning_is_kept_on_request_and_with_tools() -> None:
    chat = [
        system(),
        user(),
        assistant(reasoning_content="first"),
        user(),
        assistant(reasoning_content="second"),
    ]
    assert "first" not in encode_messages(chat, "think-high")
    for kept in (
        encode_messages(chat, "think-high", drop_thinking=False),
        encode_messages(chat, "think-high", tools=[TOOL]),
    ):
        assert "<think>first</think>yes" in kept and "<think>second</think>yes" in kept
    hidden = encode_messages(chat, "non-think", tools=[TOOL], drop_thinking=False)
    assert "first" not in hidden and "second" not in hidden


def test_0731_moves_the_prefix_to_high() -> None:
    preview = {mode: encode_messages([user()], mode) for mode in MODES}
    now = {m: encode_messages([user()], m, release="0731") for m in MODES[:2]}
    assert now["non-think"] == preview["non-think"]
    assert now["think-high"] == preview["think-max"] != preview["think-high"]
    with pytest.raises(EncodingError, match="0731 has for think-max"):
        encode_messages([user()], "think-max", release="0731")


def test_parameters_keep_strings_raw_and_others_json() -> None:
    values = {"s": 'say "é"\n', "n": 1.5, "b": True, "z": None, "l": [1, "ü"], "o": {"k": "<v>"}}
    chat = [user(), calling(call(json.dumps(values)))]
    prompt = encode_messages(chat, "non-think")
    found = re.findall(rf'<{DSML}parameter name="(.)" string="(true|false)">(.*?)</{DSML}', prompt,
                       re.DOTALL)  # fmt: skip
    assert [name for name, _, _ in found] == list(values)
    for name, is_text, text in found:
        assert (text if is_text == "true" else json.loads(text)) == values[name]
        assert (is_text == "true") == isinstance(values[name], str)
        assert "\\u" not in text
    assert encode_messages([user(), calling(call(values))], "non-think") == prompt


def test_null_is_absent() -> None:
    bare = encode_messages([user(), assistant()], "non-think")
    nulls = {"reasoning_content": None, "tool_calls": None, "refusal": None}
    assert encode_messages([user(name=None), assistant(**nulls)], "non-think") == bare


TWO = calling(call(identity="a"), call(identity="b"))

REFUSED: dict[str, tuple[Any, str]] = {
    "no list": ("hi", "must be a list"),
    "an object": ({"role": "user"}, "must be a list"),
    "null": (None, "must be a list"),
    "empty": ([], "no user message"),
    "system alone": ([system()], "no user message"),
    "a string in the list": (["hi"], "message 1 is a str"),
    "no role": ([{"content": "hi"}], "message 1 has the role None"),
    "unknown role": ([{"role": "narrator", "content": "x"}], "'narrator'; known are system"),
    "role of another type": ([{"role": ["user"], "content": "x"}], r"message 1 has the role \["),
    "no content": ([{"role": "user"}], r"message 1 \(user\) has no content"),
    "null content": ([user(), assistant(None)], r"message 2 \(assistant\) has no content"),
    "content in parts": ([user([{"type": "text", "text": "x"}] * 2)], "is a list.*one string"),  # type: ignore[arg-type]
    "content a number": ([user(3)], "is a int"),  # type: ignore[arg-type]
    "unknown key": ([user(name="Ann")], "has 'name', whose effect"),
    "other reasoning key": ([user(), assistant(reasoning="x")], "has 'reasoning'"),
    "response format": ([user(response_format={})], "has 'response_format'"),
    "response format of V4": ([system(response_format={}), user()], "not known; take it out"),
    "second system": ([system(), user(), assistant(), system()], r"message 4 \(system\) stands"),
    "system behind a user": ([user(), system()], r"message 2 \(system\) stands"),
    "late reminder": ([user(), assistant(), {"role": "latest_reminder", "content": "x"}],
                      r"message 3 \(latest_reminder\) stands"),
    "assistant first": ([assistant()], r"message 1 \(assistant\) stands where a user"),
    "two assistants": ([user(), assistant(), assistant()], "message 3 .assistant. stands"),
    "developer after a result": ([user(), calling(call()), result(),
                                  {"role": "developer", "content": "x"}], "where a user or dev"),
    "user after a developer": ([{"role": "developer", "content": "x"}, user()],
                               "message 2 .user. follows developer message 1"),
    "id of a result a number": ([user(), TWO, result(identity=7)], "tool_call_id' is a int"),  # type: ignore[arg-type]
    "calls no list": ([user(), assistant(tool_calls="x")], "tool_calls must be a list of objects"),
    "call a string": ([user(), assistant(tool_calls=["x"])], "must be a list of objects"),
    "call without function": ([user(), calling({"id": "a"})], "must have a name and arguments"),
    "call of another type": ([user(), calling({**call(), "type": "web"})], "must have 'type'"),
    "call with more": ([user(), calling({**call(), "more": 0})], "must have 'type'"),
    "id a number": ([user(), calling({**call(), "id": 7})], "its id is a int"),
    "arguments no JSON": ([user(), calling(call("{q: 1}"))], "tool call 1: .* are not JSON"),
    "arguments nested": ([user(), calling(call("[" * 10**5))], "are not JSON"),
    "arguments a list": ([user(), calling(call("[1]"))], "must be a JSON object"),
    "argument NaN": ([user(), calling(call('{"q": NaN}'))], "cannot be written as JSON"),
    "argument a set": ([user(), calling(call({"q": {1}}))], "cannot be written as JSON"),
    "name in quotes": ([user(), calling(call('{"a\\"b": 1}'))], "cannot stand as a name"),
    "call without a name": ([user(), calling(call(name=""))], "cannot stand as a name"),
    "unknown task": ([user(task="poem")], "task 'poem' is not known; known is action"),
    "task behind a text": ([user(), user(task="action")], "a turn of its own"),
    "early task": ([user(task="action"), assistant(), user()], "last user message"),
    "half a character": ([user("a\ud800")], "half a surrogate pair"),
    "tags in a reply": ([user(), assistant("<think>x</think>y")], "as 'reasoning_content'"),
    "tags in reasoning": ([user(), assistant(reasoning_content="<think>x")], "without tags"),
    "BOS in a text": ([user(BOS + "x")], "message 1 .user.: 'content' holds <｜begin"),
    "a turn in a text": ([user("x" + USER)], "holds <｜User｜>"),
    "a turn in the system": ([system("x" + ASSISTANT), user()], "holds <｜Assistant｜>"),
    "EOS in a reply": ([user(), assistant("x" + EOS)], "message 2 .* holds <｜end"),
    "DSML in a value": ([user(), calling(call({"q": f"</{DSML}parameter>"}))], "holds ｜DSML｜"),
    "escaped token": ([user(), calling(call('{"q": ["<\\uff5cUser\\uff5c>"]}'))], "holds <｜User"),
    "token as a name": ([user(), calling(call({DSML: 1}))], "holds ｜DSML｜"),
    "token in a result": ([user(), calling(call()), result(EOS)], "holds <｜end"),
    "tools on a user": ([user(tools=[TOOL])], "has 'tools', whose effect"),
    "tools no list": ([system(tools={"a": 1}), user()], "tools must be a list"),
    "bare tool": ([system(tools=[TOOL["function"]]), user()], "tools: number 1 must be"),
    "tool without a name": ([system(tools=[{"type": "function", "function": {}}]), user()],
                            "its function has no name"),
    "token in a tool": ([system(tools=[{"type": "function", "function": {"name": EOS}}]), user()],
                        "tools: number 1 holds"),
    "tools twice": ([system(tools=[TOOL]), {"role": "developer", "content": "x", "tools": [TOOL]}],
                    "gives tools a second time"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    messages, message = REFUSED[kind]
    with pytest.raises(EncodingError, match=message):
        encode_messages(messages, "non-think")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user(task="action")], "in mode non-think only"),
        ([user(), calling(call(), reasoning_content="r"), result()], "no tools are given"),
        (
            [{"role": "developer", "content": "x"}, assistant(reasoning_content="r"), user()],
            "developer's message without tools",
        ),
    ],
)
def test_refused_when_thinking(messages: list[Message], message: str) -> None:
    with pytest.raises(EncodingError, match=message):
        encode_messages(messages, "think-high")
    assert encode_messages(messages, "non-think")


def test_refused_arguments() -> None:
    with pytest.raises(EncodingError, match="no mode 'chat'; choose one of non-think"):
        encode_messages([user()], "chat")
    with pytest.raises(EncodingError, match="no release '0813'; known are preview"):
        encode_messages([user()], "non-think", release="0813")
    with pytest.raises(EncodingError, match="beside the messages and again in message 1"):
        encode_messages([system(tools=[TOOL]), user()], "non-think", tools=[TOOL])
    assert encode_messages([user()], "non-think", tools=[]) == encode_messages([user()], MODES[0])


def test_a_reply_without_reasoning_has_an_empty_thought() -> None:
    for reply in (assistant(), assistant(reasoning_content="")):
        prompt = encode_messages([user(), reply], "think-high")
        assert prompt == f"{BOS}{USER}hi{ASSISTANT}<think></think>yes{EOS}"
    chat = [system(tools=[TOOL]), user(), assistant(), user()]
    assert f"{ASSISTANT}<think></think>yes{EOS}" in encode_messages(chat, "think-high")


def test_tools_without_a_system_message_make_an_empty_one() -> None:
    """As the release's server does, which puts one in front to hold them."""
    for release in ("preview", "v41"):
        given = encode_messages([user()], "think-high", tools=[TOOL], release=release)
        beside_empty = [system(""), user()]
        assert given == encode_messages(beside_empty, "think-high", tools=[TOOL], release=release)
    plain = encode_messages([user()], "non-think", tools=[TOOL])
    assert plain.startswith(f"{BOS}\n\n## Tools\n\n")


@pytest.mark.parametrize("arguments", ["{}", {}, None, ""])
def test_a_call_without_arguments_has_an_empty_line(arguments: Any) -> None:
    prompt = encode_messages([user(), calling(call(arguments))], "non-think")
    assert prompt.endswith(
        f'<{DSML}invoke name="find">\n\n</{DSML}invoke>\n</{DSML}tool_calls>{EOS}'
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([("b", "2"), ("a", "1")], "12"),
        ([("b", "2")], "2"),  # one call is still open
        ([(None, "x"), (None, "y")], "xy"),  # without ids: as given
        ([("b", "2"), ("z", "x"), ("a", "1")], "x12"),  # an unknown id counts as the first call
        ([("a", "1"), ("a", "one")], "1one"),
    ],
)
def test_results_are_sorted_by_call(given: list[tuple[str | None, str]], wanted: str) -> None:
    chat = [user(), TWO, *(result(text, identity) for identity, text in given)]
    prompt = encode_messages(chat, "non-think")
    found = re.findall("<tool_result>(.*?)</tool_result>", prompt)
    assert "".join(found) == wanted


def test_users_texts_keep_their_places_between_results() -> None:
    chat = [user(), TWO, result("2", "b"), user("wait"), result("1", "a"), user("go on")]
    tail = "\n\n".join(
        ["<tool_result>1</tool_result>", "wait", "<tool_result>2</tool_result>", "go on"]
    )
    assert encode_messages(chat, "non-think").endswith(f"{USER}{tail}{ASSISTANT}</think>")
    assert (
        encode_messages([user("a"), user("b")], "non-think")
        == f"{BOS}{USER}a\n\nb{ASSISTANT}</think>"
    )


# V4.1.

EFFORT = (
    "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
)


def v41(messages: list[Message], mode: str = "non-think", **more: Any) -> str:
    return encode_messages(messages, mode, release="v41", **more).removeprefix(BOS)


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("think-low", 50),
        ("think-high", 75),
        ("think-xhigh", 75),
        ("think-max", 100),
        ("think-1", 1),
        ("think-42", 42),
        ("think-100", 100),
    ],
)
def test_v41_says_the_effort_as_a_number(mode: str, number: int) -> None:
    effort = SYSTEM + EFFORT.format(number)
    assert v41([user()], mode) == f"{effort}{USER}hi{ASSISTANT}<think>"
    assert v41([system(), user()], mode) == f"{effort}Be brief.{USER}hi{ASSISTANT}<think>"


@pytest.mark.parametrize("mode", ["think-0", "think-101", "think-", "think-1.5", "think-²", "50"])
def test_v41_refuses_other_efforts(mode: str) -> None:
    with pytest.raises(EncodingError, match=r"effort lies|no mode"):
        v41([user()], mode)


def test_v41_without_thinking_has_no_effort() -> None:
    assert v41([user()]) == f"{USER}hi{ASSISTANT}</think>"
    assert v41([system(""), user()]) == f"{SYSTEM}{USER}hi{ASSISTANT}</think>"


def test_v41_has_system_messages_in_the_middle() -> None:
    chat = [system("a"), user("q"), assistant(reasoning_content="r"), system("b")]
    head = f"{SYSTEM}{EFFORT.format(88)}a{USER}q{ASSISTANT}"
    assert v41(chat, "think-88") == f"{head}</think>yes{EOS}{SYSTEM}b{ASSISTANT}<think>"
    kept = v41(chat, "think-88", drop_thinking=False)
    assert kept == f"{head}<think>r</think>yes{EOS}{SYSTEM}b{ASSISTANT}<think>"
    assert v41([system("a"), system("b")]) == f"{SYSTEM}a{SYSTEM}b{ASSISTANT}</think>"
    both = [user("q"), system("b"), user("c"), assistant()]
    assert v41(both) == f"{USER}q{SYSTEM}b{USER}c{ASSISTANT}</think>yes{EOS}"


def test_v41_calls_have_a_space_before_their_names() -> None:
    chat = [user(), calling(call({"k": "v", "n": 2}, "a"), call({}, "b"), reasoning_content="r"),
            result("2", "b"), result("1", "a")]  # fmt: skip
    prompt = v41(chat, "think-high", tools=[TOOL])
    calls = (
        f"\n\n<{DSML} calls>\n"
        f'<{DSML} invoke name="find">\n'
        f'<{DSML} parameter name="k" string="true">v</{DSML} parameter>\n'
        f'<{DSML} parameter name="n" string="false">2</{DSML} parameter>\n'
        f"</{DSML} invoke>\n"
        f'<{DSML} invoke name="find">\n\n</{DSML} invoke>\n'
        f"</{DSML} calls>{EOS}"
    )
    results = "<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>"
    assert prompt.endswith(
        f"{USER}hi{ASSISTANT}<think>r</think>{calls}{USER}{results}{ASSISTANT}<think>"
    )
    assert f'writing a "<{DSML} calls>" block' in prompt
    assert "tool_calls>" not in prompt and f"<{DSML}invoke" not in prompt


def test_v41_response_format_stands_behind_the_tools() -> None:
    prompt = v41([system(tools=[TOOL], response_format={"é": 1}), user()])
    tools, form = prompt.split("\n\n## Response Format:\n\n")
    assert "## Tools" in tools
    assert form.startswith('You MUST strictly adhere to the following schema to reply:\n{"é": 1}')


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user(f"see {IMAGE}")], "message 1 .user.: 'content' holds <｜deepseek_image｜>"),
        ([user(SYSTEM)], "holds <｜System｜>"),
        ([{"role": "developer", "content": "x"}], "make it a system message"),
        ([system(response_format=[1]), user()], "must be an object"),
        ([user(), system(tools=[TOOL]), user(), assistant(), system(tools=[TOOL])], "second time"),
    ],
)
def test_v41_refuses(messages: list[Message], message: str) -> None:
    with pytest.raises(EncodingError, match=message):
        v41(messages)


# Chats as a corpus.


def rows(tmp_path: Path, *lines: dict[str, Any]) -> Path:
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def load(file: Path, seq_len: int | None = None, mode: str = "non-think") -> Any:
    return load_corpus([file], TOKENIZER, CorpusRequest(seq_len, None, 0, 2048, mode))


def tokens(text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(TOKENIZER)).encode(text, add_special_tokens=False).ids
    return ids


def test_chat_rows_are_parts_by_mode(tmp_path: Path) -> None:
    chat = [user("Why?"), assistant("So.", reasoning_content="Because.")]
    tooled = [system(), user("Find it.")]
    file = rows(
        tmp_path,
        {"messages": chat},
        {"messages": chat, "mode": "think-max"},
        {"text": "plain words"},
        {"messages": tooled, "tools": [TOOL], "mode": "non-think", "source": "x"},
        {"messages": chat, "mode": None},
    )
    corpus = load(file, mode="think-high")
    wanted = {
        "chat (think-high)": [encode_messages(chat, "think-high")] * 2,
        "chat (think-max)": [encode_messages(chat, "think-max")],
        "chat": [BOS + "plain words"],
        "chat (non-think)": [encode_messages(tooled, "non-think", tools=[TOOL])],
    }
    assert [p.name for p in corpus.parts] == list(wanted)
    for part in corpus.parts:
        ids = [tokens(text) for text in wanted[part.name]]
        # A chat longer than the default window lost its incomplete end.
        assert [w.tolist() for w in part.windows] == [i[:512] for i in ids]
        assert all(w.tolist().count(0) == 1 for w in part.windows)


def test_long_chats_are_cut_with_one_bos_each(tmp_path: Path) -> None:
    chat = [user("one two three four five six seven eight nine ten. " * 20)]
    _, *body = tokens(encode_messages(chat, "non-think"))
    windows = load(rows(tmp_path, {"messages": chat}), seq_len=17).windows
    assert len(windows) == len(body) // 16
    assert [w.tolist() for w in windows] == [
        [0, *body[i : i + 16]] for i in range(0, 16 * len(windows), 16)
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user()], "mode": "fast"}, "line 2: there is no mode 'fast'"),
        ({"messages": [user()], "mode": ["x"]}, "line 2: there is no mode"),
        ({"messages": "hi"}, "line 2: messages must be a list"),
        ({"messages": [assistant()]}, "line 2: message 1 .assistant. stands where a user"),
        ({"messages": [user(BOS)]}, "line 2: message 1 .user.: 'content' holds"),
        ({"messages": [user()], "tools": "x"}, "line 2: tools must be a list"),
        ({"messages": [user()], "text": "x"}, 'line 2 has "text" and "messages"'),
    ],
)
def test_bad_chat_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = rows(tmp_path, {"messages": [user()]}, row)
    with pytest.raises(CorpusError, match=rf"chat\.jsonl: {message}"):
        load(file)


def test_chats_need_a_tokenizer_with_bos(tmp_path: Path) -> None:
    file = rows(tmp_path, {"messages": [user()]})
    with pytest.raises(CorpusError, match=r"line 1: the tokenizer does not make .*BOS, token 7"):
        load_corpus([file], TOKENIZER, CorpusRequest(None, None, 7, 2048))


# The command.


def run(*arguments: object, given: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["encode", *map(str, arguments)], input=given)


def test_command_prints_the_exact_prompt(tmp_path: Path) -> None:
    for number, case in enumerate(GENERATED):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(case["messages"]))
        ran = run(file, "--mode", mode_of(case))
        assert (ran.exit_code, ran.stdout_bytes) == (0, case["prompt"].encode())


def test_command_reads_stdin_and_tools() -> None:
    messages = [system(), user("é")]
    given = json.dumps({"messages": messages, "tools": [TOOL]}, ensure_ascii=False).encode()
    wanted = encode_messages(messages, "think-max", tools=[TOOL])
    assert run("-", "--mode", "think-max", given=given).stdout_bytes == wanted.encode()


def test_command_prints_ids(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([user("Two words.")]))
    prompt = encode_messages([user("Two words.")], "think-high")
    for tokenizer in (TOKENIZER, TOKENIZER.parent):
        ran = run(file, "--mode", "think-high", "--ids", "--tokenizer", tokenizer)
        assert [int(i) for i in ran.stdout.split()] == tokens(prompt)
    ran = run(file, "--mode", "think-high", "--ids", "--tokenizer", TOKENIZER, "--json")
    facts = {"mode": "think-high", "release": "preview"}
    assert json.loads(ran.stdout) == {**facts, "prompt": prompt, "ids": tokens(prompt)}
    ran = run(file, "--mode", "think-high", "--release", "0731", "--json")
    assert json.loads(ran.stdout)["prompt"].startswith(BOS + MAX_EFFORT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\xfa", "is not JSON"),
        (b"[" * 10**5, "is not JSON"),
        (b'{"tools": []}', "must be a list, or an object"),
        (b'{"messages": [], "model": "x"}', "must be a list, or an object"),
        (b"3", "messages must be a list"),
        (b'[{"role": "assistant", "content": "x"}]', "where a user message"),
    ],
)
def test_command_names_bad_input(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    ran = run(file, "--mode", "non-think")
    assert isinstance(ran.exception, EncodingError)
    assert re.search(message, str(ran.exception)) and ran.stdout == ""


def test_command_refuses_wrong_usage(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([user()]))
    assert run(file).exit_code == run(file, "--mode", "chat").exit_code == 2
    ran = run(file, "--mode", "non-think", "--ids")
    assert ran.exit_code == 2 and "--ids needs --tokenizer" in ran.output
    for absent in (tmp_path / "no.json", tmp_path):
        ran = run(absent, "--mode", "non-think")
        assert re.search("cannot be read", str(ran.exception))
    ran = run(file, "--mode", "non-think", "--ids", "--tokenizer", tmp_path)
    assert re.search(r"tokenizer\.json: missing", str(ran.exception))


def test_what_data_sets_write_otherwise_is_the_same_prompt() -> None:
    """Content of one part; tools and calls as JSON text, which columns of one type need."""
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "tool", "content": "r"}
    plain = [user("x"), assistant(tool_calls=[call]), answer, assistant("y")]
    others = [user([{"type": "text", "text": "x"}]), assistant(tool_calls=json.dumps([call])),  # type: ignore[arg-type]
              answer, assistant([{"type": "text", "text": "y"}])]  # type: ignore[arg-type]  # fmt: skip
    wanted = encode_messages(plain, "non-think", tools=[tool])
    assert encode_messages(others, "non-think", tools=json.dumps([tool])) == wanted
