"""Where the kernels run: Triton's expert kernel, and the device that suits its interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels.interpreted_memory import strict_memory


@pytest.fixture
def gpu() -> Any:
    """The module of the expert kernel; tests of other kernels have their own."""
    pytest.importorskip("triton")
    from v4quant_kernels.gpu import moe

    return moe


@pytest.fixture
def device(gpu: Any) -> str:
    """The interpreter works on the CPU's memory, compiled kernels on the GPU's."""
    from v4quant_kernels.gpu.interpreter import interpreting

    return "cpu" if interpreting() else "cuda"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interpreted kernels are held to the tensors of their launch."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    with strict_memory(monkeypatch):
        yield
