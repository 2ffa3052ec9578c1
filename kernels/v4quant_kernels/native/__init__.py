"""Compiled loops for the CPU: what torch does in dozens of passes over small arrays, done in one.

Number formats mean what the torch functions under `ref/` say; a loop here is a faster way to the
same bits, and a test holds the two together. Loops are compiled by Numba on their first call and
kept on disk. They release the interpreter lock, so a job's worker threads run side by side, and
never use fast-math: neither the order of sums nor a rounding may depend on the processor, because
the same recipe gives the same bytes everywhere.

Import these modules only where a loop is about to run (compilers take time to load), and only where
`available()`: on a machine without Numba, and on CUDA, the torch twin does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@cache
def available() -> bool:
    """Whether compiled loops can be used."""
    return find_spec("numba") is not None


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a loop over numpy arrays: no interpreter lock, no bounds checks, IEEE arithmetic."""
    return _compile(function)


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """As `compiled`, for parts of loops: copied into what calls them.

    A call hands over some ten numbers for each array, on the stack: for a part that runs for a
    tenth of a microsecond that is most of its time.
    """
    return _compile(function, forceinline=True)


def _compile(function: Callable[P, R], **more: bool) -> Callable[P, R]:
    from numba import njit

    options = {"nogil": True, "error_model": "numpy", **more}
    try:
        loop: Callable[P, R] = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to keep the compiled code in
        loop = njit(**options)(function)
    return loop
