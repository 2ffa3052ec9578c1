"""Which processes solve together: those that torchrun started, and the device of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from v4quant.conversion.ranks import current_ranks
from v4quant_calibration.solve.team import Team

_BOTH = "cpu:gloo,cuda:nccl"


@contextmanager
def solving_team(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """The team this process belongs to, and its device: with several ranks on GPUs, one each."""
    on_gpu = device.type == "cuda"
    if on_gpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    with current_ranks(_BOTH if on_gpu else "gloo") as ranks:
        yield Team(ranks.rank, ranks.size), device
