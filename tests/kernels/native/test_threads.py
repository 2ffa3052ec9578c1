"""Threads: every row and job once, whatever the number of threads; errors reach the caller."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from v4quant_kernels.native.threads import over_rows, side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 255, 512, 1000])
def test_every_row_once(threads: int, rows: int) -> None:
    seen = torch.zeros(rows, dtype=torch.int64)
    pieces = []

    def loop(first: int, last: int) -> None:
        seen[first:last] += 1
        pieces.append(last - first)

    over_rows(rows, loop)
    assert bool((seen == 1).all())
    assert len(pieces) == max(1, min(threads, rows // 256))


@pytest.mark.usefixtures("threads")
def test_jobs_in_their_order() -> None:
    assert side_by_side([lambda i=i: i * i for i in range(20)]) == [i * i for i in range(20)]


@pytest.mark.usefixtures("threads")
def test_errors_are_raised() -> None:
    def failing(first: int, last: int) -> None:
        if last == 1000:
            raise ValueError("the last piece")

    with pytest.raises(ValueError, match="the last piece"):
        over_rows(1000, failing)
    with pytest.raises(ValueError, match="the last piece"):
        side_by_side([lambda: None, lambda: failing(0, 1000)])
