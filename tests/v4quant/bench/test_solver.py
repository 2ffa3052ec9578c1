"""The solvers' bench: figures of a small expert, and how they add up."""

from __future__ import annotations

import pytest
import torch

from tests.support.pretend_device import PretendDevice
from v4quant.bench import solver as bench_solver
from v4quant.bench.choices import BENCHED, PROPAGATED
from v4quant.bench.choices import SOLVER_WIDTHS as WIDTHS
from v4quant.bench.solver import bench_solvers, time_solver
from v4quant.devices import DeviceError
from v4quant_kernels import dispatch
from v4quant_kernels.progress import SilentProgress


def test_every_solver_is_timed() -> None:
    for solver in BENCHED:
        found = time_solver("tiny", "int3-g128", solver, 64, "cpu")
        assert found.solver == solver and found.seconds > 0
        expert = found.seconds + found.moments_seconds
        assert found.layer_hours == pytest.approx(expert * WIDTHS["tiny"].experts / 3600)
        assert found.model_hours == pytest.approx(found.layer_hours * WIDTHS["tiny"].layers)


def test_block_types_are_timed() -> None:
    for solver in BENCHED:
        assert time_solver("tiny", "q3_k", solver, 64, "cpu").seconds > 0


def test_a_gpu_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"cpu": None, "cuda": 24 * 2**30}
    monkeypatch.setattr(bench_solver, "device_bytes", lambda device: sizes[device.type])
    assert bench_solver._batch(WIDTHS["flash"], torch.device("cpu")) == 1
    assert 10 < bench_solver._batch(WIDTHS["flash"], torch.device("cuda")) < 24
    assert bench_solver._batch(WIDTHS["tiny"], torch.device("cuda")) == 16


def test_a_process_of_its_own() -> None:
    (found,) = bench_solvers("tiny", "int4-g128", ["rtn"], 16, "cpu", SilentProgress())
    assert found.peak_bytes > 50e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="no CUDA device here"):
        bench_solvers("tiny", "int4-g32", ["gptq"], 8, "cuda", SilentProgress())


def test_all_of_it_is_solved_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one that is only pretended; what it multiplies is there."""
    monkeypatch.setattr(bench_solver, "_batch", lambda size, device: 2)
    monkeypatch.setattr(bench_solver, "DEFAULT_SWEEPS", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: False)
    with PretendDevice() as pretended:
        timing = time_solver("tiny", "int4-g32", PROPAGATED, 64, "cuda")
    assert pretended.products[0] > 10 and pretended.products[1] == 0
    assert timing.batch == 2 and timing.peak_bytes == 1
