"""Foretold hours of evaluations, held against measured commands (docs/costs.md)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy
import pytest

import v4quant
from tests.support.conversion import TINY
from v4quant.builtin import TINY_V4, resolve_source
from v4quant.evaluation.cost import evaluation_hours
from v4quant.planner.footprint import outline_checkpoint
from v4quant.source import open_source
from v4quant.synthetic.writing import Request, write_checkpoint

WIDER = (("hidden_size", 1024), ("moe_intermediate_size", 512), ("num_hidden_layers", 4),
         ("n_routed_experts", 16))  # fmt: skip
BESIDE = {"candidates": 1, "floors": 1, "weights": True}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    wider = tmp_path_factory.mktemp("wider") / "model"
    write_checkpoint(wider, Request("flash", True, WIDER, headers_only=True))
    found = {}
    for name, folder in (("tiny", resolve_source(TINY_V4)), ("wider", wider)):
        with open_source(folder, headers_only=True) as checkpoint:
            found[name] = outline_checkpoint(checkpoint).dimensions
    return found


@pytest.mark.parametrize(
    ("model", "tokens", "more", "measured"),
    [
        ("tiny", 2048, {}, 5.0),
        ("tiny", 8192, {}, 8.6),
        ("tiny", 2048, BESIDE, 12.4),
        ("wider", 20000, {}, 30.1),
        ("wider", 20000, BESIDE, 115.4),
    ],
)
def test_hours_are_right_to_a_factor_of_two(
    configs: dict[str, Any], model: str, tokens: int, more: dict[str, Any], measured: float
) -> None:
    """`measured`: core-seconds of the commands."""
    told = 3600 * evaluation_hours(configs[model], tokens, **more)
    assert measured / 2 < told < 2 * measured
    half = 3600 * evaluation_hours(configs[model], tokens, **more, left=0.5, cores=2)
    assert told / 4 <= half < told / 2


def test_it_is_said_before_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "v4quant")
    numpy.save(tmp_path / "text.npy", numpy.arange(64) % 200)
    v4quant.evaluate(TINY, corpus=tmp_path / "text.npy", seq_len=32, threads=1)
    assert "seconds expected, on one core" in caplog.text
