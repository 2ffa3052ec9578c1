"""The command line: one file per verb, each a thin face of one public function.

`main` is the outermost frame: it turns a V4QuantError into one line and exit code 1 (tracebacks
only with V4QUANT_DEBUG=1), wrong usage into 2, and SIGINT / SIGTERM into 130 / 143 after workers
have stopped and temporary files are gone. A verification that found a difference exits with 3.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import MutableMapping
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

from v4quant import __version__
from v4quant.cli import _exit, _output
from v4quant.cli._common import add_common
from v4quant.cli._folders import explained, require_working_folder
from v4quant.cli._interrupted import stopped
from v4quant.cli._termination import end, is_watched, watch_signals
from v4quant.hub.stopping import end_network
from v4quant.sizes import human_bytes
from v4quant_formats.system import peak_rss_bytes
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
_CALLS_BACK = "llvmlite"


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
            add_common(command)
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
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        signal.signal(signal.SIGINT, _on_interrupt)
    watch_signals(stopped("Terminated", _command()), stopped("Interrupted", _command()))
    if os.environ.get("V4QUANT_DEBUG") != "1":
        # When another rank dies, its library prints a page of frames; the error says it in a line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # numpy is optional to torch and absent CUDA is normal here: neither concerns the user.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    _output.reset()
    _output.speak_utf8()
    _output.tell_warnings()
    _output.manner.json = "--json" in sys.argv[1:]
    began = time.monotonic()
    try:
        require_working_folder()
        code = cli.main(prog_name="v4quant", standalone_mode=False)
        _tell_costs(began)
        sys.exit(code if isinstance(code, int) else 0)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _end("Interrupted", _exit.INTERRUPTED)
    except _Terminated:
        _end("Terminated", _exit.TERMINATED)
    except click.ClickException as error:
        _misused(error)
    except V4QuantError as error:
        _fail(error)
    except (OSError, MemoryError) as error:
        _fail(error)


def _command() -> str:
    """The command that was asked for; "" where none is known."""
    return next((word for word in sys.argv[1:] if word in COMMANDS), "")


def _misused(error: click.ClickException) -> NoReturn:
    """Click's own message, with the command's usage, and the JSON value where that was asked."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        _output.note(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help' for help.\n")
    _leave(f"Error: {error.format_message()}", type(error).__name__, error.exit_code)


def _fail(error: Exception) -> NoReturn:
    if os.environ.get("V4QUANT_DEBUG") == "1":
        raise error
    _output.detail("".join(traceback.format_exception(error)))
    text = explained(error) if isinstance(error, OSError) else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if len(text) > _LONGEST_ERROR:  # a file may hold a name of a megabyte
        text = f"{text[:_LONGEST_ERROR]} ..."
    code = error.exit_code if isinstance(error, V4QuantError) else _exit.FAILED
    _leave(f"Error: {text}", type(error).__name__, code)


def _end(word: str, code: int) -> NoReturn:
    """After a signal: threads that cannot end, and libraries that put things away, may take long;
    once Python itself begins to end, nothing bounds that any more."""
    _output.last_words(stopped(word, _command()), word, code)
    _output.reset()
    if is_watched():
        if folders := sys.modules.get("v4quant.temporary_folders"):  # slow to load
            folders.remove_all()
        end(code)
    sys.exit(code)


def _leave(text: str, kind: str, code: int) -> NoReturn:
    _output.last_words(text, kind, code)
    _output.reset()
    sys.exit(code)


def _tell_costs(began: float) -> None:
    """What the command took, for whoever wants to know."""
    busy = time.process_time()
    _output.detail(
        f"took {time.monotonic() - began:.1f} s, {busy:.1f} CPU-seconds, at most "
        f"{human_bytes(peak_rss_bytes())} of memory"
    )
    _output.reset()


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    _stop_work()
    _raise_outside(KeyboardInterrupt, frame)


def _on_terminate(signum: int, frame: FrameType | None) -> None:
    _stop_work()
    _raise_outside(_Terminated, frame)


def _raise_outside(end: type[BaseException], frame: FrameType | None) -> None:
    """Raise where it is heard: what a callback of the compiler raises is printed and forgotten."""
    above = frame
    while above is not None and not _calls_back(above):
        above = above.f_back
    if above is None:
        raise end
    if sys.platform == "win32":
        raise end
    else:  # noqa: RET506  (a type check for Windows does not read this branch)
        signal.signal(signal.SIGALRM, lambda _, later: _raise_outside(end, later))
        signal.setitimer(signal.ITIMER_REAL, 0.02)


def _calls_back(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == _CALLS_BACK


def _stop_work() -> None:
    """What hears no exception of the main thread: bars, and threads that wait for a server."""
    _output.stop_bars()
    if is_watched():
        end_network()
