"""Foretold hours against processor time that was measured: within a factor of two."""

from __future__ import annotations

from pathlib import Path

import pytest

from v4quant.api.arguments import source_of
from v4quant.builtin import TINY_V4, resolve_source
from v4quant.planner.effort import Level, cost_at, cost_of, hours_text, hours_with_text, level_of
from v4quant.planner.footprint import Outline, footprint, outline_checkpoint, outline_release
from v4quant.recipe import Recipe
from v4quant.source import open_source
from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_kernels.scheme import get_scheme

PLAIN, WEIGHED = level_of(False, False, False), level_of(False, False, True)
REFINED = level_of(True, False, True)
WIDER = (("hidden_size", 1024), ("moe_intermediate_size", 512), ("num_hidden_layers", 4),
         ("n_routed_experts", 16))  # fmt: skip


def outline_at(folder: Path) -> Outline:
    with open_source(source_of(folder), headers_only=True) as checkpoint:
        return outline_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def outlines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outline]:
    wider = tmp_path_factory.mktemp("wider") / "model"
    write_checkpoint(wider, Request("flash", True, WIDER, headers_only=True))
    return {"tiny": outline_at(resolve_source(TINY_V4)), "wider": outline_at(wider)}


@pytest.mark.parametrize(
    ("model", "scheme", "level", "tokens", "measured"),
    [
        ("tiny", "int4-g64", PLAIN, 0, 3.9),
        ("tiny", "q3_k", PLAIN, 0, 4.7),
        ("tiny", "iq2_xxs", WEIGHED, 8192, 27.3),
        ("tiny", "int4-g64", REFINED, 8192, 26.1),
        ("wider", "int4-g64", PLAIN, 0, 5.3),
        ("wider", "int4-g64", REFINED, 8192, 177),
    ],
)
def test_hours_are_right_to_a_factor_of_two(
    outlines: dict[str, Outline],
    model: str,
    scheme: str,
    level: Level,
    tokens: int,
    measured: float,
) -> None:
    """`measured`: core-seconds of the commands, from docs/costs.md."""
    outline, kind = outlines[model], get_scheme(scheme)
    gguf = {"format": "gguf", "dense": "q8_0", "draft": "drop"} if kind.block_bytes else {}
    nbytes = footprint(outline, Recipe(scheme, **gguf)).total  # type: ignore[arg-type]
    cost = cost_at(outline, kind, nbytes, level, 1, exact=False)
    hours = hours_with_text(outline, cost, tokens) if tokens else cost.hours
    assert measured / 2 < 3600 * hours < 2 * measured


def test_a_flash_expert_costs_what_the_bench_says() -> None:
    outline = outline_release("flash")
    experts = 256 * (43 + 1)
    for scheme, seconds in (("int4-g128", 36), ("q3_k", 54), ("iq2_xs", 91)):
        kind = get_scheme(scheme)
        cost = cost_at(outline, kind, 10**11, REFINED, 16, exact=False)
        text = 32768 * 2 * 13e9 / 50e9
        told = (3600 * 16 * cost.hours - text) / experts
        assert told == pytest.approx(seconds, rel=0.1), scheme
    best = cost_of(outline, get_scheme("int4-g128"), 10**11, "best", 16, exact=False)
    assert best.level.product_seconds < best.level.expert_seconds


def test_short_times_are_told_in_seconds() -> None:
    assert hours_text(40 / 3600) == "40 seconds" and hours_text(0) == "1 seconds"
    assert hours_text(0.1) == "6 minutes" and hours_text(9) == "9 hours"
