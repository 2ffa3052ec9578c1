"""The checkpoint and the text that several modules solve on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.opening import open_checkpoint

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    """The oracle's tiny model, opened."""
    with open_checkpoint(DATA / "tiny-a") as opened:
        yield opened


@pytest.fixture(scope="module")
def windows() -> list[Tensor]:
    """The oracle's text in windows of 40 tokens."""
    ids = load_file(DATA / "tiny-a.reference.safetensors")["input_ids"][0]
    return list(ids.split(40))
