"""Where experts are recoded and searched: the CPU, or a GPU that computes the same bits."""

from __future__ import annotations

import torch

from v4quant_kernels.errors import V4QuantError

CPU = torch.device("cpu")


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
