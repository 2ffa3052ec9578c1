"""Tile sizes chosen by measurement: `bench moe --tune FILE`.

For each scheme, kind of activations and size of batch (few, some, many slots an expert) the tiles
of both GEMMs are improved one property at a time: other values of it are tried in the running
mixture, the fastest stays, until a round changes nothing. That takes some dozen compilations a
tile instead of some hundred. A tile that does not compile or run, or whose result strays from the
static tile's, is passed over.

The file is what V4QUANT_TILES names (docs/kernels.md): it says for which device and Triton version
it holds. Tiles found before for the same two are kept, unless found anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from v4quant.kernel_bench.cases import SHAPES, Inputs, random_inputs, random_weights
from v4quant.kernel_bench.device import choose_device, device_name, time_calls
from v4quant.kernel_bench.moe import call_moe
from v4quant_kernels import dispatch
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.experts import Activations
from v4quant_kernels.gpu import tiles
from v4quant_kernels.gpu.tiles import Tile
from v4quant_kernels.progress import Progress
from v4quant_kernels.runtime import RuntimeExperts, RuntimeMatrix
from v4quant_kernels.scheme import get_scheme

TOKENS = {16: 32, 64: 2048, 128: 8192}
"""For each size of tile a batch that takes it, in Flash and in Pro."""

_GAIN = 0.99  # less than a hundredth is noise
_ROUNDS = 3
_STRAY = 2.0**-6  # of the largest output: sums in another order, h rounded to bfloat16


@dataclass(frozen=True)
class Finding:
    """A tile that was looked for: seconds of the whole mixture before and after."""

    key: str
    tile: Tile
    seconds_before: float
    seconds_after: float


@dataclass(frozen=True)
class Tuned:
    """All findings, and the device and Triton version they hold for."""

    device: str
    triton: str
    findings: tuple[Finding, ...]


VALUES: dict[str, tuple[int | bool, ...]] = {
    "swap": (False, True),
    "warps": (4, 8),
    "columns": (64, 128, 256),
    "depth": (64, 128),
    "rows": (16, 32, 64, 128),
    "stages": (2, 3, 4, 5),
    "unroll": (1, 2),
}
"""What is tried of each property, the most telling first."""


def variants(tile: Tile, name: str, size: int, matrix: RuntimeMatrix) -> list[Tile]:
    """The tiles that differ from `tile` in one property and suit the size and the weights."""
    if name == "depth" and (matrix.operand != "bf16" or matrix.scale_code == "bf16"):
        return []  # it follows from the format
    values = [v for v in VALUES[name] if v != getattr(tile, name)]
    if name == "rows":
        values = [v for v in values if size // 2 <= v <= size and (v > 16) == (size > 16)]
    return [replace(tile, **{name: v}) for v in values]  # type: ignore[arg-type]


def improve(
    start: Tile, size: int, matrix: RuntimeMatrix, seconds: Callable[[Tile], float]
) -> tuple[Tile, float, float]:
    """(best tile found, its seconds, seconds of `start`); `seconds` is infinite for failures."""
    known = {start: seconds(start)}
    best = start
    for _ in range(_ROUNDS):
        before = best
        for name in VALUES:
            others = variants(best, name, size, matrix)
            for tile in others:
                if tile not in known:
                    known[tile] = seconds(tile)
            fastest = min(others, key=lambda t: known[t], default=best)
            if known[fastest] < _GAIN * known[best]:
                best = fastest
        if best == before:
            break
    return best, known[best], known[start]


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
            seconds = partial(_seconds, calls, expected, key)
            start = tiles.static_tile(arch, matrix, size, fused)
            best, after, before = improve(start, size, matrix, seconds)
            chosen.enter_context(tiles.trying(key, best))
            progress.advance(1)
            yield Finding(key, best, before, after)


def _seconds(
    calls: Sequence[Callable[[], Tensor]], expected: Tensor, key: str, tile: Tile
) -> float:
    """Seconds of a mixture with `tile`; infinite if it fails or strays."""
    with tiles.trying(key, tile):
        try:
            error = (calls[0]() - expected).abs().max() / expected.abs().max()
            if not float(error) <= _STRAY:
                return math.inf
            return time_calls(calls, "cuda").seconds
        except (RuntimeError, ValueError, TypeError, AssertionError):  # what compilers raise
            return math.inf
        except Exception as error:
            # Triton's own: resources, compilation. Anything else is a mistake of this program.
            if not type(error).__module__.startswith("triton"):
                raise
            return math.inf


def write_tiles(tuned: Tuned, path: Path) -> None:
    """Write, or add to, the file that V4QUANT_TILES names."""
    content = {"device": tuned.device, "triton": tuned.triton, "tiles": {}}
    if path.exists():
        stored = json.loads(path.read_text())
        if (stored.get("device"), stored.get("triton")) == (tuned.device, tuned.triton):
            content["tiles"] = stored["tiles"]
    content["tiles"] |= {f.key: asdict(f.tile) for f in tuned.findings}  # type: ignore[operator]
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
