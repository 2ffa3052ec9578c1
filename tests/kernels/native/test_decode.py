"""Compiled decoding gives the torch functions' bits, for every scheme and for odd values too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from v4quant_kernels import codec, native
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref.pack import packed_bytes
from v4quant_kernels.scheme import SCHEMES, Scheme

if not native.available():
    pytest.skip("needs numba", allow_module_level=True)

from v4quant_kernels.native import decode

CODED = [s for s in SCHEMES.values() if s.element not in ("bf16", "ggml")]
EXTRA = [
    Scheme("fp8-32x32", "e4m3", 8, (32, 32), "e8m0"),
    Scheme("fp8-channel", "e4m3", 8, (1, 384), "f32"),
    replace(SCHEMES["fp8"], scale="f32"),
]


def coded(scheme: Scheme, rows: int, columns: int, generator: torch.Generator) -> QTensor:
    """Codes of all bytes, NaN among them, and scales of all sizes."""
    height, width = scheme.block
    shape = (-(-rows // height), -(-columns // width))
    row_bytes = packed_bytes(columns, scheme.bits) if scheme.element == "int" else (
        columns * scheme.bits // 8
    )  # fmt: skip
    codes = torch.randint(0, 256, (rows, row_bytes), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if scheme.element == "e4m3":
        codes = codes.view(torch.float8_e4m3fn)
    values = {
        "e8m0": lambda: scales.view(torch.float8_e8m0fnu),
        "e4m3": lambda: scales.view(torch.float8_e4m3fn),
        "bf16": lambda: torch.randn(shape, generator=generator).bfloat16(),
        "f32": lambda: torch.randn(shape, generator=generator),
    }
    top = torch.rand((), generator=generator) if scheme.has_global_scale else None
    return QTensor(scheme, (rows, columns), codes, values[scheme.scale](), top)


@pytest.mark.parametrize("scheme", [*CODED, *EXTRA], ids=lambda s: f"{s.name}-{s.scale}")
def test_same_bits_as_torch(scheme: Scheme, generator: torch.Generator) -> None:
    for rows, columns in ((1, 384), (40, 384), (200, 384)):
        q = coded(scheme, rows, columns, generator)
        found, meant = decode.decode(q), codec._functions(scheme).dequantize(q)
        assert torch.equal(found.isnan(), meant.isnan())
        numbers = ~meant.isnan()
        assert torch.equal(found[numbers].view(torch.int32), meant[numbers].view(torch.int32))


def test_ragged_tiles(generator: torch.Generator) -> None:
    q = coded(SCHEMES["fp8"], 130, 200, generator)
    assert torch.equal(
        decode.decode(q).nan_to_num(7), codec._functions(q.scheme).dequantize(q).nan_to_num(7)
    )


def test_large_matrices_take_the_loop(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    genuine = decode.decode
    monkeypatch.setattr(decode, "decode", lambda q: asked.append(q.shape) or genuine(q))
    codec.dequantize(coded(SCHEMES["mxfp4"], 8, 64, generator))
    codec.dequantize(coded(SCHEMES["mxfp4"], 256, 1024, generator))
    assert asked == [(256, 1024)]


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_found_anywhere(code: int, generator: torch.Generator) -> None:
    for size in (10, 3 * 65536 + 17):
        codes = torch.randint(0, 127, (size,), generator=generator, dtype=torch.uint8)
        codes[::2] |= 128
        codes[(codes & 127) == 127] = 0
        assert not codec.holds_nan(codes.view(torch.float8_e4m3fn))
        place = int(torch.randint(0, size, (), generator=generator))
        codes[place] = code
        assert codec.holds_nan(codes.view(torch.float8_e4m3fn)), place
