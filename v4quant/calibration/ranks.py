"""Which processes solve together: those that torchrun started, and the device of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from v4quant_calibration.solve.team import Team

_BOTH = "cpu:gloo,cuda:nccl"
# The slowest rank may work for hours after the fastest is done.
_PATIENCE = timedelta(days=7)


@contextmanager
def solving_team(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """The team this process belongs to, and its device: with several ranks on GPUs, one each."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(0, 1), device
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group(_BOTH if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Team(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()
