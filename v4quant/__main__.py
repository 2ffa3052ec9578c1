"""Where `v4quant` and `python -m v4quant` begin.

Until the command line is loaded, Ctrl-C ends this process as it ends any program, without Python's
page of frames.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """The command line; see `v4quant.cli.main`."""
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from v4quant.cli import main as command_line  # what takes time comes after the above

    command_line()


def _open_closed_streams() -> None:
    """Where a stream is closed (`2>&-`), the next file that is opened gets its number, and what a
    library prints goes into that file: a shard, say."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


if __name__ == "__main__":
    main()
