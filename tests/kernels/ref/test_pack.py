"""Bit streams against Python integers and compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from v4quant_kernels.ref.pack import WIDTHS, pack_bits, packed_bytes, unpack_bits

COLUMNS = [1, 5, 8, 10, 11, 31, 32, 33, 64, 96, 128, 257]


def random_integers(bits: int, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def row_by_definition(row: list[int], bits: int) -> list[int]:
    """One Python integer as the bit stream."""
    stream = sum((q + (1 << (bits - 1))) << (k * bits) for k, q in enumerate(row))
    return list(stream.to_bytes(-(-len(row) * bits // 32) * 4, "little"))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_pack(bits: int, columns: int, generator: torch.Generator) -> None:
    q = random_integers(bits, (5, columns), generator)
    packed = pack_bits(q, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (5, packed_bytes(columns, bits))
    assert packed.tolist() == [row_by_definition(row, bits) for row in q.tolist()]
    assert torch.equal(packed.view(torch.int32), pack_to_int32(q, bits))
    assert torch.equal(pack_bits(q.long(), bits), packed)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_unpack(bits: int, columns: int, generator: torch.Generator) -> None:
    shape = (5, packed_bytes(columns, bits))
    packed = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    before = packed.clone()
    q = unpack_bits(packed, bits, columns)
    assert q.dtype == torch.int8 and q.shape == (5, columns)
    assert torch.equal(packed, before), "the input must not change"
    theirs = unpack_from_int32(packed.view(torch.int32), bits, torch.Size((5, columns)))
    assert torch.equal(q, theirs)


@pytest.mark.parametrize("bits", WIDTHS)
def test_round_trip_of_extremes(bits: int) -> None:
    half = 1 << (bits - 1)
    q = torch.tensor([[-half, half - 1, 0, -1] * 12], dtype=torch.int8)
    assert torch.equal(unpack_bits(pack_bits(q, bits), bits, 48), q)


def test_four_bits_put_the_even_column_low() -> None:
    q = torch.tensor([[-8, 7, 0, -1, 1, 2, 3, 4]], dtype=torch.int8)
    assert pack_bits(q, 4).tolist() == [[0xF0, 0x78, 0xA9, 0xCB]]


def test_a_value_too_large_never_reaches_its_neighbour() -> None:
    with pytest.raises(AssertionError, match="does not fit"):
        pack_bits(torch.tensor([[0, 8]], dtype=torch.int8), 4)
