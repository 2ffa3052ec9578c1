"""bench solver: what each solver costs for one expert of full width, and so for a model.

An expert's three matrices are random MXFP4, its inputs random rows with a decaying spectrum, so the
work is the real one; only the codes mean nothing. Every solver runs in a process of its own for its
own peak memory. A layer and a model cost as many times one expert as they have experts: solving is
done in batches whose size memory decides. On a CPU a batch takes the time of its members one by
one, so one is measured; on a GPU many take little longer than one, so as many are as fit, alike
but solved one and all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import torch

from v4quant.bench.choices import PROPAGATED, SOLVER_WIDTHS, Width
from v4quant.bench.convert import BenchError
from v4quant.devices import device_bytes, find_device
from v4quant_calibration.rounding.descent import DEFAULT_SWEEPS
from v4quant_calibration.rounding.second_moments import correction, damped, gram_sum
from v4quant_calibration.rounding.solvers import SOLVERS, solve_batch
from v4quant_calibration.solve.layer_solver import experts_at_once
from v4quant_formats.system import peak_rss_bytes
from v4quant_kernels import codec
from v4quant_kernels.progress import Progress
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import MXFP4, get_scheme

T = TypeVar("T")


@dataclass(frozen=True)
class SolverTiming:
    """One solver's figures. moments_seconds: forming the moments of `rows` input rows, once.

    Seconds are an expert's; processor time on a CPU, so other work on the machine does not count.
    batch: experts solved together.
    """

    solver: str
    device: str
    batch: int
    seconds: float
    moments_seconds: float
    peak_bytes: int
    layer_hours: float
    model_hours: float


def bench_solvers(
    width: str, scheme: str, solvers: Sequence[str], rows: int, device: str, progress: Progress
) -> list[SolverTiming]:
    """Time solvers on one expert, each in a new process.

    Raises BenchError when one dies, DeviceError for a device that is not there.
    """
    find_device(device)
    found = []
    progress.start("Bench", len(solvers), "solver")
    for solver in solvers:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                # Compile the loops first: that is paid once a machine, not once an expert.
                process.submit(time_solver, "tiny", scheme, solver, 64, device).result()
                job = process.submit(time_solver, width, scheme, solver, rows, device)
                found.append(job.result())
            except BrokenProcessPool:
                raise BenchError(f"solver {solver} died; is there memory enough?") from None
        progress.advance(1)
    progress.finish()
    return found


def time_solver(width: str, scheme: str, solver: str, rows: int, device: str) -> SolverTiming:
    """Time one solver on one expert, in this process."""
    size, chosen = SOLVER_WIDTHS[width], get_scheme(scheme)
    batch = _batch(size, torch.device(device)) if solver not in SOLVERS else 1
    timed = _timed_on_gpu if device == "cuda" else _timed
    generator = torch.Generator().manual_seed(0)

    def matrix(height: int, columns: int) -> QTensor:
        values = torch.randn(height, columns, generator=generator)
        return codec.quantize(values, MXFP4)

    gate_up = [matrix(size.intermediate, size.hidden) for _ in range(2)]
    down = [matrix(size.hidden, size.intermediate)]
    seconds = moments = 0.0
    for pair in (gate_up, down):
        columns = pair[0].shape[1]
        x = torch.randn(rows, columns, generator=generator)
        x *= torch.linspace(2, 0.1, columns)
        x = x.to(device)
        if solver in SOLVERS:
            importance = x.square().mean(0).cpu()
            plain = SOLVERS[solver]
            spent, _ = timed(lambda: [plain(q, chosen, importance) for q in pair])  # noqa: B023
            seconds += spent
            continue
        spent, gram = timed(lambda: damped(gram_sum(x, x) / rows))  # noqa: B023
        moments += spent
        fix = None
        if solver == PROPAGATED:
            lost = x * 0.1 + torch.randn(rows, columns, generator=generator).to(device) * 0.01
            spent, fix = timed(lambda: correction(lost, x, gram).unsqueeze(0))  # noqa: B023
            seconds += spent
            fix = fix.repeat(batch, 1, 1)
        sweeps = 0 if solver == "gptq" else DEFAULT_SWEEPS
        grams = gram.float().repeat(batch, 1, 1)
        work = partial(solve_batch, [pair] * batch, grams, fix, chosen, sweeps)
        spent, _ = timed(work)
        seconds += spent / batch
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes()
    layer = (seconds + moments) * size.experts / 3600
    return SolverTiming(solver, device, batch, seconds, moments, peak, layer, layer * size.layers)


def _batch(size: Width, device: torch.device) -> int:
    """Experts solved together."""
    memory = device_bytes(device)
    if memory is None:
        return 1
    return min(size.experts, experts_at_once(memory, size.hidden, size.intermediate))


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Processor seconds and result of some work."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _timed_on_gpu(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds and result of some work on the current GPU."""
    torch.cuda.synchronize()
    started = time.monotonic()
    result = work()
    torch.cuda.synchronize()
    return time.monotonic() - started, result
