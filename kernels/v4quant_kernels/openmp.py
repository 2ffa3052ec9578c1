"""How threads of a product wait for each other: briefly awake, then asleep.

OpenMP's threads meet at a barrier after every piece of work and, as libraries come, spin there for
milliseconds. That is quick while each has a core of its own. Where a neighbour has the core that
the last thread needs, the others burn the rest of theirs waiting for it: a forward pass beside four
busy processes took 10 to 73 seconds instead of 8. A short spin costs little on a quiet machine and
bounds the waste on a busy one (`v4quant bench threads` measures both).

OpenMP reads these settings once, when torch is loaded, so `set_defaults` runs when the first of our
packages is imported. That is early enough for every command, its worker processes and ranks of
`torchrun`; a program that imports torch itself does so after `import v4quant`, or sets the
variables. What the user has set stays, be it the same setting by another name.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

DEFAULTS = {
    "GOMP_SPINCOUNT": ("1000", ("OMP_WAIT_POLICY",)),
    "KMP_BLOCKTIME": ("1", ("OMP_WAIT_POLICY", "KMP_LIBRARY")),
}
"""Each variable's value, and the variables that decide the same: turns of libgomp's loop (torch on
Linux), milliseconds of libomp's and Intel's (torch on macOS and Windows)."""


def set_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what the environment leaves open about waiting; for this process and its children."""
    given = set(environment)
    for name, (value, same) in DEFAULTS.items():
        if given.isdisjoint((name, *same)):
            environment[name] = value
