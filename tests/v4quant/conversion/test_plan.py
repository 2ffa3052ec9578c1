"""Plans: everything accounted for, sizes true, every defect of a source found before writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.conversion import SCHEMES, TINY, convert, recipe_of
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import MissingTensor, UnexpectedTensor, UnsupportedPair, WrongDtype
from v4quant_formats.model_config import ConfigError
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.safetensors_header import read_header
from v4quant_kernels.errors import NonFiniteWeight, V4QuantError

Edit = Callable[[EditableCheckpoint], object]
EXPERT = "layers.1.ffn.experts.2.w1"


def account(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Every source tensor is in exactly one unit or dropped."""
    plan = make_plan(checkpoint, recipe)
    used = Counter(p.name for u in plan.units for s in u.sources for p in s.parts.values())
    used.update(d.name for d in plan.dropped)
    assert used == Counter(list(checkpoint.tensors))
    outputs = [spec.name for shard in plan.shards for spec in shard.outputs]
    assert len(outputs) == len(set(outputs))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("draft", ["convert", "drop"])
def test_every_source_tensor_is_accounted_for(scheme: str, draft: str) -> None:
    with open_checkpoint(TINY) as checkpoint:
        account(checkpoint, replace(recipe_of(scheme), draft=draft))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sizes_are_what_will_be_written(scheme: str, converted: Callable[[str], Path]) -> None:
    with open_checkpoint(TINY) as checkpoint:
        plan = make_plan(checkpoint, recipe_of(scheme))
    for shard in plan.shards:
        path = converted(scheme) / shard.file
        assert path.stat().st_size == shard.nbytes
        header = read_header(path)
        assert {(s.name, s.dtype, s.shape) for s in shard.outputs} == {
            (s.name, s.dtype, s.shape) for s in header.values()
        }
    assert plan.bytes_out == sum(s.nbytes for s in plan.shards)
    assert plan.bytes_in == checkpoint.nbytes


def test_planning_reads_no_tensor_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("data was read")

    with open_checkpoint(TINY) as checkpoint:
        monkeypatch.setattr(Checkpoint, "_read_bytes", forbidden)
        for scheme in SCHEMES:
            make_plan(checkpoint, recipe_of(scheme))


def test_digest_keys_source_recipe_and_stats(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited.config["eos_token_id"] = 5
    other = edited.write(tmp_path)
    seen = set()
    for folder in (TINY, other):
        with open_checkpoint(folder) as checkpoint:
            for recipe in (Recipe("fp8"), Recipe("fp8", draft="drop"), Recipe("nvfp4")):
                for stats in ("", "x"):
                    seen.add(make_plan(checkpoint, recipe, stats).digest)
    assert len(seen) == 12


def set_data(name: str, data: bytes) -> Edit:
    def edit(c: EditableCheckpoint) -> None:
        old = c[name]
        old.data = data.ljust(len(old.data), b"\0") if len(data) < len(old.data) else data

    return edit


def reshape(name: str, dtype: str, shape: tuple[int, ...], size: int) -> Edit:
    def edit(c: EditableCheckpoint) -> None:
        c[name].dtype, c[name].shape, c[name].data = dtype, shape, bytes(size)

    return edit


def drop_experts_w1_w3(c: EditableCheckpoint) -> None:
    """A stray w2 of an expert the model does not have."""
    c.add("layers.0.ffn.experts.9.w2.weight", "I8", (128, 64), bytes(128 * 64))
    c.add("layers.0.ffn.experts.9.w2.scale", "F8_E8M0", (128, 4), bytes(128 * 4))


DEFECTS: list[tuple[str, str, Edit, type[V4QuantError], str]] = [
    ("missing scale", "int4-g32", lambda c: c.remove(f"{EXPERT}.scale"), MissingTensor,
     rf"'{EXPERT}\.scale'.*cannot be decoded"),
    ("missing dense scale", "int4-g32", lambda c: c.remove("layers.0.attn.wq_a.scale"),
     MissingTensor, r"layers\.0\.attn\.wq_a\.scale"),
    ("missing weight", "int4-g32", lambda c: c.remove(f"{EXPERT}.weight"), MissingTensor,
     rf"'{EXPERT}\.weight'"),
    ("missing norm", "fp8", lambda c: c.remove("layers.2.attn_norm.weight"), MissingTensor,
     r"layers\.2\.attn_norm.*config\.json requires"),
    ("missing routing table", "fp8", lambda c: c.remove("layers.0.ffn.gate.tid2eid"),
     MissingTensor, "tid2eid"),
    ("missing expert", "fp8", lambda c: (c.remove(f"{EXPERT}.weight"), c.remove(f"{EXPERT}.scale")),
     MissingTensor, EXPERT),
    ("unknown tensor", "fp8", lambda c: c.add("backdoor.weight", "F32", (1,), bytes(4)),
     UnexpectedTensor, r"'backdoor\.weight'.*--unknown copy"),
    ("second spelling", "fp8",
     lambda c: c.add("layers.00.attn_norm.weight", "BF16", (128,), bytes(256)),
     UnexpectedTensor, r"layers\.00"),
    ("layer too many", "fp8",
     lambda c: c.add("layers.4.attn_norm.weight", "BF16", (128,), bytes(256)),
     UnexpectedTensor, r"layers\.4\.attn_norm.*4 layers"),
    ("stray expert part", "fp8", drop_experts_w1_w3, UnexpectedTensor, r"experts\.9\.w2"),
    ("weight and no-part twin", "fp8", lambda c: c.add("norm", "BF16", (128,), bytes(256)),
     WrongDtype, "'norm'"),
    ("wrong shape", "fp8", reshape("norm.weight", "BF16", (64,), 128), WrongDtype,
     r"'norm' has shape \[64\].*\[128\]"),
    ("transposed expert", "fp8", reshape(f"{EXPERT}.weight", "I8", (64, 128), 8192), WrongDtype,
     EXPERT),
    ("config of another width", "fp8", lambda c: c.config.update(hidden_size=256), WrongDtype,
     "different models"),
    ("routing table of floats", "fp8", reshape("layers.0.ffn.gate.tid2eid", "F32", (384, 2), 3072),
     WrongDtype, r"tid2eid.*F32, expected I64"),
    ("norm of integers", "fp8", reshape("layers.0.attn.attn_sink", "I32", (2,), 8), WrongDtype,
     r"attn_sink.*I32, expected a float"),
    ("norm of bytes", "fp8", reshape("layers.0.attn.attn_sink", "U8", (2,), 2), WrongDtype,
     r"attn_sink.*U8"),
    ("scale of a wrong shape", "fp8", reshape(f"{EXPERT}.scale", "F8_E8M0", (128, 2), 256),
     WrongDtype, EXPERT),
    ("config without a field", "fp8", lambda c: c.config.pop("swiglu_limit"), ConfigError,
     "swiglu_limit"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scheme", "edit", "kind", "text"), DEFECTS, ids=[d[0] for d in DEFECTS]
)
def test_defects_stop_the_plan(
    name: str, scheme: str, edit: Edit, kind: type[V4QuantError], text: str, tmp_path: Path
) -> None:
    edited = EditableCheckpoint.read(TINY)
    edit(edited)
    folder = edited.write(tmp_path / "source")
    with pytest.raises(kind, match=text) as caught:
        convert(folder, tmp_path / "out", scheme)
    assert caught.type is kind and str(caught.value).isprintable()
    assert str(folder) in str(caught.value) or ".safetensors" in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing may look like a result"


def test_unknown_tensors_may_be_copied(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited.add("extra.table", "U8", (3,), b"abc")
    edited.add("extra.half", "F16", (1,), b"\0\x3c")
    folder = edited.write(tmp_path / "source")
    recipe = Recipe("int4-g32", unknown="copy")
    with open_checkpoint(folder) as checkpoint:
        account(checkpoint, recipe)
    convert(folder, tmp_path / "out", recipe)
    with open_checkpoint(tmp_path / "out") as output:
        assert bytes(output.read("extra.table").tolist()) == b"abc"
        assert output.read("extra.half").item() == 1.0
    edited.add("extra.odd", "F6_E2M3", (4,), b"abc")
    with pytest.raises(WrongDtype, match=r"extra\.odd F6_E2M3"):
        convert(edited.write(tmp_path / "again"), tmp_path / "out2", recipe)


def test_columns_must_be_whole_groups(tmp_path: Path) -> None:
    """An expert width of 96 fits groups of 32 only."""
    edited = EditableCheckpoint.read(TINY)
    edited.config["moe_intermediate_size"] = 96
    for shard in edited.shards.values():
        for name, tensor in shard.items():
            coded = ".experts." in name
            if coded or ".shared_experts." in name:
                rows, columns = (128, 96) if ".w2." in name else (96, 128)
                if name.endswith(".weight"):
                    tensor.shape = (rows, columns // 2) if coded else (rows, columns)
                else:
                    tensor.shape = (rows, columns // 32) if coded else (1, 1)
                tensor.data = tensor.data[: tensor.shape[0] * tensor.shape[1]]
    folder = edited.write(tmp_path / "source")
    for scheme in ("int4-g64", "int4-g128", "int8-g128"):
        with pytest.raises(UnsupportedPair, match=r"w2' has 96 input.*smaller group"):
            convert(folder, tmp_path / "out", scheme)
    for scheme in ("int4-g32", "int8-g32", "nvfp4", "fp8", "mxfp4"):
        with open_checkpoint(folder) as checkpoint:
            account(checkpoint, Recipe(scheme))
    convert(folder, tmp_path / "ok", "fp8")


def test_single_file_source_gets_an_index(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    everything = {n: t for shard in edited.shards.values() for n, t in shard.items()}
    edited.shards = {"model.safetensors": everything}
    folder = edited.write(tmp_path / "source")
    (folder / "model.safetensors.index.json").unlink()
    convert(folder, tmp_path / "out", "int4-g32")
    with open_checkpoint(tmp_path / "out") as output:
        assert set(output.files) == {"model-00001-of-00001.safetensors"}


NAN_BF16, NAN_F32 = b"\xc0\x7f", b"\x00\x00\xc0\x7f"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("norm.weight", NAN_BF16),
        ("layers.1.ffn.gate.bias", NAN_F32),
        ("layers.0.attn.wq_a.weight", b"\x7f"),
        ("layers.0.attn.wq_a.scale", b"\xff"),
        (f"{EXPERT}.scale", b"\xff"),
    ],
)
@pytest.mark.parametrize("scheme", ["mxfp4", "int4-g32", "fp8", "nvfp4"])
def test_values_that_are_no_numbers(name: str, data: bytes, scheme: str, tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited[name].data = data + edited[name].data[len(data) :]
    out = tmp_path / "out"
    with pytest.raises(NonFiniteWeight, match=name) as caught:
        convert(edited.write(tmp_path / "source"), out, scheme)
    assert str(tmp_path / "source") in str(caught.value)
    assert not (out / "model.safetensors.index.json").exists()
    assert not list(out.glob("*.part"))
    with pytest.raises(V4QuantError):
        open_checkpoint(out)


def test_finite_parts_whose_product_overflows(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited["layers.0.attn.wq_a.scale"].data = b"\xfe"
    with pytest.raises(NonFiniteWeight, match=r"layers\.0\.attn\.wq_a"):
        convert(edited.write(tmp_path / "source"), tmp_path / "out", "int4-g32")
