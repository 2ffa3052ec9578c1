"""The options that every command has: how much is told, and where it is kept.

They are added when a command is loaded, so that no command can lack or redefine one, and say what
`_output` does; the commands themselves never see them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TextIO

import click

from v4quant import __version__
from v4quant.cli import _output
from v4quant.shell import command_line
from v4quant_formats.errors import OutputError

_FIRST_LINE = "# v4quant log"


def add_common(command: click.Command) -> None:
    """Give a command, or every command of a group, the options of all."""
    if isinstance(command, click.Group):
        for child in command.commands.values():
            add_common(child)
        return
    for parameter in command.params:
        if parameter.name == "as_json":
            parameter.is_eager, parameter.callback = True, _json
    command.params += [
        _flag("--quiet", _quiet, "Print errors only: no steps, no progress."),
        _flag("--verbose", _verbose, "Also print times, memory, and where an error arose."),
        click.Option(
            ["--log-file"],
            type=click.Path(path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_log_file,
            help="Append everything printed to this file, with times.",
        ),
    ]


def _flag(name: str, callback: Any, told: str) -> click.Option:
    return click.Option(
        [name], is_flag=True, is_eager=True, expose_value=False, callback=callback, help=told
    )


def _json(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    _output.manner.json = value
    return value


def _quiet(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    _output.manner.quiet = value
    if value and _output.manner.verbose:
        raise click.UsageError("--quiet and --verbose contradict each other")


def _verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    _output.manner.verbose = value
    if value and _output.manner.quiet:
        raise click.UsageError("--quiet and --verbose contradict each other")


def _log_file(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    _output.manner.log = _open_log(value)
    _output.detail(f"v4quant {__version__}: {command_line(['v4quant', *sys.argv[1:]])}")


def _open_log(path: Path) -> TextIO:
    """A log to append to: a new file, or one that is a log of ours. Raises OutputError."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            file = os.fdopen(os.open(path, flags, 0o644), "a", encoding="utf-8")
            file.write(f"{_FIRST_LINE}\n")
            return file
        if path.is_file():
            with path.open("rb") as there:
                ours = there.read(len(_FIRST_LINE)) == _FIRST_LINE.encode()
            if ours:
                return path.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
    raise OutputError(f"{path}: exists and is not a log of v4quant; give --log-file another name")
