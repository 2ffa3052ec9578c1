"""The command line: one file a verb, each a thin face of one public function.

`main` is the outermost frame: it turns a V4QuantError into one line and exit code 1 (tracebacks
only with V4QUANT_DEBUG=1), wrong usage into 2, and SIGINT / SIGTERM into 130 / 143 after workers
have stopped and temporary files are gone. A verification that found a difference exits with 3.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

import click

from v4quant import __version__
from v4quant.cli import _exit, _output
from v4quant.cli.allocate import allocate
from v4quant.cli.bench import bench
from v4quant.cli.calibrate import calibrate
from v4quant.cli.diff import diff
from v4quant.cli.encode import encode
from v4quant.cli.evaluate import evaluate
from v4quant.cli.export_onnx import export_onnx_command
from v4quant.cli.inspect import inspect
from v4quant.cli.plan import plan
from v4quant.cli.push import push
from v4quant.cli.quantize import quantize
from v4quant.cli.run import run
from v4quant.cli.verify import verify
from v4quant_kernels.errors import V4QuantError


class _Terminated(BaseException):
    """SIGTERM arrived."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `v4quant run demo`; every command's --help has an example.",
)
@click.version_option(__version__, prog_name="v4quant")
def cli() -> None:
    """Convert DeepSeek-V4 checkpoints to what your GPUs serve, with proof of what it cost."""


for _command in (
    inspect,
    plan,
    calibrate,
    allocate,
    quantize,
    verify,
    diff,
    evaluate,
    run,
    push,
    encode,
    bench,
    export_onnx_command,
):
    cli.add_command(_command)


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


for _command in cli.commands.values():
    _read_environment(_command, f"v4quant_{_command.name}")


def main() -> NoReturn:
    """Entry point of the `v4quant` command."""
    signal.signal(signal.SIGTERM, _on_terminate)
    # numpy is optional to torch and absent CUDA is normal here: neither concerns the user.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    try:
        code = cli.main(standalone_mode=False)
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
    _leave(f"Error: {text}", _exit.FAILED)


def _leave(text: str, code: int) -> NoReturn:
    _output.note(text)
    sys.exit(code)


def _on_terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated
