"""Tile sizes chosen by measurement: the search, and the file it writes.

A tile is improved one property at a time: other values of it are tried in the running kernel, the
fastest stays, until a round changes nothing. That takes some dozen compilations a tile instead of
some hundred. A tile that does not compile or run, or whose result strays from the static tile's, is
passed over.

The file is what V4QUANT_TILES names (docs/kernels.md): it says for which device and Triton version
it holds. Tiles found before for the same two are kept, unless found anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from v4quant.bench.kernels.device import time_calls
from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.small_files import read_small
from v4quant_kernels.gpu import tiles
from v4quant_kernels.gpu.tiles import IndexTile, Tile

T = TypeVar("T", Tile, IndexTile)

_GAIN = 0.99  # less than a hundredth is noise
_MAX_BYTES = 2**24
_ROUNDS = 3


@dataclass(frozen=True)
class Finding:
    """A tile that was looked for: seconds of the whole call before and after."""

    key: str
    tile: Tile | IndexTile
    seconds_before: float
    seconds_after: float


@dataclass(frozen=True)
class Tuned:
    """All findings, and the device and Triton version they hold for."""

    device: str
    triton: str
    findings: tuple[Finding, ...]


def improve(
    start: T,
    names: Iterable[str],
    variants: Callable[[T, str], Sequence[T]],
    seconds: Callable[[T], float],
) -> tuple[T, float, float]:
    """(best tile found, its seconds, seconds of `start`); `seconds` is infinite for failures.

    variants: the tiles worth trying that differ in the property called `name`.
    """
    known = {start: seconds(start)}
    best, order = start, list(names)
    for _ in range(_ROUNDS):
        before = best
        for name in order:
            others = variants(best, name)
            for tile in others:
                if tile not in known:
                    known[tile] = seconds(tile)
            fastest = min(others, key=lambda t: known[t], default=best)
            if known[fastest] < _GAIN * known[best]:
                best = fastest
        if best == before:
            break
    return best, known[best], known[start]


def _strays(found: Tensor, expected: Tensor, stray: float) -> bool:
    """Whether some number is too far away, or hidden (-inf) in one of both only."""
    hidden = expected == -math.inf
    error = (found - expected).masked_fill(hidden, 0.0).abs().max()
    largest = expected.masked_fill(hidden, 0.0).abs().max()
    same = bool((hidden == (found == -math.inf)).all())
    return not (same and float(error) <= stray * float(largest))


def seconds_with(
    tile: Tile | IndexTile,
    key: str,
    calls: Sequence[Callable[[], Tensor]],
    expected: Tensor,
    stray: float,
) -> float:
    """Seconds of a call with `tile`; infinite if it fails, or strays by so much of the largest."""
    with tiles.trying(key, tile):
        try:
            if _strays(calls[0](), expected, stray):
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
    """Write, or add to, the file that V4QUANT_TILES names. Raises OutputError."""
    made_for = {"device": tuned.device, "triton": tuned.triton}
    stored, known = stored_tiles(path), dict[str, Any]()
    if {key: stored.get(key) for key in made_for} == made_for:
        known = stored["tiles"]
    content = made_for | {"tiles": known | {f.key: asdict(f.tile) for f in tuned.findings}}
    write_file_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def stored_tiles(path: Path) -> dict[str, Any]:
    """What `write_tiles` left there; nothing without a file. Raises OutputError for another one, to
    be called before anything is measured."""
    if not path.exists() and not path.is_symlink():
        return {}
    with suppress(FormatError, ValueError, RecursionError):
        stored = json.loads(read_small(path, _MAX_BYTES))
        right = isinstance(stored, dict) and stored.keys() == {"device", "triton", "tiles"}
        if right and isinstance(stored["tiles"], dict):
            return dict(stored)
    raise OutputError(f"{path}: exists, and is no table of tiles; give --tune another name")
