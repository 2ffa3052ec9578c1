"""The command line: one file per verb, each a thin face of one public function.

`main` is the outermost frame: it turns a V4QuantError into one line and exit code 1 (tracebacks
only with V4QUANT_DEBUG=1), wrong usage into 2, and SIGINT / SIGTERM into 130 / 143 after workers
have stopped and temporary files are gone. A verification that found a difference exits with 3.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import MutableMapping
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

from v4quant import __version__
from v4quant.cli import _exit, _output
from v4quant.cli._termination import watch_termination
from v4quant_kernels.errors import V4QuantError

COMMANDS = {
    "inspect": "inspect",
    "plan": "plan",
    "calibrate": "calibrate",
    "allocate": "allocate",
    "quantize": "quantize",
    "verify": "verify",
    "diff": "diff",
    "evaluate": "evaluate",
    "run": "run",
    "push": "push",
    "encode": "encode",
    "bench": "bench",
    "export-onnx": "export_onnx",
    "completion": "completion",
}
"""Command -> the module beside this one that has it, under the same name."""


_LONGEST_ERROR = 2000


class _Terminated(BaseException):
    """SIGTERM arrived."""


class LazyGroup(click.Group):
    """Loads a command's module when that command is asked for, so that a typo costs nothing."""

    def __init__(self, **settings: Any) -> None:
        """settings: as of click.Group."""
        self._loaded: dict[str, click.Command] = {}
        super().__init__(**settings)

    @property
    def commands(self) -> MutableMapping[str, click.Command]:
        """All of them, loaded."""
        return {name: self._load(name) for name in COMMANDS}

    @commands.setter
    def commands(self, value: MutableMapping[str, click.Command]) -> None:
        assert not value, "commands are found by COMMANDS"

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of a conversion's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; None when there is none of that name."""
        return self._load(cmd_name) if cmd_name in COMMANDS else None

    def _load(self, name: str) -> click.Command:
        if name not in self._loaded:
            module = import_module(f"v4quant.cli.{COMMANDS[name]}")
            command: click.Command = getattr(module, COMMANDS[name])
            _read_environment(command, f"v4quant_{name}")
            self._loaded[name] = command
        return self._loaded[name]


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `v4quant run demo`; every command's --help has an example.",
)
@click.version_option(__version__, prog_name="v4quant")
def cli() -> None:
    """Convert DeepSeek-V4 checkpoints to what your GPUs serve, with proof of what it cost."""


def _read_environment(command: click.Command, prefix: str) -> None:
    """Let `--some-option` of `v4quant verb` default to V4QUANT_VERB_SOME_OPTION.

    Click's own prefix would use the parameters' Python names, which users never see.
    """
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            flag = next(f for f in parameter.opts if f.startswith("--"))
            parameter.envvar = f"{prefix}{flag}".replace("--", "_").replace("-", "_").upper()
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            _read_environment(child, f"{prefix}_{name}")


def main() -> NoReturn:
    """Entry point of the `v4quant` command."""
    signal.signal(signal.SIGTERM, _on_terminate)
    watch_termination()
    # numpy is optional to torch and absent CUDA is normal here: neither concerns the user.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    try:
        code = cli.main(prog_name="v4quant", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        _leave("Interrupted; the same command resumes.", _exit.INTERRUPTED)
    except KeyboardInterrupt:
        _leave("Interrupted; the same command resumes.", _exit.INTERRUPTED)
    except _Terminated:
        _leave("Terminated; the same command resumes.", _exit.TERMINATED)
    except click.ClickException as error:
        error.show(file=sys.stderr)
        sys.exit(error.exit_code)
    except V4QuantError as error:
        _fail(error)
    except (OSError, MemoryError) as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    if os.environ.get("V4QUANT_DEBUG") == "1":
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > _LONGEST_ERROR:  # a file may hold a name of a megabyte
        text = f"{text[:_LONGEST_ERROR]} ..."
    code = error.exit_code if isinstance(error, V4QuantError) else _exit.FAILED
    _leave(f"Error: {text}", code)


def _leave(text: str, code: int) -> NoReturn:
    _output.note(text)
    sys.exit(code)


def _on_terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated
