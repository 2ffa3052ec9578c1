"""Good headers of every shape are read as the safetensors library reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.conversion import TINY
from tests.support.shard_bytes import entry, raw_shard
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.spec import DTYPE_BITS, TORCH_NAMES, stored_dtype, torch_dtype


def test_agrees_with_the_library(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {
        f"t.{dtype}".replace(".", "_"): torch.randint(2, (3, 5), generator=generator).to(dtype)
        for dtype in map(torch_dtype, TORCH_NAMES)
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "name é": torch.ones(1)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.keys() == tensors.keys()
    content = path.read_bytes()
    for name, tensor in tensors.items():
        spec = header[name]
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), stored_dtype(tensor.dtype))
        data = content[spec.offset : spec.offset + spec.nbytes]
        assert data == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert spec.file == "x.safetensors"


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {
        "last": entry("U8", [2], 4, 6),
        "first": entry("U8", [4], 0, 4),
        "nothing": entry("F32", [0], 4, 4),
    }
    path.write_bytes(raw_shard(header, bytes(6)))
    assert list(read_header(path)) == ["first", "nothing", "last"]


def test_reads_the_tiny_checkpoint() -> None:
    for path in TINY.glob("*.safetensors"):
        header = read_header(path)
        assert max(s.offset + s.nbytes for s in header.values()) == path.stat().st_size


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = DTYPE_BITS[dtype]
    path.write_bytes(raw_shard({"t": entry(dtype, [8], 0, size)}, bytes(size)))
    spec = read_header(path)["t"]
    assert (spec.dtype, spec.numel, spec.nbytes) == (dtype, 8, size)
