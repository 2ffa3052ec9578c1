"""Where vLLM keeps V4.1's tables: every row once, pinned tensors rounded up to powers of two."""

from __future__ import annotations

import pytest

from v4quant.synthetic.configs import make_config
from v4quant_formats.engines.vllm_engram import table_places
from v4quant_formats.model_config import ModelConfig, parse_model_config

ROWS = (384_006_168, 384_016_682)


def config(release: str = "v41") -> ModelConfig:
    return parse_model_config(make_config(release, False, {}))


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_pinned_tables_take_powers_of_two(gpus: int) -> None:
    """Two tensors of each table on each card: 2^37 bytes of codes and 2^32 of scales in all."""
    pinned, pages, cards = table_places(config(), gpus)
    assert pinned.host == 2 * (2**37 + 2**32) == 283_467_841_536
    assert pages.host == sum(ROWS) * (256 + 8)
    assert "use_thp" in pages.option and "cpu_offload" in cards.option
    assert (pinned.card, pages.card, cards.host) == (0, 0, 0)
    assert pages.host <= gpus * cards.card < 1.0001 * pages.host


def test_heads_that_do_not_divide_leave_cards_unequal() -> None:
    pages, cards = table_places(config(), 5)[1:]
    assert pages.host == sum(ROWS) * 264
    # Five cards have 5, 5, 5, 5 and 4 of 24 heads.
    assert cards.card == pytest.approx(5 / 24 * pages.host, rel=1e-4)


def test_releases_without_tables_need_no_place() -> None:
    (place,) = table_places(config("flash"), 8)
    assert (place.host, place.card, place.option) == (0, 0, "")
