"""GGML blocks: every byte pattern against the gguf package and against the definition."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch

from v4quant_kernels import ggml
from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme
from v4quant_kernels.ggml_types import GGML_TYPES, get_type
from v4quant_kernels.native.ggml.join import join
from v4quant_kernels.ref import e2m1, ggml_codebooks
from v4quant_kernels.ref.ggml_blocks import SHAPES, put_together, take_apart

BLOCKED = [name for name, kind in GGML_TYPES.items() if kind.block > 1]
EACH = pytest.mark.parametrize("name", BLOCKED)
EACH_SHAPE = pytest.mark.parametrize("name", list(SHAPES))
EACH_GRID = pytest.mark.parametrize(
    "name", [name for name in SHAPES if name not in ggml_codebooks.SHAPES]
)
OUR_OWN = {"q2_0": (42, 64, 18)}  # llama.cpp's, not known to the package yet


def random_bytes(name: str, generator: torch.Generator, rows: int = 6) -> torch.Tensor:
    size = 7 * get_type(name).block_bytes
    return torch.randint(0, 256, (rows, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", list(GGML_TYPES))
def test_sizes_are_those_of_gguf(name: str) -> None:
    kind = GGML_TYPES[name]
    if name in OUR_OWN:
        assert (kind.type_id, kind.block, kind.block_bytes) == OUR_OWN[name]
        assert name.upper() not in gguf.GGMLQuantizationType.__members__
        return
    theirs = gguf.GGMLQuantizationType[name.upper()]
    assert kind.type_id == theirs.value
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)


@pytest.mark.parametrize("name", [name for name in BLOCKED if name not in OUR_OWN])
def test_random_bytes_decode_like_gguf(name: str, generator: torch.Generator) -> None:
    data = random_bytes(name, generator, rows=300)
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType[name.upper()]
        theirs = gguf.quants.dequantize(data.numpy(), kind)
    ours = ggml.decode(data, name).numpy()
    same = (ours.view(np.int32) == theirs.view(np.int32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), f"{(~same).sum()} values differ"


def bits(data: np.ndarray, start: int, count: int) -> int:
    """Bits of a block read as one little-endian integer."""
    return (int.from_bytes(data.tobytes(), "little") >> start) & ((1 << count) - 1)


def q4_k_value(block: np.ndarray, i: int) -> float:
    """One weight of a q4_k block in float64, from the layout as written down in C."""
    d, dmin = block[:4].view(np.float16).astype(np.float64)
    j = i // 32
    if j < 4:
        sc, m = bits(block[4 + j :], 0, 6), bits(block[8 + j :], 0, 6)
    else:
        sc = bits(block[8 + j :], 0, 4) | bits(block[j:], 6, 2) << 4
        m = bits(block[8 + j :], 4, 4) | bits(block[4 + j :], 6, 2) << 4
    q = bits(block[16 + i // 64 * 32 + i % 32 :], 4 * (j % 2), 4)
    return float(d * sc * q - dmin * m)


def q6_k_value(block: np.ndarray, i: int) -> float:
    half, r = divmod(i, 128)
    quarter, lane = divmod(r, 32)
    low = bits(block[64 * half + 32 * (quarter % 2) + lane :], 4 * (quarter // 2), 4)
    high = bits(block[128 + 32 * half + lane :], 2 * quarter, 2)
    scale = int(block[192 + i // 16 : 193 + i // 16].view(np.int8)[0])
    d = block[208:210].view(np.float16).astype(np.float64)[0]
    return float(d * scale * ((low | high << 4) - 32))


def q2_0_value(block: np.ndarray, i: int) -> float:
    d = block[:2].view(np.float16).astype(np.float64)[0]
    return float((bits(block[2:], 2 * i, 2) - 1) * d)


@pytest.mark.parametrize(
    ("name", "value"), [("q4_k", q4_k_value), ("q6_k", q6_k_value), ("q2_0", q2_0_value)]
)
def test_by_definition_in_float64(name: str, value, generator: torch.Generator) -> None:
    data = random_bytes(name, generator, rows=1)
    size = get_type(name).block_bytes
    for block in data.view(-1, size):
        ours = ggml.decode(block[None], name)[0].double()
        with np.errstate(all="ignore"):  # the scales may be NaN or infinite
            values = [value(block.numpy(), i) for i in range(get_type(name).block)]
        wanted = torch.tensor(values, dtype=torch.float64)
        good = wanted.isfinite()
        grid = ggml.grid(block[None], name)
        term = float((grid.scale.abs() * max(-grid.low, grid.high) + grid.offset.abs()).max())
        if math.isfinite(term):  # three roundings of numbers up to `term`
            assert (ours - wanted)[good].abs().max() <= 3 * term * 2**-24


@EACH_SHAPE
def test_taking_apart_loses_nothing(name: str, generator: torch.Generator) -> None:
    data = random_bytes(name, generator).view(-1, get_type(name).block_bytes)
    blocks = take_apart(data, name)
    shape = SHAPES[name]
    assert blocks.q.min() >= shape.q[0] and blocks.q.max() <= shape.q[1]
    assert torch.equal(put_together(blocks, name), data)


@EACH_GRID
def test_grid_and_codes_give_the_values_back(name: str, generator: torch.Generator) -> None:
    data = ggml.encode(torch.randn(5, 512, generator=generator), name)
    other = ggml.encode(torch.randn(5, 512, generator=generator), name)
    grid = ggml.grid(data, name)
    codes = ((ggml.decode(data, name) - grid.offset) / grid.scale).nan_to_num(0).round()
    codes = codes.clamp(grid.low, grid.high).to(torch.int8)
    moved = ggml.reencode(codes, ggml.reencode(codes * 0 + grid.high, data, name), name)
    assert torch.equal(ggml.decode(moved, name), ggml.decode(data, name))
    assert torch.equal(ggml.grid(moved, name).scale, grid.scale)
    assert not torch.equal(ggml.grid(other, name).scale, grid.scale)
    expected = grid.scale * codes.float() + grid.offset
    assert torch.equal(expected, ggml.decode(moved, name))


def test_floats_and_codebooks_have_no_grid() -> None:
    for name in ("bf16", "mxfp4", "iq4_nl", "iq2_xxs"):
        with pytest.raises(UnsupportedScheme, match="evenly spaced"):
            ggml.grid(torch.zeros(1, 34, dtype=torch.uint8), name)


def test_mxfp4_repack_moves_bytes_only(generator: torch.Generator) -> None:
    codes = torch.randint(0, 256, (9, 96), generator=generator, dtype=torch.uint8)
    scale = torch.randint(0, 253, (9, 6), generator=generator, dtype=torch.uint8)
    data = ggml.repack_mxfp4(codes, scale.view(torch.float8_e8m0fnu))
    assert data.shape == (9, 6 * 17)
    back, back_scale = ggml.unpack_mxfp4(data)
    assert torch.equal(back, codes) and torch.equal(back_scale.view(torch.uint8), scale)
    wanted = e2m1.decode_packed(codes).view(9, 6, 32).double()
    wanted *= torch.exp2(scale.double() - 127)[..., None]
    assert torch.equal(ggml.decode(data, "mxfp4").double(), wanted.view(9, 192))


def test_mxfp4_nan_scale_is_refused() -> None:
    scale = torch.full((1, 1), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(NonFiniteWeight, match="255"):
        ggml.repack_mxfp4(torch.zeros(1, 16, dtype=torch.uint8), scale)


@EACH
def test_bad_sizes_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedScheme, match="blocks of"):
        ggml.decode(torch.zeros(2, get_type(name).block_bytes + 1, dtype=torch.uint8), name)
    with pytest.raises(UnsupportedScheme, match=get_type(name).fallback or "bf16"):
        ggml.encode(torch.ones(2, 48), name)


def test_unknown_type_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedScheme, match="q4_k"):
        get_type("q7_k")


@EACH_SHAPE
def test_the_compiled_join_gives_the_same_bytes(name: str, generator: torch.Generator) -> None:
    data = random_bytes(name, generator).view(-1, get_type(name).block_bytes)
    assert torch.equal(put_together(take_apart(data, name), name, join), data)


@pytest.mark.parametrize("name", list(ggml_codebooks.SHAPES))
def test_what_a_codebook_holds_is_what_its_shape_says(
    name: str, generator: torch.Generator
) -> None:
    shape = ggml_codebooks.SHAPES[name]
    data = random_bytes(name, generator, rows=40).view(-1, get_type(name).block_bytes)
    blocks = take_apart(data, name)
    if shape.levels:
        assert torch.equal(blocks.q.unique(), torch.tensor(shape.levels, dtype=torch.int8))
    if shape.codebook is None:
        return
    low, high = shape.sc or (0, 0)
    assert blocks.sc is not None
    assert torch.equal(blocks.sc.unique(), torch.arange(low, high + 1, 2, dtype=torch.int8))
    negative = (blocks.q < 0).view(-1, 8).sum(1)
    assert ((negative % 2) == 0).all() == (shape.codebook.signs == "even")
    assert (blocks.q != 0).all()


def test_vectors_outside_a_grid_are_refused() -> None:
    q = torch.full((1, 256), 43, dtype=torch.int8)
    q[0, 3] = 8
    codebook = ggml_codebooks.SHAPES["iq2_xxs"].codebook
    assert codebook is not None
    with pytest.raises(AssertionError, match="no vector"):
        ggml_codebooks.find(codebook, q)


def test_types_with_a_codebook_say_so() -> None:
    """The fact that decides how much of a model `allocate` looks at, and what a coder does."""
    told = {name for name, kind in GGML_TYPES.items() if kind.codebook}
    assert told == {name for name, shape in SHAPES.items() if shape.codebook is not None}
    assert len(told) == 7
