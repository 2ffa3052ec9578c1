"""Scales that values alone do not tell: kept in a BF16 output's manifest, used on the way back.

A group whose largest element is 6 times a scale and that needs no step finer than twice it, is as
well 3 times the next scale (grids.py takes that one). The encoder's choice is lost in BF16, so the
record of a matrix lists such groups' scale bytes, `index:byte`, where the rule would choose
otherwise. A list in a stranger's manifest can do no harm: it is used only where every value stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME, ManifestError, read_manifest
from v4quant_kernels import codec
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import MXFP4

MOST = 4096
"""Groups listed of one matrix; more are not an accident, but another encoder's rule."""
Hints = Mapping[int, int]


def ambiguous_groups(q: QTensor) -> dict[int, int]:
    """Groups of an MXFP4 matrix whose scale the rule may not find again: index -> scale byte."""
    assert q.scheme == MXFP4 and q.scale is not None
    magnitude = torch.arange(8)
    flags = (magnitude == 7) * 1 + ((magnitude == 1) | (magnitude == 3)) * 2 + (magnitude >= 5) * 4
    byte = torch.arange(256)
    table = (flags[byte & 7] | flags[(byte >> 4) & 7]).to(torch.uint8)
    pieces = table[q.codes.int()].view(*q.scale.shape, 16)
    held = pieces[..., 0]
    for place in range(1, 16):
        held = held | pieces[..., place]
    unsure = (((held & 1) > 0) & ((held & 2) == 0)) | ((held & 4) == 0)
    return _listed(unsure, q.scale)


def differing(found: QTensor | None, q: QTensor) -> dict[int, int]:
    """Blocks whose scale was found otherwise: index -> scale byte of `q`."""
    assert q.scale is not None
    if found is None or found.scale is None or found.scale.dtype != q.scale.dtype:
        return {}
    other = found.scale.view(torch.uint8) != q.scale.view(torch.uint8)
    return _listed(other, q.scale)


def _listed(chosen: Tensor, scale: Tensor) -> dict[int, int]:
    index = chosen.reshape(-1).nonzero().squeeze(1)
    if len(index) > MOST:
        return {}
    values = scale.view(torch.uint8).reshape(-1)[index]
    return dict(zip(index.tolist(), values.tolist(), strict=True))


def to_text(hints: Hints) -> str:
    """As a record holds them."""
    return " ".join(f"{index}:{byte}" for index, byte in hints.items())


def hints_of(checkpoint: Checkpoint, module: str) -> Hints:
    """What the source's manifest lists for a module; nothing where it has none."""
    return _read(checkpoint.path).get(module, {})


@lru_cache(maxsize=4)
def _read(folder: Path) -> dict[str, Hints]:
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    try:
        records = read_manifest(folder)["tensors"]
    except ManifestError:
        return {}
    found = {}
    for record in records:
        text, module = record.get("scales"), record.get("module")
        if isinstance(text, str) and isinstance(module, str):
            found[module] = _parsed(text)
    return found


def _parsed(text: str) -> Hints:
    hints = {}
    for item in text.split()[:MOST]:
        index, colon, byte = item.partition(":")
        if colon and index.isdecimal() and byte.isdecimal() and int(byte) < 255:
            hints[int(index)] = int(byte)
    return hints


def with_hints(found: QTensor, values: Tensor, hints: Hints, first: int = 0) -> QTensor:
    """The same numbers under the listed scales; `found` where they would not be the same.

    first: index of the first block of `found` in its matrix.
    """
    assert found.scale is not None
    blocks = found.scale.view(torch.uint8).clone().reshape(-1)
    own = {i - first: b for i, b in hints.items() if 0 <= i - first < len(blocks)}
    if not own:
        return found
    for index, byte in own.items():
        blocks[index] = byte
    scale = blocks.view(found.scale.shape).view(found.scale.dtype)
    again = codec.quantize(values, found.scheme, scale=scale)
    got = codec.dequantize(again)
    same = torch.equal(got, values) and torch.equal(torch.signbit(got), torch.signbit(values))
    return again if same else found
