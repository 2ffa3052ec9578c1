"""Other tools' integer packs by the independent decoder: bits taken one by one, from the formulas.

compressed-tensors packs codes along a row and zero points along a column; GPTQ packs codes along a
column, zero points (less one) along a row; AWQ packs both along a row, eight nibbles of a word in
the order 0 2 4 6 1 3 5 7; int8 is not packed. A value is (code - zero) * scale of its column's
group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from v4quant_formats.errors import WrongDtype
from v4quant_formats.integer_packs import IntegerPack

Array = npt.NDArray[np.float64]
Raw = npt.NDArray[np.uint8]


def decode_pack(pack: IntegerPack, raw: Mapping[str, Raw], floats: Callable[[str], Array]) -> Array:
    """The whole matrix [N, K]. raw: every part's bytes, a row of the part a row; floats(part):
    a part's numbers [rows, columns].
    """
    rows, columns = pack.shape
    if pack.tool == "compressed-tensors":
        codes = _fields(raw["weight_packed"], pack.bits)[:, :columns]
        scale = floats("weight_scale")
        zeros = np.full(scale.shape, 2.0 ** (pack.bits - 1))
        if "weight_zero_point" in raw:
            words = raw["weight_zero_point"].view("<u4")
            zeros = _fields(np.ascontiguousarray(words.T).view(np.uint8), pack.bits)[:, :rows].T
        index = floats("weight_g_idx") if "weight_g_idx" in raw else None
        if index is not None and not (index + 1).any():
            index = None  # -1 for every column: no order
    elif pack.tool == "int8":
        codes, scale = raw["weight"].view(np.int8).astype(np.float64), floats("weight_scale")
        zero = raw.get("weight_zero_point")
        zeros = np.zeros(scale.shape) if zero is None else zero.view(np.int8).astype(np.float64)
        index = None
    elif pack.tool == "gptq":
        words = np.ascontiguousarray(raw["qweight"].view("<u4").T)
        codes = _fields(words.view(np.uint8), pack.bits)[:, :columns]
        scale = floats("scales").T
        zeros = _fields(raw["qzeros"], pack.bits)[:, :rows].T
        # Symmetric packs of version 2 that do not say so store the middle itself.
        if pack.plus_one and (pack.declared or (zeros != 2 ** (pack.bits - 1)).any()):
            zeros = zeros + 1
        index = floats("g_idx") if "g_idx" in raw else None
    else:
        codes, scale = _awq(raw["qweight"]).T, floats("scales").T
        zeros, index = _awq(raw["qzeros"]).T, None
    groups = np.arange(columns) // pack.group
    if index is not None:
        groups = index.reshape(-1).astype(np.int64)
        if groups.min() < 0 or groups.max() >= scale.shape[1]:
            raise WrongDtype(f"its group index runs {groups.min()}..{groups.max()}")
    values: Array = (codes - zeros[:, groups]) * scale[:, groups]
    return values


def _fields(raw: Raw, bits: int) -> Array:
    """Every field of so many bits, least significant first, as far as whole ones go."""
    stream = np.unpackbits(raw, axis=1, bitorder="little")
    whole = stream.shape[1] // bits
    fields = stream[:, : whole * bits].reshape(raw.shape[0], whole, bits)
    decoded: Array = (fields * (1 << np.arange(bits))).sum(-1).astype(np.float64)
    return decoded


def _awq(raw: Raw) -> Array:
    words = raw.view("<u4")
    out = np.empty((words.shape[0], words.shape[1], 8))
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        out[:, :, column] = (words >> (4 * nibble)) & 15
    decoded: Array = out.reshape(words.shape[0], -1)
    return decoded
