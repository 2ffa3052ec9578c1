"""Fresh randomness for every run, repeatable from the seed a failing test shows."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    print(f"torch seed: {generator.seed()}")
    return generator
