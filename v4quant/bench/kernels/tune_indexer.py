"""`bench indexer --tune FILE`: the tiles of both score kernels are searched (`tune.py`).

The kernel that shares its keys among tokens is timed on a prefill, the one for keys of a token's
own on a batch of decoding requests, both at 128k tokens of context.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from v4quant.bench.kernels.cases import index_case
from v4quant.bench.kernels.device import choose_device, device_name
from v4quant.bench.kernels.indexer import copies_of, fitting, scores
from v4quant.bench.kernels.tune import Finding, Tuned, improve, seconds_with
from v4quant_kernels import dispatch
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.gpu import tiles
from v4quant_kernels.gpu.indexer import index_operand
from v4quant_kernels.gpu.tiles import IndexTile
from v4quant_kernels.progress import Progress

CONTEXT = 131072
CASES = {True: "prefill", False: "requests"}
"""What is timed where keys are shared, and where they are not."""

_STRAY = 2.0**-9  # of the largest score: FP8 tensor cores sum in 13 bits
VALUES: dict[str, tuple[int, ...]] = {
    "keys": (32, 64, 128, 256),
    "step": (1, 2, 4),
    "warps": (4, 8),
    "tokens": (8, 16, 32, 64),
    "tiles": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4),
}
"""What is tried of each property, the most telling first."""


def variants(tile: IndexTile, name: str, shared: bool) -> list[IndexTile]:
    """The tiles that differ in one property and suit the kernel.

    Tokens of a ragged batch share no product, so `step` belongs to shared keys, as `tokens` does.
    """
    if name in ({"tiles"} if shared else {"tokens", "step"}):
        return []
    found = [replace(tile, **{name: v}) for v in VALUES[name] if v != getattr(tile, name)]
    return [t for t in found if t.tokens % t.step == 0]


def tune_indexer(progress: Progress, device: str | None = None) -> Tuned:
    """Find tiles on this GPU. Raises V4QuantError where there is none."""
    if choose_device(device) != "cuda":
        raise V4QuantError("bench indexer --tune measures kernels, which need a CUDA GPU")
    progress.start("Tiles", len(CASES), "tile")
    findings = [tune_case(shared, CONTEXT, "cuda", progress) for shared in CASES]
    progress.finish()
    return Tuned(device_name("cuda"), tiles.triton_version(), tuple(findings))


def tune_case(shared: bool, context: int, device: str, progress: Progress) -> Finding:
    """The best tile of one kernel."""
    case = index_case(CASES[shared], context, device)
    calls = [partial(scores, fitting(c)) for c in copies_of(case, device)]
    arch = dispatch.architecture(case.q_codes)
    key = tiles.index_key(index_operand(arch), shared)
    seconds = partial(seconds_with, key=key, calls=calls, expected=calls[0](), stray=_STRAY)
    start = tiles.index_tile(arch, shared)
    best, after, before = improve(start, VALUES, partial(variants, shared=shared), seconds)
    progress.advance(1)
    return Finding(key, best, before, after)
