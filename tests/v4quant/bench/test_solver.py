"""The solvers' bench: figures of a small expert, and how they add up."""

from __future__ import annotations

import pytest
import torch

from v4quant.bench import solver as bench_solver
from v4quant.bench.choices import BENCHED
from v4quant.bench.choices import SOLVER_WIDTHS as WIDTHS
from v4quant.bench.solver import bench_solvers, time_solver
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
