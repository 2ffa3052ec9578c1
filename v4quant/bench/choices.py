"""What benches can be asked to measure: plain data, quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WIDTHS = ("flash", "pro")
"""Layer widths of `bench convert`."""

REFINED, PROPAGATED = "gptq + refinement", "gptq + refinement + propagation"
BENCHED = ("rtn", "optimal", "gptq", REFINED, PROPAGATED)
"""Solvers of `bench solver`."""


@dataclass(frozen=True)
class Width:
    """Sizes of a release: hidden, intermediate, experts per layer, layers with experts."""

    hidden: int
    intermediate: int
    experts: int
    layers: int


SOLVER_WIDTHS = {
    "tiny": Width(256, 256, 16, 7),
    "flash": Width(4096, 2048, 256, 44),
    "pro": Width(7168, 3072, 384, 62),
}

INDEX_CASES = {"one": (1, 1), "requests": (128, 1), "prefill": (1, 4096)}
"""(requests, tokens of each)."""

CONTEXTS = (131072, 1048576)
"""Contexts of `bench indexer`, in tokens."""

TOKENS = (1, 8, 32, 128, 4096, 16384)
"""Batches of `bench moe`, in tokens."""

Compare = Literal["also", "only", "none"]
"""Whether other people's kernels are measured."""


@dataclass(frozen=True)
class MoeShape:
    """Sizes of a release's routed experts."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int


SHAPES = {
    "flash": MoeShape("flash", 4096, 2048, 256, 6),
    "pro": MoeShape("pro", 7168, 3072, 384, 6),
    "tiny": MoeShape("tiny", 256, 128, 8, 2),
}
