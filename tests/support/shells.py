"""What shells make of a line, as models of their documented rules: for commands that we print."""

from __future__ import annotations

import re
import shlex

from v4quant.shell import Shell

_MARK = "['\u2018\u2019\u201a\u201b]"


def words_of(line: str, shell: Shell) -> list[str]:
    """The words that a program gets of `line`. A construct we do not print fails."""
    if shell == "sh":
        return shlex.split(line)
    if shell == "cmd":
        return _divided(_seen_by_cmd(line))
    return _seen_by_powershell(line)


def _seen_by_cmd(line: str) -> str:
    """What cmd hands to the program: variables first, then carets outside of quotation marks.

    Every variable has a value here, so one that is found shows.
    """
    line = re.sub(r"%([^%^\s\"]+)%", "EXPANDED", line)
    told, inside, at = "", False, 0
    while at < len(line):
        mark = line[at]
        if mark == "^" and not inside:
            at += 1
            told += line[at]
        else:
            assert inside or mark not in "&|<>", line
            inside ^= mark == '"'
            told += mark
        at += 1
    return told


def _divided(line: str) -> list[str]:
    """A program's words of what Windows hands it (the rules of Microsoft's C library)."""
    words, word, inside, at, any_word = [], "", False, 0, False
    while at < len(line):
        run = re.match(r"\\*", line[at:])
        assert run is not None
        backslashes, at = len(run[0]), at + len(run[0])
        mark = line[at : at + 1]
        if mark == '"':
            word += "\\" * (backslashes // 2)
            any_word = True
            if backslashes % 2:
                word += '"'
            else:
                inside = not inside
        else:
            word += "\\" * backslashes
            any_word = any_word or bool(backslashes)
            if mark == " " and not inside:
                words, word, any_word = [*words, word] if any_word else words, "", False
            else:
                word += mark
                any_word = any_word or bool(mark)
        at += 1
    return [*words, word] if any_word else words


def _seen_by_powershell(line: str) -> list[str]:
    """PowerShell's words: plain ones, and single quotes in which a doubled one stands for one."""
    words, at = [], 0
    while at < len(line):
        quoted_word = re.match(rf"{_MARK}((?:{_MARK}{{2}}|[^'\u2018\u2019\u201a\u201b])*){_MARK}",
                               line[at:])  # fmt: skip
        plain = re.match(r"[^\s'\"`$(){},;|&<>@#*]+", line[at:])
        found = quoted_word or plain
        assert found is not None, line
        if quoted_word:
            words.append(re.sub(rf"({_MARK}){_MARK}", r"\1", quoted_word[1]))
        else:
            assert not re.match(r"-[A-Za-z_?]\w*\.", found[0]), line  # would be cut at the dot
            words.append(found[0])
        at += len(found[0]) + 1
    return words
