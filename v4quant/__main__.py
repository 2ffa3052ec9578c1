"""Where `v4quant` and `python -m v4quant` begin.

Until the command line is loaded, Ctrl-C ends this process as it ends any program, without Python's
page of frames.
"""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """The command line; see `v4quant.cli.main`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from v4quant.cli import main as command_line  # what takes time comes after the above

    command_line()


if __name__ == "__main__":
    main()
