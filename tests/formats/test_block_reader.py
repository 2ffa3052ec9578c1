"""Reads past the page cache: the bytes of any place, in whatever memory."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from v4quant_formats import block_reader
from v4quant_formats.block_reader import PAGE, address, memory_for, read_past_cache
from v4quant_formats.shard_files import read_whole
from v4quant_formats.system import open_uncached


@pytest.fixture
def handles(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    content = os.urandom(1_234_567)
    (tmp_path / "f").write_bytes(content)
    handle = os.open(tmp_path / "f", os.O_RDWR)
    os.fsync(handle)
    direct = open_uncached(handle)
    os.close(handle)
    if direct is None:
        pytest.skip("this file system reads through the page cache only")
    yield direct, content
    os.close(direct)


def test_every_place_and_length(
    handles: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, content = handles
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    monkeypatch.setattr(block_reader, "_LARGE", 3 * PAGE)
    edges = [0, 8, PAGE - 8, PAGE, len(content) - 7, len(content) - 7 - len(content) % PAGE]
    in_place = 0
    for _ in range(300):
        offset = rng.choice([*edges, rng.randrange(len(content)), 8 * rng.randrange(100_000)])
        count = rng.choice([1, PAGE, 3 * PAGE, rng.randrange(1, 200_000)])
        count = min(count, len(content) - offset)
        data = memory_for(count, offset)
        view = memoryview(data.numpy())
        in_place += count >= 3 * PAGE and (address(view) - offset) % PAGE == 0
        read_whole(direct, view, offset, "f", "t", read_past_cache)
        assert bytes(view) == content[offset : offset + count], (offset, count)
    assert in_place > 20


def test_the_end_of_a_file_ends_a_reading(handles: tuple[int, bytes]) -> None:
    direct, content = handles
    for start in (len(content) - 100_000, len(content) - 2**20, len(content)):
        data = memory_for(2**20 + 99_999, start)
        left = len(content) - start
        assert read_past_cache(direct, memoryview(data.numpy()), start) == left
        assert bytes(data.numpy()[:left]) == content[start:]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64])
def test_memory_is_fit_for_every_dtype(dtype: torch.dtype) -> None:
    for offset in range(0, 2 * PAGE, 40):
        data = memory_for(2**20, offset)
        found = data.view(dtype)
        assert found.data_ptr() % found.element_size() == 0
        assert offset % 8 or (data.data_ptr() - offset) % PAGE == 0
