"""The bar of a conversion foretells its end, also where bytes take very different times."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert, recipe_of
from v4quant.builtin import TINY_V4, resolve_source
from v4quant.conversion.pace import Pace
from v4quant.conversion.plan import make_plan
from v4quant_formats.opening import open_checkpoint


class Steps:
    """When the bar moved, in seconds of this process, and how far."""

    def __init__(self) -> None:
        self.total, self.moves = 0, list[tuple[float, int]]()

    def start(self, label: str, total: int, unit: str) -> None:
        self.total, self.began = total, time.process_time()

    def advance(self, amount: int) -> None:
        self.moves.append((time.process_time() - self.began, amount))

    def finish(self) -> None: ...


@pytest.mark.parametrize("case", ["mxfp4", "int4-g128", "q4_k", "iq3_s"])
def test_all_moves_add_up(case: str) -> None:
    with open_checkpoint(TINY) as checkpoint:
        plan = make_plan(checkpoint, recipe_of(case))
        pace = Pace((plan, unit) for unit in plan.units)
        moves = [pace.done(plan, unit) for unit in plan.units]
        assert min(moves) >= 0 and sum(moves) == pace.total == plan.bytes_in


def test_what_is_only_copied_hardly_moves_the_bar_of_a_search() -> None:
    """Embedding and head, with which GGUF begins, are a tenth of the built-in model's bytes; its
    experts in a codebook took 24 s after 0.03 s for these."""
    with open_checkpoint(resolve_source(TINY_V4)) as checkpoint:
        plan = make_plan(checkpoint, recipe_of("iq3_s"))
        pace, first = Pace((plan, unit) for unit in plan.units), 0
        for unit in plan.units:
            if unit.module.startswith("layers."):
                break
            first += unit.bytes_in
            assert pace.done(plan, unit) < 0.001 * pace.total
        assert first > 0.09 * pace.total


def test_from_a_tenth_on_the_end_is_known_to_a_factor_of_two(tmp_path: Path) -> None:
    """With what is compiled at first use done; in processor time, whatever else goes on. This
    process may collect garbage of other tests meanwhile: one try of three is undisturbed."""
    convert(TINY, tmp_path / "first", "q4_k", workers=1)
    worst = [_worst_forecast(tmp_path / f"out{i}") for i in range(3)]
    assert min(worst) < 2, worst


def _worst_forecast(out: Path) -> float:
    """The largest factor between time left as foretold and as it was."""
    steps = Steps()
    convert(resolve_source(TINY_V4), out, "q4_k", workers=1, progress=steps)
    done, end, worst = 0, steps.moves[-1][0], 1.0
    assert sum(amount for _, amount in steps.moves) == steps.total
    for at, amount in steps.moves:
        done += amount
        if 0.1 * steps.total <= done < 0.9 * steps.total:
            ratio = at * (steps.total - done) / done / (end - at)
            worst = max(worst, ratio, 1 / ratio)
    return worst
