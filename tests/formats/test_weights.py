"""How a module is stored is decided from dtypes and shapes; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.calibration.oracle_loader import OracleParams
from tests.support.conversion import SCHEMES, TINY
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor, honest_shard
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import split_part
from v4quant_formats.errors import MissingTensor, WrongDtype
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense, read_weight
from v4quant_formats.weights import find_weight
from v4quant_kernels.codec import dequantize
from v4quant_kernels.errors import NonFiniteWeight
from v4quant_kernels.scheme import SCHEMES as TABLE

SIZES = {"F8_E4M3": 8, "F8_E8M0": 8, "U8": 8, "I8": 8, "BF16": 16, "F32": 32, "I32": 32, "I64": 64,
         "F16": 16, "BOOL": 8, "F64": 64}  # fmt: skip


def make(folder: Path, parts: dict[str, tuple[str, tuple[int, ...]]], **data: bytes) -> Checkpoint:
    """A checkpoint of the one module `m` with zero bytes (or `data`) in the given parts."""
    tensors = {}
    for part, (dtype, shape) in parts.items():
        size = SIZES[dtype] // 8
        for extent in shape:
            size *= extent
        tensors[f"m.{part}" if part else "m"] = StoredTensor(
            dtype, shape, data.get(part, bytes(size))
        )
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(honest_shard(tensors))
    return open_checkpoint(folder)


def packed(shape: tuple[int, int]) -> bytes:
    return torch.tensor(shape).numpy().tobytes()


FORMS: list[tuple[str, tuple[int, ...], dict[str, tuple[str, tuple[int, ...]]]]] = [
    ("mxfp4", (4, 64), {"weight": ("I8", (4, 32)), "scale": ("F8_E8M0", (4, 2))}),
    ("mxfp4", (4, 64), {"weight": ("U8", (4, 32)), "weight_scale": ("U8", (4, 2))}),
    ("nvfp4", (4, 64), {"weight": ("U8", (4, 32)), "weight_scale": ("F8_E4M3", (4, 4)),
                        "weight_scale_2": ("F32", ()), "input_scale": ("F32", ())}),
    ("fp8", (200, 300), {"weight": ("F8_E4M3", (200, 300)), "scale": ("F8_E8M0", (2, 3))}),
    ("fp8", (200, 300), {"weight": ("F8_E4M3", (200, 300)), "weight_scale_inv": ("F32", (2, 3))}),
    ("mxfp8", (200, 64), {"weight": ("F8_E4M3", (200, 64)), "scale": ("F8_E8M0", (200, 2))}),
    ("fp8-32x32", (200, 64), {"weight": ("F8_E4M3", (200, 64)), "scale": ("F8_E8M0", (7, 2))}),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "shape", "parts"), FORMS, ids=lambda p: str(p)[:40])
def test_coded_forms(
    scheme: str, shape: tuple[int, int], parts: dict[str, tuple[str, tuple[int, ...]]],
    tmp_path: Path,
) -> None:  # fmt: skip
    checkpoint = make(tmp_path, parts)
    stored = find_weight(checkpoint, "m")
    assert stored.scheme is not None
    assert (stored.scheme.name, stored.shape) == (scheme, shape)
    assert stored.nbytes == checkpoint.nbytes
    assert dequantize(read_weight(checkpoint, stored)).shape == shape


@pytest.mark.parametrize("name", [n for n in TABLE if n.startswith("int")])
def test_packed_integers(name: str, tmp_path: Path) -> None:
    scheme, shape = TABLE[name], (4, 256)
    words = -(-shape[1] * scheme.bits // 32)
    parts = {
        "weight_packed": ("I32", (4, words)),
        "weight_scale": ("BF16", (4, shape[1] // scheme.group_size)),
        "weight_shape": ("I64", (2,)),
    }
    stored = find_weight(make(tmp_path, parts, weight_shape=packed(shape)), "m")
    assert stored.scheme == scheme and stored.shape == shape


@pytest.mark.parametrize(
    "said", [(4, 0), (4, -64), (-4, 256), (5, 256), (4, 2**40), (0, 0), (4, 255)]
)
def test_weight_shape_that_lies(said: tuple[int, int], tmp_path: Path) -> None:
    parts = {
        "weight_packed": ("I32", (4, 32)),
        "weight_scale": ("BF16", (4, 4)),
        "weight_shape": ("I64", (2,)),
    }
    with pytest.raises(WrongDtype, match=r"m\.weight_shape"):
        find_weight(make(tmp_path, parts, weight_shape=packed(said)), "m")


@pytest.mark.parametrize(
    ("parts", "kind", "text"),
    [
        ({"weight": ("I8", (4, 32))}, MissingTensor, "'m.scale'"),
        ({"weight": ("F8_E4M3", (4, 32))}, MissingTensor, "'m.scale'"),
        ({"scale": ("F8_E8M0", (4, 2))}, MissingTensor, "'m.weight'"),
        ({"weight_packed": ("I32", (4, 8))}, MissingTensor, "'m.weight_scale'"),
        ({"weight_packed": ("I32", (4, 8)), "weight_scale": ("BF16", (4, 2))}, MissingTensor,
         "'m.weight_shape'"),
        ({"weight": ("U8", (4, 32)), "weight_scale": ("F8_E4M3", (4, 4))}, MissingTensor,
         "weight_scale_2"),
        ({"weight": ("I8", (4, 32)), "scale": ("F8_E8M0", (4, 3))}, WrongDtype, "m.scale"),
        ({"weight": ("I8", (4, 32)), "scale": ("F32", (4, 3))}, WrongDtype, "m.scale"),
        ({"weight": ("I8", (4, 8)), "scale": ("F8_E8M0", (4, 0))}, WrongDtype, "m.scale"),
        ({"weight": ("I8", (4,)), "scale": ("F8_E8M0", (4,))}, WrongDtype, "m.weight"),
        ({"weight": ("I8", (0, 32)), "scale": ("F8_E8M0", (0, 2))}, WrongDtype, "m.weight"),
        ({"weight": ("F8_E4M3", (200, 64)), "scale": ("F32", (200, 2))}, WrongDtype, "m.scale"),
        ({"weight": ("F8_E4M3", (200, 60)), "scale": ("F8_E8M0", (200, 2))}, WrongDtype, "m.scale"),
        ({"weight": ("F8_E4M3", (200, 300)), "scale": ("BF16", (3, 3))}, WrongDtype, "m.scale"),
        ({"weight": ("F64", (4, 4))}, WrongDtype, "F64"),
        ({"weight": ("BF16", (4, 4)), "scale": ("F32", (1, 1))}, WrongDtype, "BF16"),
        ({"": ("F32", (4,)), "weight": ("F32", (4,))}, WrongDtype, "'m'"),
        ({"weight": ("F8_E4M3", (4, 4)), "scale": ("F32", (1, 1)),
          "weight_scale_inv": ("F32", (1, 1))}, WrongDtype, "weight_scale_inv"),
        ({"weight": ("I8", (4, 32)), "scale": ("F8_E8M0", (4, 2)), "weight_shape": ("I64", (2,))},
         WrongDtype, "weight_shape"),
    ],
    ids=lambda p: str(p)[:60] if isinstance(p, dict) else "",
)  # fmt: skip
def test_what_does_not_fit(
    parts: dict[str, tuple[str, tuple[int, ...]]], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        find_weight(make(tmp_path, parts), "m")
    assert text in str(caught.value) and "model.safetensors" in str(caught.value)


def test_no_tensor_at_all(tmp_path: Path) -> None:
    with pytest.raises(MissingTensor, match="'other'"):
        find_weight(make(tmp_path, {"weight": ("BF16", (1, 1))}), "other")


def test_values_of_the_tiny_checkpoint_whole_and_in_rows() -> None:
    oracle = OracleParams(TINY)
    with open_checkpoint(TINY) as checkpoint:
        for module in {split_part(s.name)[0] for s in checkpoint}:
            assert torch.equal(read_dense(checkpoint, module), oracle(module)), module
        stored = find_weight(checkpoint, "layers.1.attn.indexer.wq_b")
        rows = dequantize(read_weight(checkpoint, stored, (256, 600)))
        assert torch.equal(rows, oracle("layers.1.attn.indexer.wq_b")[256:600])


@pytest.mark.parametrize(
    ("name", "at", "byte"),
    [
        ("layers.0.attn.wq_a.weight", 5, 0x7F),
        ("layers.0.attn.wq_a.weight", 5, 0xFF),
        ("layers.0.attn.wq_a.scale", 0, 0xFF),
        ("layers.0.ffn.experts.1.w2.scale", 17, 0xFF),
    ],
)
def test_nan_codes_are_refused_at_read(name: str, at: int, byte: int, tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    data = bytearray(edited[name].data)
    data[at] = byte
    edited[name].data = bytes(data)
    checkpoint = open_checkpoint(edited.write(tmp_path))
    with checkpoint, pytest.raises(NonFiniteWeight) as caught:
        read_dense(checkpoint, split_part(name)[0])
    assert name in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["norm.weight", "layers.1.ffn.gate.bias"])
def test_nan_floats_are_refused_at_read(name: str, value: float, tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[edited[name].dtype]
    bad = torch.tensor([value]).to(dtype).view(torch.uint8).numpy().tobytes()
    edited[name].data = edited[name].data[: -len(bad)] + bad
    checkpoint = open_checkpoint(edited.write(tmp_path))
    with checkpoint, pytest.raises(NonFiniteWeight, match=name):
        read_dense(checkpoint, split_part(name)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_our_own_outputs_are_recognised(scheme: str, converted) -> None:  # type: ignore[no-untyped-def]
    with open_checkpoint(converted(scheme)) as checkpoint:
        stored = find_weight(checkpoint, "layers.0.ffn.experts.0.w1")
        assert (stored.scheme.name if stored.scheme else "bf16") == scheme.partition("/")[0]
