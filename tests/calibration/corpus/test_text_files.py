"""Text as it is found is read; what is not UTF-8 is told with its remedy."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from v4quant.builtin import resolve_source
from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus
from v4quant_calibration.corpus.errors import CorpusError

TOKENIZER = resolve_source("builtin:tiny-v4") / "tokenizer.json"
LINES = ["The house was quiet.", "Nobody said a word about the letter.", "Rain fell all day."]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]


def load(file: Path) -> list[torch.Tensor]:
    return load_corpus([file], TOKENIZER, CorpusRequest(16, None, 0, 2048)).windows


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


ROWS = [{"text": line} for line in LINES]
CHATS = [{"messages": CHAT}] * 2


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("b.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS), ROWS),
        ("b.jsonl", jsonl(ROWS).replace(b"\n", b"\r\n"), ROWS),
        ("b.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0), ROWS),
        ("b.json", json.dumps(ROWS).encode(), ROWS),
        ("b.json", json.dumps(CHATS).encode(), CHATS),
        ("b.json", json.dumps([r["text"] for r in ROWS]).encode(), ROWS),
        ("b.jsonl", jsonl([{**r, "messages": None} for r in ROWS]), ROWS),
        ("b.jsonl", jsonl([{**r, "text": None} for r in CHATS]), CHATS),
    ],
)  # fmt: skip
def test_rows_however_they_are_written(
    name: str, data: bytes, rows: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    (tmp_path / name).write_bytes(data)
    assert same(load(tmp_path / name), load(tmp_path / "a.jsonl"))


def test_plain_text_keeps_its_line_ends(tmp_path: Path) -> None:
    text = "\n".join(LINES)
    for name, data in (("a.txt", text.encode()), ("b.txt", b"\xef\xbb\xbf" + text.encode()),
                       ("c.txt.gz", gzip.compress(text.encode(), mtime=0)),
                       ("d.txt", text.replace("\n", "\r\n").encode())):  # fmt: skip
        (tmp_path / name).write_bytes(data)
    assert same(load(tmp_path / "a.txt"), load(tmp_path / "b.txt"))
    assert same(load(tmp_path / "a.txt"), load(tmp_path / "c.txt.gz"))
    assert not same(load(tmp_path / "a.txt"), load(tmp_path / "d.txt"))


def test_other_keys_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(CHATS))
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello there"}]
    pair = {"prompt": "hi", "completion": "hello there"}
    for keys, row in (("sharegpt", {"conversations": turns}), ("prompt-completion", pair)):
        (tmp_path / "b.jsonl").write_bytes(jsonl([row] * 2))
        request = CorpusRequest(16, None, 0, 2048, chat_keys=keys)
        found = load_corpus([tmp_path / "b.jsonl"], TOKENIZER, request).windows
        assert same(found, load(tmp_path / "a.jsonl"))
        with pytest.raises(CorpusError, match="line 1"):
            load(tmp_path / "b.jsonl")


def test_bad_rows_are_skipped_as_often_as_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    bad = b"{not json}\n" + jsonl(ROWS[:2]) + jsonl([{"text": 5}]) + jsonl(ROWS[2:])
    (tmp_path / "b.jsonl").write_bytes(bad)
    for allowed in (2, 9):
        request = CorpusRequest(16, None, 0, 2048, skip_bad_rows=allowed)
        found = load_corpus([tmp_path / "b.jsonl"], TOKENIZER, request)
        assert same(found.windows, load(tmp_path / "a.jsonl"))
        assert found.skipped_rows == 2
    request = CorpusRequest(16, None, 0, 2048, skip_bad_rows=1)
    with pytest.raises(CorpusError, match=r"line 4.*1 bad row before it"):
        load_corpus([tmp_path / "b.jsonl"], TOKENIZER, request)


def test_a_tokenizer_that_does_not_fit_is_no_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(CHATS))
    for bos in (1, 5):
        request = CorpusRequest(16, None, bos, 2048, skip_bad_rows=9)
        with pytest.raises(CorpusError, match="the tokenizer does not make"):
            load_corpus([tmp_path / "a.jsonl"], TOKENIZER, request)


HI = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
ASKED = [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "content": "12"}, {"role": "assistant", "content": "noon"}]  # fmt: skip


def longer(name: str, value: Any, turn: int = 1) -> list[dict[str, Any]]:
    return [{**m, name: value} if i == turn else m for i, m in enumerate(CHAT)]


@pytest.mark.parametrize(
    "messages",
    [
        longer("annotations", []),
        longer("audio", None),
        longer("tool_calls", []),
        longer("name", None, turn=0),
    ],
)
def test_what_a_server_adds_and_says_nothing_by(
    messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(CHATS))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"messages": messages}] * 2))
    assert same(load(tmp_path / "b.jsonl"), load(tmp_path / "a.jsonl"))


def test_calls_of_tools_as_servers_write_them(tmp_path: Path) -> None:
    """No system message, arguments that are empty, a call's place in its stream."""
    streamed = [ASKED[0], {**ASKED[1], "tool_calls": [{**CALL, "index": 0}]}, *ASKED[2:]]
    for name, messages in (("a", ASKED), ("b", streamed)):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([{"messages": messages, "tools": TOOLS}]))
    assert same(load(tmp_path / "a.jsonl"), load(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_bytes(jsonl([{"messages": ASKED[:1] + ASKED[3:]}]))
    assert not same(load(tmp_path / "a.jsonl"), load(tmp_path / "c.jsonl"))


TURNS = [{"from": "Human", "value": "hi"}, {"from": "gpt", "value": "hello there"}]


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        ("sharegpt", {"conversations": TURNS}),
        ("sharegpt", {"conversations": CHAT}),
        ("prompt-completion", {"prompt": "hi", "completion": "hello there"}),
        ("prompt-completion", {"prompt": CHAT[:1], "completion": CHAT[1:]}),
    ],
)
def test_a_row_of_other_keys_with_a_system_text(
    keys: str, row: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{**row, "system": "be brief", "mode": "think-high"}]
    messages = [{"role": "system", "content": "be brief"}, *CHAT]
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"messages": messages, "mode": "think-high"}]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(rows))
    request = CorpusRequest(16, None, 0, 2048, chat_keys=keys)
    found = load_corpus([tmp_path / "b.jsonl"], TOKENIZER, request)
    assert same(found.windows, load(tmp_path / "a.jsonl"))
    assert [part.name for part in found.parts] == ["b (think-high)"]


def test_a_pair_of_lists_of_messages(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(CHATS))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 2))
    request = CorpusRequest(16, None, 0, 2048, chat_keys="prompt-completion")
    found = load_corpus([tmp_path / "b.jsonl"], TOKENIZER, request).windows
    assert same(found, load(tmp_path / "a.jsonl"))


U = "user"
BAD_CHATS = {
    "content in several parts": [{"role": U, "content": [{"type": "text", "text": "x"}] * 2}],
    "system message comes first": [*CHAT, {"role": "system", "content": "s"}, *CHAT],
    "stands where a user": [CHAT[1], *CHAT],
    "holds <think>": [HI, {"role": "assistant", "content": "<think>a</think>b"}],
    "has no content": [HI, {"role": "assistant", "content": None}],
    "has 'reasoning'": longer("reasoning", "r"),
    "structure of the prompt": [{"role": U, "content": "<\uff5cUser\uff5c>"}, CHAT[1]],
}


@pytest.mark.parametrize("told", BAD_CHATS)
def test_chats_whose_prompt_nobody_knows_are_told_by_row(told: str, tmp_path: Path) -> None:
    rows = [*CHATS, {"messages": BAD_CHATS[told]}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(CorpusError, match=f"line 3: .*{told}"):
        load(tmp_path / "a.jsonl")
    request = CorpusRequest(16, None, 0, 2048, skip_bad_rows=1)
    assert load_corpus([tmp_path / "a.jsonl"], TOKENIZER, request).skipped_rows == 1


def test_parquet_and_zstandard_where_their_packages_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    zstandard = pytest.importorskip("zstandard")
    press = zstandard.ZstdCompressor().compress
    for frames in ([ROWS], [ROWS[:1], ROWS[1:]]):
        data = b"".join(press(jsonl(rows)) for rows in frames)
        (tmp_path / "b.jsonl.zst").write_bytes(data)
        assert same(load(tmp_path / "b.jsonl.zst"), load(tmp_path / "a.jsonl"))
        (tmp_path / "c.jsonl.zst").write_bytes(data[:-5])
        with pytest.raises(CorpusError, match="ends inside its compressed data"):
            load(tmp_path / "c.jsonl.zst")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", "caf\xe9 au lait".encode("latin-1"), "Latin-1.*iconv"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
        ("a.txt", "text".encode("utf-16-le"), r"UTF-16 or no text.*UTF-16LE"),
        ("a.jsonl", jsonl(ROWS).decode().encode("utf-16-be"), r"UTF-16 or no text.*UTF-16BE"),
        ("a.txt", "text".encode("utf-32"), "UTF-32"),
        ("a.txt", gzip.compress(b"text"), "compressed by gzip; call it .gz"),
        ("a.jsonl", bz2.compress(jsonl(ROWS)), "compressed by bzip2"),
        ("a.json", b"PAR1" + bytes(20) + b"\xff", "parquet"),
        ("a.txt", b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "tar archive"),
        ("a.jsonl", jsonl([{"text": "a", "messages": CHAT}]), "line 1 has .*which of them"),
        ("a.txt", "caf\xe9".encode()[:-1], "ends inside a UTF-8 character.*LATIN1"),
        ("a.txt.gz", b"\x1f\x8b junk", "decompressed"),
        ("a.txt.gz", gzip.compress(b"x" * 500, mtime=0)[:-9], "decompressed"),
        ("b.txt.gz", gzip.compress(b"x" * 500, mtime=0)[:10] + b"\x00" * 20, "decompressed"),
        ("a.json", b"{}", "list of rows"),
        ("a.json", b"[1", "not JSON"),
        ("a.jsonl", jsonl([{"text": "x", "messages": CHAT}]), "text"),
        ("a.jsonl", jsonl([{"text": None}]), "line 1 has no"),
        ("a.jsonl", jsonl([{"content": "x"}]), "line 1 has no"),
        ("a.parquet", b"PAR1", "pyarrow|parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(name: str, data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=text):
        load(tmp_path / name)
