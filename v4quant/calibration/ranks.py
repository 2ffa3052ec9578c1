"""Which processes solve together: those that torchrun started, and the device of each.

A rank that dies closes its connections, and the others notice at once. A network that dies says
nothing, and a layer may take hours, so waiting alone tells nothing either: every rank gives a sign
of life each second (conversion/board.py), and one that hears none for its patience ends, whatever
its main thread waits for in the library underneath. The same command then goes on.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from v4quant.conversion.board import Board, RankLost
from v4quant.conversion.ranks import current_ranks
from v4quant_calibration.solve.team import Team

_BOTH = "cpu:gloo,cuda:nccl"
# The slowest rank may work for hours after the fastest is done; who is gone is told by the board.
_PATIENCE = timedelta(days=7)
_GLANCE = 1.0
_GRACE = 2.0  # seconds for the main thread to end by itself: it may have met the same loss
_FAILED = 1


@contextmanager
def solving_team(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """The team this process belongs to, and its device: with several ranks on GPUs, one each.

    Ends the process when another rank is lost. Raises RankLost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(0, 1), device
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    with current_ranks() as ranks:
        assert ranks.board is not None, "several ranks have one"
        with _watched(ranks.board):
            dist.init_process_group(_BOTH if on_gpu else "gloo", timeout=_PATIENCE)
            try:
                yield Team(dist.get_rank(), size), device
                ranks.barrier()  # the first rank may hold what the others talk through
            finally:
                dist.destroy_process_group()


@contextmanager
def _watched(board: Board) -> Iterator[None]:
    """End this process soon after another one is lost."""
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, over), name="team", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()


def _watch(board: Board, over: threading.Event) -> None:
    while not over.wait(_GLANCE):
        try:
            board.check()
        except RankLost as error:
            if not over.wait(_GRACE):
                if sys.__stderr__ is not None:
                    os.write(sys.__stderr__.fileno(), f"Error: {error}\n".encode())
                os._exit(_FAILED)
