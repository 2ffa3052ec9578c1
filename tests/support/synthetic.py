"""Synthetic checkpoints of any release, made by the script of that name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))

from synthetic_v4.configs import RELEASES, RequestError, make_config  # noqa: E402
from synthetic_v4.inventory import shards_of  # noqa: E402
from synthetic_v4.values import Faults, pieces  # noqa: E402
from synthetic_v4.writing import Request, Written, write_checkpoint  # noqa: E402

__all__ = [
    "RELEASES",
    "SCRIPTS",
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
