"""Synthetic checkpoints of any release, made by the script of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4quant.synthetic.configs import RELEASES, make_config
from v4quant.synthetic.errors import RequestError
from v4quant.synthetic.inventory import shards_of
from v4quant.synthetic.values import Faults, pieces
from v4quant.synthetic.writing import Request, Written, write_checkpoint

__all__ = [
    "RELEASES",
    "Faults",
    "Request",
    "RequestError",
    "Written",
    "make_config",
    "make_small",
    "pieces",
    "shards_of",
    "write_checkpoint",
]


def make_small(out: Path, release: str, layers: int = 4, experts: int = 2, **more: Any) -> Path:
    """A checkpoint of a few megabytes, the fewest layers that show every kind by default."""
    sizes = {"num_hidden_layers": layers, "n_routed_experts": experts}
    if release == "v41":
        sizes |= {"dspark_n_routed_experts": experts}
    write_checkpoint(out, Request(release, overrides=tuple(sizes.items()), **more))
    return out
