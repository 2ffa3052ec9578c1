"""The tiny checkpoint as other tools would store it: dequantized, packed, renamed.

Written with plain torch and numpy, from the tools' own definitions and not from v4quant's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.support.shard_bytes import EditableCheckpoint, StoredTensor

NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32",
    torch.int64: "I64", torch.uint8: "U8",
}  # fmt: skip
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def stored(value: torch.Tensor) -> StoredTensor:
    """A tensor as it lies in a file."""
    raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return StoredTensor(NAMES[value.dtype], tuple(value.shape), raw)


def is_expert(module: str) -> bool:
    """Whether a module is a routed expert's."""
    return ".ffn.experts." in module


def coded_modules(checkpoint: EditableCheckpoint) -> list[str]:
    """Modules with a scale: routed experts in MXFP4, dense matrices in FP8."""
    return [n.removesuffix(".scale") for n in checkpoint.names if n.endswith(".scale")]


def values_of(checkpoint: EditableCheckpoint, module: str) -> torch.Tensor:
    """float32 [N, K] of a coded module of the release."""
    weight, scale = checkpoint[f"{module}.weight"], checkpoint[f"{module}.scale"]
    raw = torch.frombuffer(bytearray(weight.data), dtype=torch.uint8).view(weight.shape)
    powers = torch.frombuffer(bytearray(scale.data), dtype=torch.uint8).view(scale.shape)
    multiplier = torch.exp2(powers.double() - 127).float()
    if weight.dtype == "I8":
        pairs = torch.stack((_E2M1[(raw & 15).long()], _E2M1[(raw >> 4).long()]), -1)
        return pairs.view(raw.shape[0], -1) * multiplier.repeat_interleave(32, 1)
    elements = raw.view(torch.float8_e4m3fn).float()
    rows, columns = weight.shape
    height, width = tile_of(checkpoint, module)
    wide = multiplier.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return elements * wide


def tile_of(checkpoint: EditableCheckpoint, module: str) -> tuple[int, int]:
    """What shares a scale in an FP8 matrix, or in a row of V4.1's Engram tables."""
    if module.endswith(".engram.embed"):
        return 1, 32
    height, width = checkpoint.config["quantization_config"]["weight_block_size"]
    return height, width


def decode(
    checkpoint: EditableCheckpoint,
    chosen: Callable[[str], bool] = lambda module: True,
    dtype: torch.dtype = torch.bfloat16,
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda module, values: values,
) -> None:
    """Store chosen modules unquantized, as merging an adapter leaves them."""
    for module in filter(chosen, coded_modules(checkpoint)):
        values = change(module, values_of(checkpoint, module))
        checkpoint[f"{module}.weight"] = stored(values.to(dtype))
        checkpoint.remove(f"{module}.scale")
    if not any(n.endswith(".scale") for n in checkpoint.names):
        checkpoint.config.pop("quantization_config", None)
        checkpoint.config.pop("expert_dtype", None)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """I32 [n, ceil(m*bits/32)] of unsigned codes [n, m]: a little-endian bit stream a row."""
    n, m = codes.shape
    fields = (codes.numpy().astype(np.int64)[..., None] >> np.arange(bits)) & 1
    stream = np.zeros((n, -(-m * bits // 32) * 32), np.uint8)
    stream[:, : m * bits] = fields.reshape(n, -1)
    words = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    return torch.from_numpy(words.copy())


def random_integers(
    shape: tuple[int, int], bits: int, group: int, scale: torch.dtype, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned codes [N, K], zero points [N, K/group] and scales, as any tool might find them."""
    rows, columns = shape
    groups = (rows, columns // group)
    codes = torch.randint(1 << bits, shape, generator=rng)
    zeros = torch.randint(1, 1 << bits, groups, generator=rng)
    scales = (torch.rand(groups, generator=rng) * 0.01 + 0.001).to(scale)
    return codes, zeros, scales


def write_with_index(checkpoint: EditableCheckpoint, folder: Path, index: object) -> Path:
    """Write a checkpoint with another index.json (None: with none)."""
    checkpoint.write(folder)
    path = folder / "model.safetensors.index.json"
    path.unlink()
    if index is not None:
        path.write_text(json.dumps(index))
    return folder
