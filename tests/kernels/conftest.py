"""Where the kernels run: Triton's expert kernel, and the device that suits its interpreter."""

from __future__ import annotations

from typing import Any

import pytest


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
