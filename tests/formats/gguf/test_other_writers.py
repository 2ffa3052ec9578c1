"""GGUF files as other tools leave them: reordered, cut, of every type, with numbers that lie."""

from __future__ import annotations

import secrets
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter

from tests.support.conversion import TINY, convert
from tests.support.rewritten_gguf import rewrite
from v4quant.builtin import resolve_source
from v4quant.checks.soundness import require_sound
from v4quant.checks.verify import verify
from v4quant.recipe import Recipe
from v4quant_formats.errors import (
    FormatError,
    MissingTensor,
    UnexpectedTensor,
    WrongDtype,
    WrongMetadata,
)
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.structure import find_defects
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.ggml_types import GGML_TYPES
from v4quant_kernels.progress import SilentProgress

EXPERTS = "layers.3.ffn.experts"


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lone")
    convert(TINY, folder, Recipe("mxfp4", format="gguf", draft="drop"))
    return folder / "tiny-a-MXFP4.gguf"


def test_the_order_of_tensors_means_nothing(lone: Path, tmp_path: Path) -> None:
    source = rewrite(lone, tmp_path / "a.gguf", backwards=True)
    with open_checkpoint(source) as one, open_checkpoint(lone) as other:
        require_sound(one)
        for module in (f"{EXPERTS}.2.w1", "layers.1.attn.wq_a", "head"):
            assert torch.equal(read_dense(one, module), read_dense(other, module))


@pytest.mark.parametrize(
    ("lost", "error", "told"),
    [
        ("blk.3.attn_norm.weight", MissingTensor, r"layers\.3\.attn_norm"),
        ("blk.0.ffn_gate_tid2eid.weight", MissingTensor, r"layers\.0\.ffn\.gate\.tid2eid"),
        ("blk.2.ffn_down_exps.weight", MissingTensor, r"layers\.2\.ffn\.experts\.0\.w2"),
        ("output_norm.weight", MissingTensor, r"'norm' is missing"),
    ],
)
def test_a_tensor_that_is_lost_is_missed(
    lost: str, error: type[FormatError], told: str, lone: Path, tmp_path: Path
) -> None:
    assert lost in {t.name for t in GGUFReader(lone).tensors}
    source = rewrite(lone, tmp_path / "a.gguf", drop=lambda name: name == lost)
    with open_checkpoint(source) as opened, pytest.raises(error, match=told):
        require_sound(opened)


def test_a_lost_layer_is_missed_wherever_it_stood(lone: Path, tmp_path: Path) -> None:
    """The last one, too: what lists a layer each describe is not another model's count."""
    layers = max(int(t.name.split(".")[1]) for t in GGUFReader(lone).tensors if "blk." in t.name)
    for layer in (layers, secrets.randbelow(layers)):
        source = rewrite(
            lone, tmp_path / f"{layer}.gguf", drop=lambda n, at=layer: n.startswith(f"blk.{at}.")
        )
        with open_checkpoint(source) as opened, pytest.raises(MissingTensor, match=f"s.{layer}."):
            require_sound(opened)


@pytest.mark.parametrize("keys", [{"block_count": 9}, {"nextn_predict_layers": 1}])
def test_numbers_that_tensors_contradict_are_told(
    keys: dict[str, int], lone: Path, tmp_path: Path
) -> None:
    said = {f"deepseek4.{key}": value for key, value in keys.items()}
    with open_checkpoint(rewrite(lone, tmp_path / "a.gguf", keys=said)) as opened:
        require_sound(opened)
        [note] = find_defects(opened).notes
        [(key, value)] = said.items()
        assert f"{key} is {value}, its tensors make" in note
    with open_checkpoint(lone) as opened:
        assert not find_defects(opened).notes


@pytest.mark.parametrize(
    ("key", "value"),
    [("expert_weights_norm", 0), ("expert_group_count", 8), ("leading_dense_block_count", 1),
     ("attention.value_length", 64), ("expert_gating_func", 2), ("rope.scaling.attn_factor", 2)],
)  # fmt: skip
def test_another_arithmetic_is_refused(key: str, value: int, lone: Path, tmp_path: Path) -> None:
    source = rewrite(lone, tmp_path / "a.gguf", keys={f"deepseek4.{key}": value})
    with pytest.raises(WrongMetadata, match=key.rpartition(".")[2]):
        open_checkpoint(source)


def test_keys_that_other_writers_leave_out(lone: Path, tmp_path: Path) -> None:
    """What has one meaning is read; what an engine would take otherwise is told."""
    keys = ("rope.scaling.type", "expert_gating_func", "swiglu_clamp_shexp")
    source = rewrite(lone, tmp_path / "a.gguf", without=[f"deepseek4.{key}" for key in keys])
    with open_checkpoint(source) as opened, open_checkpoint(lone) as wanted:
        require_sound(opened)
        [note] = find_defects(opened).notes
        assert opened.config == wanted.config
    assert "rope.scaling.type is absent" in note


@pytest.mark.parametrize("name", ["blk.2.attn_q_a.bias", "blk.1.lora_a", "anything"])
def test_what_no_v4_has_is_told(name: str, lone: Path, tmp_path: Path) -> None:
    source = rewrite(lone, tmp_path / "a.gguf", extra=name)
    with pytest.raises(UnexpectedTensor, match=f"tensor '{name}' is none"):
        open_checkpoint(source)


@pytest.mark.parametrize("dtype", [Type.F16, Type.F32, Type.BF16])
def test_floats_hold_what_they_held(dtype: Type, lone: Path, tmp_path: Path) -> None:
    source = rewrite(lone, tmp_path / "a.gguf", lambda n: dtype if "_exps" in n else None)
    convert(source, tmp_path / "out", "mxfp4")
    assert not verify(tmp_path / "out", source, SilentProgress()).findings
    with open_checkpoint(tmp_path / "out") as one, open_checkpoint(lone) as other:
        for expert in range(3):
            for matrix in ("w1", "w2", "w3"):
                module = f"{EXPERTS}.{expert}.{matrix}"
                assert torch.equal(read_dense(one, module), read_dense(other, module))


def test_not_a_number_ends_a_conversion(lone: Path, tmp_path: Path) -> None:
    def spoil(name: str, values: np.ndarray) -> None:  # type: ignore[type-arg]
        if name == "blk.3.ffn_up_exps.weight":
            values[1, 0, 0] = np.nan

    types = lambda n: Type.F32 if "_exps" in n else None  # noqa: E731
    source = rewrite(lone, tmp_path / "a.gguf", types, spoil=spoil)
    with pytest.raises(V4QuantError, match=rf"{EXPERTS}\.1\.w3.*NaN"):
        convert(source, tmp_path / "out", "int8-g32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, whose rows hold whole blocks of every type."""
    folder = tmp_path_factory.mktemp("wide")
    convert(resolve_source("builtin:tiny-v4"), folder, Recipe("mxfp4", format="gguf", draft="drop"))
    return folder / "tiny-v4-MXFP4.gguf"


READ = sorted(kind.dtype for kind in GGML_TYPES.values())
LEFT = sorted({t.name for t in gguf.GGML_QUANT_SIZES if t.name.startswith(("Q", "TQ", "NV"))}
              - {*READ, "Q8_K", "Q8_1"})  # fmt: skip


def of_type(wide: Path, out: Path, dtype: str) -> Path:
    """Experts of a type, all bytes zero."""
    return rewrite(wide, out, lambda n: Type[dtype] if "_exps" in n else None, zeros=True)


@pytest.mark.parametrize("dtype", [d for d in READ if d in Type.__members__])
def test_every_type_read_here_is_a_source(dtype: str, wide: Path, tmp_path: Path) -> None:
    with open_checkpoint(of_type(wide, tmp_path / "a.gguf", dtype)) as opened:
        require_sound(opened)
        values = read_dense(opened, f"{EXPERTS}.2.w1")
        raw = opened.read(f"{EXPERTS}.2.w1.weight").view(torch.uint8).numpy()
    wanted = gguf.quants.dequantize(raw.reshape(values.shape[0], -1), Type[dtype])
    assert np.array_equal(values.numpy(), wanted)


@pytest.mark.parametrize("dtype", LEFT)
def test_no_other_type_is_called_damaged(dtype: str, wide: Path, tmp_path: Path) -> None:
    source = of_type(wide, tmp_path / "a.gguf", dtype)
    told = f"{dtype}, which is not readable here"
    with open_checkpoint(source) as opened, pytest.raises(WrongDtype, match=told):
        require_sound(opened)


def test_what_lies_beside_a_model(lone: Path, tmp_path: Path) -> None:
    """An adapter is named, copies of a file system's own are no files, big-endian is refused."""
    model = tmp_path / lone.name
    model.write_bytes(lone.read_bytes())
    (tmp_path / f"._{lone.name}").write_bytes(b"\0\5\26\7" + bytes(60))
    with open_checkpoint(tmp_path) as opened:
        assert list(opened.files) == [lone.name]
    writer = GGUFWriter(tmp_path / "lora.gguf", "deepseek4")
    writer.add_string("general.type", "adapter")
    writer.add_tensor("blk.0.attn_q_a.weight.lora_a", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnexpectedTensor, match="adapter that was not merged"):
        open_checkpoint(tmp_path)
    data = lone.read_bytes()
    model.write_bytes(data[:4] + data[4:8][::-1] + data[8:])
    with pytest.raises(FormatError, match="big-endian"):
        open_checkpoint(model)
