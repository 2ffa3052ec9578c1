"""Whether a command ended because it was called wrongly."""

from __future__ import annotations

from click.testing import Result

from v4quant_kernels.errors import OptionError


def usage_error(result: Result) -> bool:
    """Click's own complaint, or the library's of options that contradict each other: exit code 2,
    which `main` makes of an OptionError."""
    return result.exit_code == 2 or isinstance(result.exception, OptionError)
