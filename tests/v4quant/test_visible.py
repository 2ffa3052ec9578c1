"""What comes from somebody's file never moves a cursor, and JSON stays what it was."""

from __future__ import annotations

import json

import pytest

from v4quant.cli import _output
from v4quant.visible import printable, visible

ODD = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202e", "\ud800", "\x00", "\r", "\U000e0001"]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_nothing_odd_is_printed(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"tensor '{odd}' in\nfile\tx"
    for show in (_output.data, _output.note, _output.heading):
        show(text)
    _output.emit({"name": odd})
    captured = capsys.readouterr()
    for stream in (captured.out, captured.err):
        assert not set(odd) & set(stream) - set("[2J0;title31m]")
        assert "\nfile\tx" in stream
    assert visible(odd).isprintable() and "\\u" in visible(odd)


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_json_means_the_same(odd: str) -> None:
    value = {f"name{odd}": [odd, "plain é"]}
    assert json.loads(printable(json.dumps(value, ensure_ascii=False))) == value


def test_plain_text_is_left_alone() -> None:
    text = "layers.0.ffn: 3.5 bits, naïve — 数\n\tnext"
    assert printable(text) == text
