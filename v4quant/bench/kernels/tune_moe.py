"""`bench moe --tune FILE`: for each scheme, kind of activations and size of batch (few, some, many
slots an expert) the tiles of both GEMMs are searched (`tune.py`), in the running mixture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from v4quant.bench.choices import SHAPES
from v4quant.bench.kernels.cases import Inputs, random_inputs, random_weights
from v4quant.bench.kernels.device import choose_device, device_name
from v4quant.bench.kernels.moe import call_moe
from v4quant.bench.kernels.tune import Finding, Tuned, improve, seconds_with
from v4quant_kernels import dispatch
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.experts import Activations
from v4quant_kernels.gpu import tiles
from v4quant_kernels.gpu.tiles import Tile
from v4quant_kernels.progress import Progress
from v4quant_kernels.runtime import RuntimeExperts
from v4quant_kernels.scheme import get_scheme

TOKENS = {16: 32, 64: 2048, 128: 8192}
"""For each size of tile a batch that takes it, in Flash and in Pro."""

_STRAY = 2.0**-6  # of the largest output: sums in another order, h rounded to bfloat16


VALUES: dict[str, tuple[int | bool, ...]] = {
    "swap": (False, True),
    "warps": (4, 8),
    "columns": (64, 128, 256),
    "rows": (16, 32, 64, 128),
    "stages": (2, 3, 4, 5),
    "unroll": (1, 2),
}
"""What is tried of each property, the most telling first."""


def variants(tile: Tile, name: str, size: int) -> list[Tile]:
    """The tiles that differ from `tile` in one property and suit the size."""
    values = [v for v in VALUES[name] if v != getattr(tile, name)]
    if name == "rows":
        values = [v for v in values if size // 2 <= v <= size and (v > 16) == (size > 16)]
    return [replace(tile, **{name: v}) for v in values]  # type: ignore[arg-type]


def tune_moe(
    shapes: Sequence[str],
    schemes: Sequence[str],
    modes: Sequence[Activations],
    progress: Progress,
    device: str | None = None,
) -> Tuned:
    """Find tiles on this GPU. Raises V4QuantError where there is none."""
    if choose_device(device) != "cuda":
        raise V4QuantError("bench moe --tune measures kernels, which need a CUDA GPU")
    findings: list[Finding] = []
    progress.start("Tiles", len(shapes) * len(schemes) * len(modes) * len(TOKENS) * 2, "tile")
    for scheme in schemes:
        for shape in shapes:
            weights = random_weights(SHAPES[shape], get_scheme(scheme), "cuda")
            for mode in modes:
                prepared = dispatch.prepare(weights, mode)
                for size, tokens in TOKENS.items():
                    sets = [random_inputs(SHAPES[shape], tokens, s, "cuda") for s in range(2)]
                    findings += _tune_size(prepared, mode, size, sets, progress)
    progress.finish()
    return Tuned(device_name("cuda"), tiles.triton_version(), tuple(findings))


def _tune_size(
    prepared: RuntimeExperts,
    mode: Activations,
    size: int,
    sets: list[Inputs],
    progress: Progress,
) -> Iterator[Finding]:
    """Tiles of the gate/up GEMM, then of the down GEMM with the first one's in place."""
    arch = dispatch.architecture(prepared.down.words)
    calls = [partial(call_moe, s, prepared, mode) for s in sets]
    expected = calls[0]()
    with ExitStack() as chosen:
        for matrix, fused in ((prepared.gate_up, True), (prepared.down, False)):
            key = tiles.tile_key(matrix, size, fused)
            seconds = partial(seconds_with, key=key, calls=calls, expected=expected, stray=_STRAY)
            start = tiles.static_tile(arch, matrix, size, fused)
            suited = partial(variants, size=size)
            best, after, before = improve(start, VALUES, suited, seconds)
            chosen.enter_context(tiles.trying(key, best))
            progress.advance(1)
            yield Finding(key, best, before, after)
