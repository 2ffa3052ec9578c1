"""Work shared among threads: rows of one loop, or several matrices.

Compiled loops release the interpreter lock, so plain threads run them side by side. As many are
used as torch uses for its products (`OMP_NUM_THREADS`, `torch.set_num_threads`): a process that was
told to leave the other cores alone does. No result depends on how the work is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")

_LEAST = 256
"""Rows that are worth a thread."""


def over_rows(rows: int, loop: Callable[[int, int], object]) -> None:
    """Call loop(first, last) for pieces that together are rows 0 to `rows` - 1.

    Rows must not touch each other. The loop must not share its rows again.
    """
    threads = min(torch.get_num_threads(), rows // _LEAST)
    if threads < 2:
        loop(0, rows)
        return
    cuts = [rows * i // threads for i in range(threads + 1)]
    first, *rest = pairwise(cuts)
    pool = _pool("rows", threads - 1)
    others = [pool.submit(loop, *piece) for piece in rest]
    loop(*first)
    for other in others:
        other.result()


def side_by_side(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """What each job returns. Jobs may share rows but not start jobs."""
    threads = torch.get_num_threads()
    if threads < 2 or len(jobs) < 2:
        return [job() for job in jobs]
    return list(_pool("jobs", threads).map(lambda job: job(), jobs))


@cache
def _pool(kind: str, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, f"v4quant-{kind}")
