"""Quoting: what a shell and then the program make of a word is the word."""

from __future__ import annotations

import random
import re
import subprocess

import pytest

from tests.support.shells import words_of
from v4quant import shell
from v4quant.shell import SHELLS, Shell, command_line, quoted

ODD = (
    "", "plain", "8GB", "a b", "10,11", "it's", "C:\\My Models\\", "C:\\a\\b", "x%PATH%y", "100%",
    "a&b|c<d>e^f", "(x)", "$HOME", "`id`", "$(id)", "#x", "-a.b", "--x.y", "@file", "a;b", "!x!",
    "blk\\.3\\.ffn_(gate|up)_exps=CPU", "hf://a/b@main", "d\u2019or", "~", "-", "*", "Ünï",
)  # fmt: skip
MARKS = ('{"placement": "cpu"}', 'a"b', '\\"', 'x\\\\"%PATH%" & y')


@pytest.mark.parametrize("name", SHELLS)
def test_a_word_arrives_as_it_is(name: Shell) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    letters = "ab \\'%&^()!,.$`-" + ("" if name == "powershell" else '"')
    words = ["v4quant", *ODD, *(() if name == "powershell" else MARKS)]
    words += ["".join(rng.choices(letters, k=rng.randrange(1, 9))) for _ in range(400)]
    for word in words:
        line = command_line(["v4quant", word, "end"], name)
        got = words_of(line, name)
        if name == "powershell" and word.endswith("\\"):
            # They are doubled, or they would escape the mark that PowerShell adds.
            got[1] = re.sub(r"(\\+)\1$", r"\1", got[1])
        assert got == ["v4quant", word, "end"], line


def test_sh_itself_hands_words_on() -> None:
    words = [*ODD, *MARKS]
    line = command_line(["printf", r"%s\0", *words], "sh")
    printed = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout.decode()
    assert printed.split("\0")[:-1] == words


def test_plain_words_stay_readable() -> None:
    line = ["v4quant", "plan", "C:\\models\\flash", "--context", "8192", "--gpu", "sm90"]
    assert {command_line(line, name) for name in ("cmd", "powershell")} == {" ".join(line)}


def test_the_shell_is_the_nearest_that_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell._nearest(["v4quant.exe", "cmd.exe", "explorer.exe"]) == "cmd"
    assert shell._nearest(["v4quant.exe", "pwsh.exe", "cmd.exe"]) == "powershell"
    assert shell._nearest(["bash.exe"]) == "sh" and shell._nearest([]) == "powershell"
    monkeypatch.setattr(shell, "own_shell", lambda: "cmd")
    assert quoted("a b") == '"a b"' and command_line(["it's"]) == '"it\'s"'
