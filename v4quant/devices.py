"""Where arithmetic is done: the CPU, or a GPU, which recodes and searches to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from v4quant_kernels.errors import OptionError, V4QuantError

CPU = torch.device("cpu")
_SHARE = 0.8


class DeviceError(V4QuantError):
    """A device that does not exist here."""


def find_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`. Raises DeviceError saying what there is."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device '{name[:40]}' is none of cpu, cuda, cuda:0, cuda:1, ...")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} CUDA device{'s' * (count > 1)}" if count else "no CUDA device"
        raise DeviceError(f"--device {name}: there is {found} here; use cpu")
    return device


@contextmanager
def arithmetic_threads(count: int | None) -> Iterator[None]:
    """While this lasts, products and loops on the CPU use `count` threads; None: as many as before.

    Raises OptionError for fewer than one.
    """
    if count is None:
        yield
        return
    if count < 1:
        raise OptionError(f"--threads {count}: give one or more")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that a run may plan with, None for the CPU.

    A share of all of it, not of what is free now, so that the same command plans the same run.
    """
    if device.type == "cpu":
        return None
    return int(_SHARE * torch.cuda.mem_get_info(device)[1])
