"""Casts from MXFP4 against an independent model in exact arithmetic, and their exactness limits."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant_kernels import cast, codec, native
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import recode
from v4quant_kernels.scheme import SCHEMES

CASTS = ["mxfp8", "nvfp4", "fp8", "int8-g32", "int8-g128"]
HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # twice each E2M1 code


def mxfp4(codes: torch.Tensor, scale_bytes: torch.Tensor) -> QTensor:
    """QTensor from unpacked codes [N, K] and scale bytes [N, K/32]."""
    codes, scale = codes.to(torch.uint8), scale_bytes.to(torch.uint8).contiguous()
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    shape = (codes.shape[0], codes.shape[1])
    return QTensor(SCHEMES["mxfp4"], shape, packed, scale.view(torch.float8_e8m0fnu))


def exact_values(codes: torch.Tensor, scale_bytes: torch.Tensor) -> np.ndarray:
    """float64 values of the source: exact, the exponents stay within -128 to 130."""
    wide = scale_bytes.numpy().astype(np.int64).repeat(32, axis=1)
    return np.ldexp(HALVES[codes.numpy().astype(int)].astype(np.float64), wide - 128)


def decoded(q: QTensor) -> np.ndarray:
    """float64 values of a cast, decoded with ml_dtypes and numpy from the raw bytes."""
    assert q.scale is not None
    rows, columns = q.shape
    raw = q.codes.view(torch.uint8).numpy()
    if q.scheme.element == "e2m1":
        nibbles = np.stack((raw & 15, raw >> 4), -1).reshape(rows, columns)
        values = HALVES[nibbles] / 2.0
        values[nibbles == 8] = -0.0
    elif q.scheme.element == "e4m3":
        values = raw.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        values = raw.reshape(rows, columns).astype(np.float64) - 128
    bytes_ = q.scale.view(torch.uint8).numpy()
    if q.scheme.scale == "e8m0":
        scale = np.ldexp(1.0, bytes_.astype(np.int64) - 127)
    elif q.scheme.scale == "e4m3":
        scale = bytes_.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        scale = q.scale.view(torch.int16).numpy().view(ml_dtypes.bfloat16).astype(np.float64)
    height, width = q.scheme.block
    wide = scale.repeat(height, 0)[:rows].repeat(width, 1)[:, :columns]
    return values * wide * (float(q.global_scale) if q.global_scale is not None else 1.0)


def check(codes: torch.Tensor, scale_bytes: torch.Tensor, scheme: str) -> cast.CastResult:
    """Cast; `altered` must be the true number of changed elements. Returns the result."""
    result = cast.cast_mxfp4(mxfp4(codes, scale_bytes), SCHEMES[scheme])
    want, got = exact_values(codes, scale_bytes), decoded(result.tensor)
    assert result.altered == int((want != got).sum()), scheme
    if SCHEMES[scheme].element != "int":
        negative = codes.numpy() >= 8
        assert (np.signbit(got) == negative).all(), "the sign, also of zero, is kept"
    return result


def two_groups(low: int, high: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code in groups of two exponents: row 0 high, row 1 low; [rows, 128]."""
    codes = torch.arange(16).repeat(rows, 8)
    bytes_ = torch.full((rows, 4), high)
    bytes_[1:, :] = low
    return codes, bytes_


@pytest.mark.parametrize("scheme", CASTS)
def test_every_code_at_every_depth(scheme: str) -> None:
    """One row a depth, all codes in it, under a top row; and inside a row for row-wise scales."""
    depths = torch.arange(0, 40)
    codes = torch.arange(16).repeat(40, 8)
    bytes_ = (160 - depths)[:, None].repeat(1, 4)
    check(codes, bytes_, scheme)
    bytes_[:, 0] = 160  # every row now has its own spread
    check(codes, bytes_, scheme)


@pytest.mark.parametrize(("scheme", "octaves"), [("nvfp4", 17), ("fp8", 14)], ids=["nvfp4", "fp8"])
def test_limit_of_exactness(scheme: str, octaves: int) -> None:
    for depth in range(octaves + 4):
        result = check(*two_groups(150 - depth, 150), scheme)
        assert (result.altered == 0) == (depth <= octaves), (scheme, depth)


def test_limit_of_exactness_int8() -> None:
    codes = torch.arange(16).repeat(2, 8)
    for depth in range(8):
        bytes_ = torch.tensor([[150, 150, 150, 150 - depth]]).repeat(2, 1)
        assert (check(codes, bytes_, "int8-g128").altered == 0) == (depth <= 3)
        assert check(codes, bytes_, "int8-g32").altered == 0


@pytest.mark.parametrize("scheme", ["mxfp8", "int8-g32"])
def test_always_exact(scheme: str, generator: torch.Generator) -> None:
    codes = torch.randint(16, (64, 96), generator=generator)
    bytes_ = torch.randint(8, 255, (64, 3), generator=generator)
    assert check(codes, bytes_, scheme).altered == 0


@pytest.mark.parametrize("scheme", CASTS)
@pytest.mark.parametrize("spread", [1, 12, 40, 250])
def test_compiled_and_torch_recoding_agree(
    scheme: str, spread: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scales and counts, from one octave to all, with zero groups, tiles cut off."""
    if not native.available():
        pytest.skip("Numba is not installed")
    columns = 640 if scheme == "int8-g128" else 672
    codes = torch.randint(16, (150, columns), generator=generator)
    groups = codes.view(150, -1, 32)
    empty = torch.rand(groups.shape[:2], generator=generator) < 0.2
    groups[empty] &= 8  # zeros of either sign
    top = min(130, 254 - spread) if spread < 250 else 4
    q = mxfp4(codes, torch.randint(top, top + spread, groups.shape[:2], generator=generator))
    compiled = cast.cast_mxfp4(q, SCHEMES[scheme])
    monkeypatch.setattr(native, "available", lambda: False)
    torch_way = cast.cast_mxfp4(q, SCHEMES[scheme])
    assert compiled.altered == torch_way.altered
    for part in ("codes", "scale"):
        one, other = (getattr(r.tensor, part) for r in (compiled, torch_way))
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), part


@pytest.mark.parametrize("target", ["e4m3", "int8"])
def test_arithmetic_means_what_the_tables_say(target: str) -> None:
    """Every byte in every row, in all four places of a word; more blocks than one pass takes."""
    if not native.available():
        pytest.skip("Numba is not installed")
    from v4quant_kernels.native.recode import recode

    table, changed = cast._tables(target)
    depths = torch.arange(25, dtype=torch.uint8).repeat_interleave(64)
    byte = torch.arange(256)
    places = torch.stack([byte.roll(shift) for shift in range(4)]).view(-1).to(torch.uint8)
    codes = places.repeat(25).view(25 * 64, 16)
    out = torch.zeros(codes.shape, dtype=torch.int16)
    facts = (table.numpy(), changed.view(-1).numpy())
    altered = recode(codes.numpy(), depths.numpy(), target, *facts, out.numpy())
    index = depths.long().unsqueeze(1) * 256 + codes
    assert torch.equal(out, table[index])
    assert altered == int(changed.view(-1)[index].sum())


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", CASTS)
def test_cuda_recodes_to_the_same_bits(scheme: str, generator: torch.Generator) -> None:
    q = mxfp4(
        torch.randint(16, (130, 512), generator=generator),
        torch.randint(100, 130, (130, 16), generator=generator),
    )
    here = cast.cast_mxfp4(q, SCHEMES[scheme])
    there = cast.cast_mxfp4(q.to(torch.device("cuda")), SCHEMES[scheme])
    assert here.altered == there.altered
    back = there.tensor.to(torch.device("cpu"))
    assert here.tensor.scale is not None and back.scale is not None
    for a, b in ((here.tensor.codes, back.codes), (here.tensor.scale, back.scale)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("scheme", CASTS)
def test_random_spreads(scheme: str, generator: torch.Generator) -> None:
    """Ragged tiles, zero groups and deep groups together; the count is exact whatever happens."""
    for rows, columns in ((1, 128), (129, 128), (200, 384), (128, 640)):
        codes = torch.randint(16, (rows, columns), generator=generator)
        codes[torch.rand(codes.shape, generator=generator) < 0.3] = 8  # -0
        zero = torch.rand(rows, columns // 32, generator=generator) < 0.3
        codes[zero.repeat_interleave(32, 1)] = 0
        bytes_ = torch.randint(100, 130, (rows, columns // 32), generator=generator)
        check(codes, bytes_, scheme)


@pytest.mark.parametrize("columns", [32, 160, 288])
def test_ragged_columns_of_fp8(columns: int, generator: torch.Generator) -> None:
    codes = torch.randint(16, (130, columns), generator=generator)
    bytes_ = torch.randint(110, 122, (130, columns // 32), generator=generator)
    result = check(codes, bytes_, "fp8")
    assert result.altered == 0
    assert result.tensor.scale is not None
    assert result.tensor.scale.shape == (2, -(-columns // 128))


@pytest.mark.parametrize("scheme", CASTS)
def test_zero_groups_push_nothing_out(scheme: str) -> None:
    """A group of zeros 60 octaves above or below must not cost the others a bit."""
    codes = torch.arange(16).repeat(4, 8)
    codes[:, 32:64] = 0
    codes[1, 32:64] = 8
    for byte in (0, 40, 190, 254):
        bytes_ = torch.full((4, 4), 120)
        bytes_[:, 1] = byte
        assert check(codes, bytes_, scheme).altered == 0


@pytest.mark.parametrize("scheme", CASTS)
@pytest.mark.parametrize("byte", [0, 1, 2, 253, 254])
def test_ends_of_the_scale(scheme: str, byte: int) -> None:
    codes = torch.arange(16).repeat(3, 8)
    result = check(codes, torch.full((3, 4), byte), scheme)
    assert result.altered == 0


@pytest.mark.parametrize("scheme", CASTS)
def test_a_matrix_of_zeros(scheme: str) -> None:
    for byte in (0, 127, 254):
        codes = torch.tensor([0, 8]).repeat(2, 64)
        assert check(codes, torch.full((2, 4), byte), scheme).altered == 0


def test_nearest_is_taken_with_ties_to_even() -> None:
    """What is out of reach rounds to the nearest: against exact fractions."""
    codes = torch.arange(16).repeat(2, 8)
    bytes_ = torch.tensor([[150, 150, 150, 145]] * 2)  # five octaves below: 1 / 2 of a step
    result = check(codes, bytes_, "int8-g128")
    got = result.tensor.codes.view(2, 128)[0, 96:112].int() - 128
    steps = [Fraction(int(h), 2) * Fraction(16, 32) for h in HALVES]
    assert got.tolist() == [round(s) for s in steps]  # Python rounds ties to even
    assert result.altered == 2 * 2 * sum(s.denominator != 1 for s in steps)


def test_shared_top_gives_fused_pairs_one_global_scale() -> None:
    gate = mxfp4(*two_groups(120, 120))
    up = mxfp4(*two_groups(125, 125))
    top = max(map(cast.top_exponent, (gate, up)))
    assert (cast.top_exponent(gate), top) == (-7, -2)
    pair = [cast.cast_mxfp4(q, SCHEMES["nvfp4"], top) for q in (gate, up)]
    assert len({float(r.tensor.global_scale or 0) for r in pair}) == 1
    assert [r.altered for r in pair] == [0, 0]
    for q, r in zip((gate, up), pair, strict=True):
        assert torch.equal(codec.dequantize(q), codec.dequantize(r.tensor))


def test_same_scheme_is_the_same_tensor_and_others_are_refused() -> None:
    q = mxfp4(*two_groups(120, 125))
    assert cast.cast_mxfp4(q, SCHEMES["mxfp4"]).tensor is q
    for name, scheme in SCHEMES.items():
        if name in (*CASTS, "mxfp4"):
            assert cast.can_cast(scheme) and scheme.may_hold_mxfp4
        else:
            assert not cast.can_cast(scheme)
            with pytest.raises(UnsupportedScheme, match=name):
                cast.cast_mxfp4(q, scheme)
    narrow = mxfp4(torch.zeros(2, 96), torch.full((2, 3), 127))
    with pytest.raises(UnsupportedScheme, match="group_size 128"):
        cast.cast_mxfp4(narrow, SCHEMES["int8-g128"])


def test_large_matrices_are_recoded_in_pieces(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(16, (70, 256), generator=generator)
    bytes_ = torch.randint(100, 125, (70, 8), generator=generator)
    whole = cast.cast_mxfp4(mxfp4(codes, bytes_), SCHEMES["fp8"])
    monkeypatch.setattr(recode, "ROW_BYTES", 1000)
    monkeypatch.setattr(native, "available", lambda: False)
    pieces = cast.cast_mxfp4(mxfp4(codes, bytes_), SCHEMES["fp8"])
    assert pieces.altered == whole.altered
    assert torch.equal(pieces.tensor.codes.view(torch.uint8), whole.tensor.codes.view(torch.uint8))
