"""Sizes as people write them, and workers that fit a cap."""

from __future__ import annotations

import re

import pytest

from tests.support.conversion import SCHEMES, TINY, recipe_of
from v4quant.conversion.plan import make_plan
from v4quant.conversion.workers import fit_workers, worker_bytes
from v4quant.sizes import SizeError, parse_size
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.system import peak_rss_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12345678", 12345678), ("123B", 123), ("1K", 1000), ("1KB", 1000), ("1KiB", 1024),
        ("6GB", 6 * 10**9), ("6gb", 6 * 10**9), ("6GiB", 6 * 2**30), ("1.5G", 1_500_000_000),
        ("1500 MB", 1_500_000_000), (" 2T ", 2 * 10**12), ("0.5TiB", 2**39), ("0", 0),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1GB",
        "1e9",
        "six",
        "6 G B",
        "6PB",
        "6GBs",
        "1.2.3",
        "nan",
        "9" * 400 + "GB",
        "9" * 5000,
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(SizeError, match="write it like 6GB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8", " 8", "1.5", "999999"])
def test_a_forgotten_unit_is_told(text: str) -> None:
    with pytest.raises(SizeError, match=f"has no unit; write it like {text.strip()}GB"):
        parse_size(text)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_workers_fit_the_cap(scheme: str) -> None:
    with open_checkpoint(TINY) as checkpoint:
        plan = make_plan(checkpoint, recipe_of(scheme))
    assert fit_workers(plan, 7, None) == 7
    assert fit_workers(plan, 3, 10**15) == 3
    with pytest.raises(SizeError, match="too little") as caught:
        fit_workers(plan, 4, 10**6)
    needed = re.search(r"needs ([\d.]+) GB", str(caught.value))
    assert needed is not None
    least = int((float(needed[1]) + 0.01) * 1e9)
    assert fit_workers(plan, 4, least) == 1, "the size named in the message is enough"
    assert fit_workers(plan, 4, least + worker_bytes(plan)) == 2


def test_peak_only_rises() -> None:
    before = peak_rss_bytes()
    assert 2**22 < before < 2**40
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() >= before
