"""How an engine expects one matrix to be stored, and what it says when it is stored otherwise.

A `Storage` is what a config declares for a module. `parts` turns it into the tensors the engine
will look for; `mismatches` compares those with the tensors that are there. Both are pure functions
of headers, and a checkpoint has few different ones, so callers cache them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Storage:
    """One stored form.

    kind: plain; fp8, mxfp4, nvfp4 (the release's own names and ModelOpt's); ct-fp8-block,
    ct-fp8-channel, ct-fp8-tensor, ct-mxfp4, ct-mxfp8, ct-nvfp4, intB (compressed-tensors).
    group: columns sharing a scale (0: a whole row). tile: of block FP8. scales: dtypes FP8 scales
    may have. zero_point, input_scale: whether the form has these parts.
    """

    kind: str
    group: int = 0
    tile: tuple[int, int] = (128, 128)
    scales: tuple[str, ...] = ("F8_E8M0", "F32")
    zero_point: bool = False
    input_scale: bool = False

    @property
    def bits(self) -> int:
        """Bits of a packed integer."""
        return int(self.kind.removeprefix("int"))

    @property
    def granularity(self) -> int:
        """Input channels that a GPU's share must hold whole multiples of."""
        if self.kind in ("fp8", "ct-fp8-block"):
            return self.tile[1]
        if self.kind.startswith("int"):
            return math.lcm(self.group or 1, 32 // math.gcd(32, self.bits))
        return {"mxfp4": 32, "ct-mxfp4": 32, "ct-mxfp8": 32, "nvfp4": 16, "ct-nvfp4": 16}.get(
            self.kind, 1
        )

    def __str__(self) -> str:
        group = f" in groups of {self.group}" if self.kind.startswith("int") and self.group else ""
        return NAMES.get(self.kind, self.kind.replace("int", "INT")) + group


PLAIN = Storage("plain")
NAMES = {
    "plain": "BF16",
    "fp8": "block FP8 (native names)",
    "mxfp4": "MXFP4 (native names)",
    "nvfp4": "NVFP4 (ModelOpt names)",
    "ct-fp8-block": "block FP8 (compressed-tensors)",
    "ct-fp8-channel": "channel FP8 (compressed-tensors)",
    "ct-fp8-tensor": "tensor FP8 (compressed-tensors)",
    "ct-mxfp4": "MXFP4 (compressed-tensors)",
    "ct-mxfp8": "MXFP8 (compressed-tensors)",
    "ct-nvfp4": "NVFP4 (compressed-tensors)",
}

# Part -> (allowed dtypes, allowed shapes).
Parts = dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]
Found = Mapping[str, tuple[str, tuple[int, ...]]]

_ONE: tuple[tuple[int, ...], ...] = ((), (1,))


def parts(storage: Storage, shape: tuple[int, ...]) -> Parts:
    """Tensors the engine looks for in a module of logical `shape`."""
    if storage.kind == "plain" or len(shape) != 2:
        return {"weight": (FLOATS, (shape,))}
    rows, columns = shape
    high, wide = storage.tile
    tiles = ((-(-rows // high), -(-columns // wide)),)
    half = ((rows, columns // 2),)
    if storage.kind == "fp8":
        return {"weight": (("F8_E4M3",), (shape,)), "scale": (storage.scales, tiles)}
    if storage.kind == "mxfp4":
        scale = (("F8_E8M0", "U8"), ((rows, columns // 32),))
        return {"weight": (("I8", "U8"), half), "scale": scale}
    if storage.kind == "nvfp4":
        return {
            "weight": (("U8", "I8"), half),
            "weight_scale": (("F8_E4M3",), ((rows, columns // 16),)),
            "weight_scale_2": (("F32",), _ONE),
            "input_scale": (("F32",), _ONE),
        }
    if storage.kind in ("ct-fp8-block", "ct-fp8-channel", "ct-fp8-tensor"):
        by_kind = {"ct-fp8-block": tiles, "ct-fp8-channel": ((rows, 1), (rows,))}
        shapes = by_kind.get(storage.kind, _ONE)
        dtypes = ("F32", "BF16", "F8_E8M0") if storage.kind == "ct-fp8-block" else ("F32", "BF16")
        return {"weight": (("F8_E4M3",), (shape,)), "weight_scale": (dtypes, shapes)}
    return _packed(storage, rows, columns)


def _packed(storage: Storage, rows: int, columns: int) -> Parts:
    half = ((rows, columns // 2),)
    if storage.kind == "ct-mxfp4":
        scale = (("U8", "F8_E8M0"), ((rows, columns // 32),))
        return {"weight_packed": (("U8",), half), "weight_scale": scale}
    if storage.kind == "ct-mxfp8":
        scale = (("U8", "F8_E8M0"), ((rows, columns // 32),))
        return {"weight": (("F8_E4M3",), ((rows, columns),)), "weight_scale": scale}
    if storage.kind == "ct-nvfp4":
        found: Parts = {
            "weight_packed": (("U8",), half),
            "weight_scale": (("F8_E4M3",), ((rows, columns // 16),)),
            "weight_global_scale": (("F32",), _ONE),
        }
        return found | ({"input_global_scale": (("F32",), _ONE)} if storage.input_scale else {})
    words, groups = -(-columns * storage.bits // 32), columns // (storage.group or columns)
    found = {
        "weight_packed": (("I32",), ((rows, words),)),
        "weight_scale": (FLOATS, ((rows, groups),)),
        "weight_shape": (("I64", "I32"), ((2,),)),
    }
    if storage.zero_point:
        packed_rows = -(-rows * storage.bits // 32)
        found["weight_zero_point"] = (("I32",), ((packed_rows, groups),))
    return found


def mismatches(
    storage: Storage, shape: tuple[int, ...], found: Found
) -> list[tuple[str, str, str]]:
    """(rule, part, problem) of every part that is missing, left over, or of another form."""
    wanted = parts(storage, shape)
    problems = []
    for part, (dtypes, shapes) in wanted.items():
        if part not in found:
            has = ", ".join(found) or "nothing"
            text = f"declared {storage}, so the engine looks for '{part}'; the file has {has}"
            problems.append(("missing-part", part, text))
            continue
        dtype, size = found[part]
        if dtype not in dtypes:
            text = f"declared {storage}: '{part}' must be {' or '.join(dtypes)}, it is {dtype}"
            problems.append(("dtype", part, text))
        elif size not in shapes:
            text = f"declared {storage}: '{part}' must be {list(shapes[0])}, it is {list(size)}"
            problems.append(("shape", part, text))
    for part in found.keys() - wanted.keys() - {"input_scale"}:
        text = f"declared {storage}, which has no '{part}'; the engine has no place for it"
        problems.append(("extra-part", part, text))
    return problems
