"""Fresh randomness for every run, repeatable from the seed a failing test shows."""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    sys.stdout.write(f"torch seed: {generator.seed()}\n")
    return generator
