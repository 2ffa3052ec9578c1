"""Commands as one types them: words quoted for the shell that will read them.

Three shells: `sh` (Linux, macOS, Git Bash, WSL), `cmd` and `powershell`. Windows hands a program a
single string, which the program itself divides (quotation marks, backslashes before them doubled);
what `cmd` and PowerShell do to that string first is their own. So a word is quoted for the program
and then for the shell:

- `cmd` expands `%name%` even between quotation marks, and a mark inside a word ends its quotation
  whatever stands before it. Words with either get a caret before everything `cmd` looks for: it
  drops them, and no variable's name ends in one.
- PowerShell takes everything between single quotes as it is; four typographic marks are single
  quotes too. A quotation mark inside a word reaches the program from PowerShell 7.3 on only (no
  file name of Windows has one).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from functools import cache
from typing import Literal

import psutil

Shell = Literal["sh", "cmd", "powershell"]
SHELLS: tuple[Shell, ...] = ("sh", "cmd", "powershell")
_PROGRAMS: dict[str, Shell] = {
    "cmd": "cmd", "powershell": "powershell", "pwsh": "powershell", "bash": "sh", "zsh": "sh",
    "sh": "sh",
}  # fmt: skip
_PLAIN = {
    "cmd": re.compile(r"[\w.:/\\@+=-]+", re.ASCII),
    # A word that begins with a dash is cut at its first dot.
    "powershell": re.compile(r"(?!-[^-]*\.)[\w.:/\\+=-]+", re.ASCII),
}
_SPECIAL = re.compile(r'[()%!^"<>&|]')  # to cmd
_SINGLE_QUOTES = re.compile("['\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
                            "\N{SINGLE LOW-9 QUOTATION MARK}"
                            "\N{SINGLE HIGH-REVERSED-9 QUOTATION MARK}]")  # fmt: skip


@cache
def own_shell() -> Shell:
    """The shell in which this program was started; the system's usual one where that is unknown."""
    if os.name != "nt" or os.environ.get("MSYSTEM"):
        return "sh"
    try:
        names = [parent.name() for parent in psutil.Process().parents()]
    except psutil.Error:
        names = []
    return _nearest(names)


def _nearest(programs: Sequence[str]) -> Shell:
    """The first shell among the programs that started this one, on Windows."""
    stems = (name.lower().removesuffix(".exe") for name in programs)
    return next((_PROGRAMS[stem] for stem in stems if stem in _PROGRAMS), "powershell")


def command_line(words: Sequence[str], shell: Shell | None = None) -> str:
    """A command in one line. shell: who reads it; the one this program was started in for None."""
    return " ".join(quoted(word, shell) for word in words)


def quoted(word: str, shell: Shell | None = None) -> str:
    """One word of a command, which the program gets as it is. The word has no line breaks."""
    shell = own_shell() if shell is None else shell
    if shell == "sh":
        return shlex.quote(word)
    if _PLAIN[shell].fullmatch(word):
        return word
    if shell == "cmd":
        passed = f'"{_for_program(word)}"'
        return _SPECIAL.sub(r"^\g<0>", passed) if re.search('["%]', word) else passed
    doubled = re.sub(r"(\\+)$", r"\1\1", word)  # PowerShell adds the marks, not the backslashes
    return f"'{_SINGLE_QUOTES.sub(lambda mark: 2 * mark[0], doubled)}'"


def _for_program(word: str) -> str:
    """A word between quotation marks, by the rules of Windows' programs."""
    return re.sub(r'(\\*)"', r'\1\1\\"', re.sub(r"(\\+)$", r"\1\1", word))
