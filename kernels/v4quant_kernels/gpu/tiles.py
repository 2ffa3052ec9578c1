"""Tile sizes: a static table by architecture and operand, and an optional tuned one.

A tile is how many slots, rows and columns a program takes at a time; what is best depends on how
many slots an expert gets. The static table holds the choices that compile everywhere without
spilling and with the fewest instructions per weight (`kernels/bench/instructions.json`), three
sizes of batch for each operand.

The environment variable V4QUANT_TILES may name a JSON file with tiles measured to be better
(docs/kernels.md shows one; `--tune` of `v4quant bench moe` and `bench indexer` writes one). It is
read when a kernel is first launched, and ignored with a warning when it was made for another device
or Triton version.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from v4quant_kernels.runtime import RuntimeMatrix
from v4quant_kernels.words import STEP

TILES_VARIABLE = "V4QUANT_TILES"
_MAX_BYTES = 2**24
SIZES = (16, 64, 128)
"""Slots of a tile; the smallest that holds an expert's average number of slots is taken."""


@dataclass(frozen=True)
class Tile:
    """Slots (`rows`) and weight rows (`columns`) of one program.

    `swap` puts weights on the left of the product, `unroll` repeats a step in the loop's body.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3
    swap: bool = False
    unroll: int = 1


def kind_of(matrix: RuntimeMatrix) -> str:
    """What the tables distinguish: layout tag without version, and group size."""
    return f"{matrix.code}/{matrix.scale_code}/{matrix.scheme.group_size}"


def choose_tile(
    arch: int, matrix: RuntimeMatrix, slots_per_expert: float, fused: bool = False
) -> Tile:
    """The tile for this matrix when an expert gets so many slots on average.

    fused: the tile ends in SwiGLU (if it is larger than the smallest), not in sums.
    """
    size = next((s for s in SIZES if slots_per_expert <= s), SIZES[-1])
    key = tile_key(matrix, size, fused)
    return _TRIALS.get(key) or _tuned(key) or static_tile(arch, matrix, size, fused)


def tile_key(matrix: RuntimeMatrix, size: int, fused: bool) -> str:
    """What a tuned table calls this case."""
    return f"{kind_of(matrix)} {size} {'swiglu' if fused else 'sums'}"


_TRIALS: dict[str, Any] = {}


@contextmanager
def trying(key: str, tile: Tile | IndexTile) -> Iterator[None]:
    """While this lasts, `tile` is chosen for `key`: how tuning measures a tile."""
    before = _TRIALS.get(key)
    _TRIALS[key] = tile
    try:
        yield
    finally:
        del _TRIALS[key]
        if before is not None:
            _TRIALS[key] = before


def choose_split(tiles: int, matrix: RuntimeMatrix, tile: Tile) -> int:
    """How many programs share a tile along K: enough to fill a GPU when there are few tiles."""
    programs = tiles * -(-matrix.rows // tile.columns)
    steps = max(1, matrix.shape[1] // STEP)
    wanted = 4 if programs <= 256 else 2 if programs <= 512 else 1
    while wanted > 1 and (steps < 4 * wanted or matrix.shape[1] % (STEP * wanted)):
        wanted //= 2
    return wanted


def family(arch: int) -> int:
    """The architecture whose tiles serve this one: 100 for sm_103, 120 for sm_121."""
    if arch >= 100:
        return 120 if arch >= 120 else 100
    return 80 if arch == 87 else arch


def static_tile(arch: int, matrix: RuntimeMatrix, size: int, fused: bool = False) -> Tile:
    """The built-in choice for a tile of `size` slots."""
    arch = family(arch)
    if matrix.operand in {"native", "native8"}:
        return _native(arch, size, fused)
    if matrix.operand == "fp8":
        return _fp8(arch, size, matrix.scale_code == "e8m0")
    if size == 128 and arch == 100 and not _sums_stay():
        size = 64
    if matrix.scale_code == "bf16":
        return _group_sums(arch, size, matrix.scheme.group_size)
    return _folded(arch, size, matrix.code)


def _sums_stay() -> bool:
    """Whether this Triton adds the products of a step in one place of sm_100's tensor memory.

    That of 3.6 gives each of the four a place of its own, and four of 128 slots do not fit.
    """
    major, minor = triton_version().split(".")[:2]
    return (int(major), int(minor)) >= (3, 9)


_LITTLE_SHARED = {86, 89, 120}
"""Architectures with 99 KiB of shared memory a program."""

_WARPS_MULTIPLY = {80, 86, 89, 120}
"""Architectures whose matrix instructions are a warp's, with all operands in registers."""


def _folded(arch: int, size: int, code: str) -> Tile:
    """Scales inside bfloat16 weights, or none at all."""
    small = arch in _WARPS_MULTIPLY
    stages = 2 if arch in _LITTLE_SHARED else 3
    if size == 16:
        return Tile(16, 128, 4, stages if code == "w16" else stages + 1, swap=small)
    if size == 64 or (small and code != "t16"):
        return Tile(64, 128, 4, stages, swap=arch >= 90 or code == "e16")
    return Tile(128, 128, 8 if small else 4, stages, swap=True)


def _group_sums(arch: int, size: int, group: int) -> Tile:
    """Integers, scales on the sums of groups: a second accumulator, so smaller tiles."""
    small = arch in _WARPS_MULTIPLY
    if size == 16:
        return Tile(16, 128, 4, 3, swap=small)
    stages = 2 if arch in _LITTLE_SHARED else 3
    if size == 128 and group == 128 and not small:
        return Tile(128, 128, 8, stages, swap=True)
    return Tile(64, 128, 4 if group == 128 or arch == 100 else 8, stages, swap=not small)


def _fp8(arch: int, size: int, sums: bool) -> Tile:
    """FP8 tensor cores; a step is one block of 128 activations."""
    stages = 2 if arch in _LITTLE_SHARED else 3
    if size == 16:
        return Tile(16, 128, 4, stages + 1, swap=True)
    if size == 64 or sums or arch == 89:
        return Tile(64, 128, 8, stages)
    return Tile(128, 128, 8, stages)


def _native(arch: int, size: int, fused: bool) -> Tile:
    """Block-scaled tensor cores."""
    if arch == 120:
        return Tile(size, 128, 8 if size > 16 else 4, 2)
    return Tile(size, 128, 4 if fused or size < 128 else 8, 3, swap=size < 128)


@dataclass(frozen=True)
class IndexTile:
    """Of the indexer: keys of a tile, tokens of a program, tokens of one product, launch options.

    `tokens` is how many walk past a tile of shared keys; for a token's own keys, `tiles` is how
    many tiles of them walk past it.
    """

    keys: int = 128
    tokens: int = 16
    step: int = 1
    tiles: int = 4
    warps: int = 4
    stages: int = 3


_INDEX = "index "


def index_key(operand: str, shared: bool) -> str:
    """What a tuned table calls the indexer's case: keys that tokens share, or their own."""
    return f"{_INDEX}{operand} {'shared' if shared else 'own'}"


def choose_index_tile(arch: int, operand: str, shared: bool) -> IndexTile:
    """The tile for scores on this architecture."""
    key = index_key(operand, shared)
    found: IndexTile = _TRIALS.get(key) or _tuned(key) or index_tile(arch, shared)
    return found


def index_tile(arch: int, shared: bool) -> IndexTile:
    """The static choice: fewest instructions per score that compile without spilling."""
    arch = family(arch)
    if shared:
        return IndexTile(step=2 if arch in {90, 120} else 1)
    return IndexTile(keys=64 if arch in {89, 90} else 128, stages=2)


@cache
def _tuned_table(path: str) -> dict[str, Any]:
    try:
        stored = json.loads(_head(Path(path)))
        table = {
            k: (IndexTile if k.startswith(_INDEX) else Tile)(**v)
            for k, v in stored["tiles"].items()
        }
        made_for = stored["device"], stored["triton"]
        if any(type(n) not in (int, bool) for tile in table.values() for n in astuple(tile)):
            raise ValueError("a tile is made of integers")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{TILES_VARIABLE}: cannot read '{path}' ({error}); ignored", stacklevel=2)
        return {}
    here = (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"), triton_version()
    if made_for != here:
        warnings.warn(f"'{path}' was tuned for {made_for}, this is {here}; ignored", stacklevel=2)
        return {}
    return table


def _head(path: Path) -> bytes:
    if not path.is_file():  # a device has no end, and a pipe may have no beginning
        raise OSError("is not a regular file")
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def forget_tuned() -> None:
    """Read the file of tuned tiles anew when a kernel is launched next."""
    _tuned_table.cache_clear()


def triton_version() -> str:
    """Triton's version as tuned tables record it."""
    return str(triton.__version__)


def _tuned(key: str) -> Any:
    path = os.environ.get(TILES_VARIABLE)
    return _tuned_table(path).get(key) if path else None
