"""What SGLang keeps on a GPU: pools counted slot by slot, and its own rule for the rest.

`scripts/check_sglang_memory.py` compares the pools with SGLang's own code.
"""

from __future__ import annotations

import pytest

from v4quant.synthetic.configs import make_config
from v4quant_formats.engines.sglang_memory import (
    Serving,
    default_chunk,
    pool_bytes,
    static_share,
    widened_bytes,
)
from v4quant_formats.model_config import ModelConfig, parse_model_config


def config(release: str) -> ModelConfig:
    return parse_model_config(make_config(release, False, {}))


def test_pools_of_flash_slot_by_slot() -> None:
    """21 layers of CSA, 20 of HCA, 2 with windows alone; entries of 584 bytes, keys of 132."""
    serving = Serving(1, 65536, 4096, 3)
    tokens = 3 * 65536 + 256
    pages = tokens // 256
    entries = pages * (21 * (65 * 576 + 64 * 132) + 20 * 3 * 576)  # 64 and 2 entries a page
    slots = 3 * (128 + 128 + 256 + 256) + 2 * 4096 + 256 + 4 * 3 * (128 + 256)
    slots += -slots % 256
    windows = slots // 256 * 43 * (260 * 576)
    open_sums = slots // 256 * 21 * 8 * 4 * (512 + 128) * 4
    rings = (3 + 3) * 128 * 2 * 512 * 4 * 20
    counted = pool_bytes(config("flash"), serving)
    assert counted == pytest.approx(entries + windows + open_sums + rings, rel=2e-3)


def test_context_costs_what_its_entries_cost() -> None:
    """V4.1's four owners keep a key of 68 bytes with an entry, three for every other token."""
    found = config("v41")
    short, long = (pool_bytes(found, Serving(8, c, 8192)) for c in (32768, 32768 + 2560))
    assert (long - short) / 2560 == pytest.approx(1 * (584 + 68) + 3 * (584 + 68) / 2, rel=0.01)


def test_what_sglang_leaves_by_itself() -> None:
    """Ten GiB on cards above 60, else by chunk, cards and graphs; never more than is there."""
    gib = 2**30
    assert static_share(96 * gib, Serving(2, 32768, 2048)) == 0.895
    small = static_share(32 * gib, Serving(8, 32768, 4096, 8))
    assert small == pytest.approx(1 - (512 + 1536 + 6144 + 1024 + 16) / 32768, abs=1e-3)
    assert static_share(gib, Serving(8, 32768, 16384)) == 0
    assert [default_chunk(n * gib) for n in (16, 32, 80, 180)] == [2048, 4096, 8192, 16384]


def test_projections_that_no_tile_of_128_serves_are_widened() -> None:
    assert widened_bytes(config("flash"), 8) == 0
    assert widened_bytes(config("v41"), 8) == 40 * 8192 * 4096 // 8
