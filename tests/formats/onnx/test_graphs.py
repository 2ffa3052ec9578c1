"""ONNX graphs before any runtime: what is stored, how it decodes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from v4quant_formats.errors import UnsupportedPair, WrongDtype
from v4quant_formats.onnx.decode import pair_table, power_table, tile_scales
from v4quant_formats.onnx.experts import (
    CODES13,
    KERNELS,
    SCALES13,
    ExpertBlock,
    check_block,
    choose_kernel,
    expert_pieces,
    expert_specs,
)
from v4quant_formats.onnx.graph import Graph
from v4quant_formats.onnx.indexer import indexer_model
from v4quant_formats.onnx.moe import MoeLayer, moe_model
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shards import ShardWriter, plan_shard
from v4quant_formats.spec import TensorSpec
from v4quant_kernels import codec
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.scheme import SCHEMES

onnx = pytest.importorskip("onnx")


def block(scheme: str, hidden: int = 128, intermediate: int = 256) -> ExpertBlock:
    return ExpertBlock(3, hidden, intermediate, 2, 10.0, SCHEMES[scheme], KERNELS[scheme][0])


def test_lookup_tables_are_the_formats() -> None:
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = magnitudes + [-m for m in magnitudes]
    wanted = [[values[byte & 15], values[byte >> 4]] for byte in range(256)]
    assert pair_table().tolist() == wanted
    assert [float(p) for p in power_table()[:255]] == [2.0 ** (b - 127) for b in range(255)]
    assert bool(power_table()[255].isnan())


def test_tile_scales_repeat() -> None:
    scale = torch.arange(6.0).view(2, 3)
    spread = tile_scales(scale, 200)
    assert spread.shape == (200, 3)
    assert torch.equal(spread[127], scale[0]) and torch.equal(spread[128], scale[1])


@pytest.mark.parametrize("scheme", KERNELS)
def test_bits_stored(scheme: str) -> None:
    """The codes' bits, and scales of 8 (MXFP4) or 32 (integers) bits per group."""
    specs = expert_specs(block(scheme))
    weights = 3 * 3 * 128 * 256
    scale = 8 if scheme == "mxfp4" else 32
    bits = SCHEMES[scheme].bits + scale / SCHEMES[scheme].group_size
    assert sum(s.nbytes for s in specs) * 8 == weights * bits


def test_gate_and_up_rows_interleave(generator: torch.Generator) -> None:
    shape = block("int4-g32")
    w1, w3, w2 = (
        codec.quantize(torch.randn(r, c, generator=generator), shape.scheme)
        for r, c in ((256, 128), (256, 128), (128, 256))
    )
    pieces = {name: (first, data) for name, first, data in expert_pieces(2, w1, w3, w2)}
    first, codes = pieces[CODES13]
    assert first == 2 * 512 * 64
    rows = codes.reshape(512, 64)
    assert torch.equal(rows[0::2], w1.codes) and torch.equal(rows[1::2], w3.codes)
    scales = pieces[SCALES13][1].reshape(512, 4)
    assert w1.scale is not None and torch.equal(scales[0::2], w1.scale.float())


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8", "mxfp8", "int3-g64", "int3-g128", "bf16"])
def test_schemes_without_a_kernel(scheme: str) -> None:
    with pytest.raises(UnsupportedPair) as caught:
        choose_kernel(scheme, None)
    assert all(name in str(caught.value) for name in KERNELS)


@pytest.mark.parametrize(
    ("scheme", "kernel", "kind", "text"),
    [
        ("int5-g32", None, UnsupportedScheme, "int5-g32"),
        ("", None, UnsupportedScheme, "unknown scheme"),
        ("mxfp4", "qmoe", UnsupportedPair, "choose lookup"),
        ("int4-g32", "lookup", UnsupportedPair, "choose qmoe or matmulnbits"),
        ("int8-g32", "qmoe", UnsupportedPair, "choose matmulnbits"),
        ("int4-g32", "QMOE", UnsupportedPair, "'QMOE'"),
    ],
)
def test_mistyped_choices(
    scheme: str, kernel: str | None, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        choose_kernel(scheme, kernel)


@pytest.mark.parametrize("sizes", [(96, 128), (128, 96)])
def test_channels_that_are_no_groups(sizes: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedPair, match="96 input channels"):
        check_block(block("int4-g64", *sizes), "model")


@pytest.mark.parametrize(("heads", "dim"), [(0, 128), (64, 0), (64, 48), (64, -32)])
def test_indexers_that_cannot_be(heads: int, dim: int) -> None:
    with pytest.raises(UnsupportedPair, match="indexer"):
        indexer_model(heads, dim, {})


def test_dtypes_no_initializer_has() -> None:
    with pytest.raises(WrongDtype, match="w F8_E8M0"):
        Graph("g").stored(TensorSpec("w", "F8_E8M0", (4,), "file", 8))


def test_weights_stay_outside(tmp_path: Path) -> None:
    """A graph of a layer beyond 2 GB is some kilobytes and points into a file of any size."""
    shape = ExpertBlock(384, 7168, 3072, 6, 10.0, SCHEMES["int4-g32"], "qmoe")
    specs, offset = {}, 8
    dense = [TensorSpec("gate", "F32", (384, 7168)), TensorSpec("gate.bias", "F32", (384,))]
    for name, rows, columns in (("w1", 3072, 7168), ("w3", 3072, 7168), ("w2", 7168, 3072)):
        dense.append(TensorSpec(f"shared.{name}", "BF16", (rows, columns)))
    for spec in (*dense, *expert_specs(shape)):
        specs[spec.name] = TensorSpec(spec.name, spec.dtype, spec.shape, "pro.safetensors", offset)
        offset += spec.nbytes
    assert offset > 2**33
    data = moe_model(MoeLayer("layers.9", shape, False, 2.5), specs, {"k": "v"})
    assert len(data) < 20_000
    model = onnx.load_from_string(data)
    places = {
        t.name: {e.key: int(e.value) for e in t.external_data if e.key != "location"}
        for t in model.graph.initializer
        if t.external_data
    }
    assert max(p["offset"] + p["length"] for p in places.values()) == offset
    assert {p.key: p.value for p in model.metadata_props} == {"k": "v"}


def test_same_graph_same_bytes(tmp_path: Path) -> None:
    assert indexer_model(4, 64, {"a": "1"}) == indexer_model(4, 64, {"a": "1"})


def test_data_file_is_plain_safetensors(tmp_path: Path, generator: torch.Generator) -> None:
    from safetensors.torch import load_file

    shape = block("mxfp4")
    writer = ShardWriter(tmp_path / "e.safetensors", plan_shard(expert_specs(shape)))
    for expert in range(3):
        w1, w3, w2 = (
            codec.quantize(torch.randn(r, c, generator=generator), shape.scheme)
            for r, c in ((256, 128), (256, 128), (128, 256))
        )
        for piece in expert_pieces(expert, w1, w3, w2):
            writer.add_piece(*piece)
    writer.close()
    assert (
        load_file(tmp_path / "e.safetensors").keys()
        == read_header(tmp_path / "e.safetensors").keys()
    )
    assert np.fromfile(tmp_path / "e.safetensors", np.uint8).size == writer.nbytes
