"""What kernel benchmarks share: a device, its measured floors, and how a call is timed.

A time means little without the machine's own limits, so every run first measures them: a large
device copy (bytes read plus written) and square matrix products in BF16 and, where there are FP8
tensor cores, E4M3. On a GPU a call is timed as replays of a CUDA graph that holds one call per
input set, so launches cost what they cost in an engine; sets are rotated so that one call does not
find the last one's experts in the L2 cache. On a CPU the same calls are timed one by one, which
measures the torch twins.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from v4quant_kernels.errors import V4QuantError

_REPEATS = 10


@dataclass(frozen=True)
class Machine:
    """The device and its measured limits; a rate that cannot be measured here is 0."""

    device: str
    name: str
    driver: str
    torch: str
    triton: str
    copy_bytes_per_second: float
    bf16_flops: float
    fp8_flops: float


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and spread (largest minus smallest) of the repeats.

    graph: whether launches were replayed from a CUDA graph; else their cost is in the figure.
    """

    seconds: float
    spread: float
    graph: bool = False


def choose_device(device: str | None) -> str:
    """The device to measure on. Raises V4QuantError when no GPU is here and none was declined."""
    if device is not None:
        if device == "cuda" and not torch.cuda.is_available():
            raise V4QuantError("--device cuda: torch sees no CUDA GPU on this machine")
        return device
    if torch.cuda.is_available():
        return "cuda"
    raise V4QuantError(
        "no CUDA GPU here, and kernels are timed on one; run the same command on a GPU machine, "
        "or pass --device cpu to time the torch fallback"
    )


def time_calls(calls: Sequence[Callable[[], object]], device: str) -> Timing:
    """Time of one call when all of `calls` are made in turn, again and again."""
    if device == "cuda":
        return _time_graph(calls)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) / len(calls))
    return Timing(statistics.median(times), max(times) - min(times))


def time_foreign(calls: Sequence[Callable[[], object]], device: str) -> Timing:
    """`time_calls` for calls that may not be capturable: then launched one by one."""
    if device != "cuda":
        return time_calls(calls, device)
    try:
        return _time_graph(calls)
    except Exception:  # noqa: BLE001  # what a capture forbids, packages report as they like
        torch.cuda.synchronize()

    def once() -> None:
        for call in calls:
            call()

    return _time_events(once, len(calls), graph=False)


def _time_graph(calls: Sequence[Callable[[], object]]) -> Timing:
    for call in calls:
        call()  # compiles, and allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _time_events(graph.replay, len(calls), graph=True)


def _time_events(run: Callable[[], object], calls: int, graph: bool) -> Timing:
    times = []
    for _ in range(_REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    times = times[2:]
    return Timing(statistics.median(times), max(times) - min(times), graph)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def measure_machine(device: str) -> Machine:
    """The limits of `device`, measured now."""
    cuda = device == "cuda"
    size = 2**30 if cuda else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device)
    return Machine(
        device,
        device_name(device),
        _driver() if cuda else platform.release(),
        torch.__version__,
        _triton_version(),
        2 * size / copy.seconds,
        _matrix_rate(device, 8192 if cuda else 256),
        _fp8_rate(8192) if cuda else 0.0,
    )


def _driver() -> str:
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    return f"driver {_driver_version()}, CUDA {torch.version.cuda}, sm_{arch}"


def _driver_version() -> str:
    """What nvidia-smi says, which need not be there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "none"
    return str(triton.__version__)


def _matrix_rate(device: str, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / time_calls([lambda: a @ b], device).seconds


def _fp8_rate(size: int) -> float:
    """0 where there are no FP8 tensor cores, or torch has no product for them."""
    if torch.cuda.get_device_capability() < (8, 9):
        return 0.0
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def product() -> object:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        return 2 * size**3 / time_calls([product], "cuda").seconds
    except RuntimeError:
        return 0.0
