"""inspect: what a checkpoint is, and all of its defects at once."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.conversion import SCHEMES, TINY
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.checks.inspection import Inspection, inspect_checkpoint
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

EXPERT = "layers.1.ffn.experts.2.w1"


def inspect(folder: Path, deep: bool = False) -> Inspection:
    with open_checkpoint(folder) as checkpoint:
        return inspect_checkpoint(checkpoint, SilentProgress(), deep)


@pytest.fixture
def edited() -> EditableCheckpoint:
    return EditableCheckpoint.read(TINY)


def test_the_tiny_checkpoint(edited: EditableCheckpoint) -> None:
    found = inspect(TINY, deep=True)
    assert found.defects == []
    assert (found.release, found.files, found.draft_stages) == ("V4", 2, ["mtp.0"])
    assert found.layer_kinds == {"swa": 1, "csa": 2, "hca": 1}
    assert (found.experts, found.experts_per_token, found.hash_layers) == (4, 2, 1)
    # Two CSA layers (2 * 128 bytes of entry and of key every 4 tokens) and one HCA (every 128).
    assert found.kv_bytes_per_token == 2 * (64 + 64) + 2
    assert found.scales is not None
    bytes_ = [
        b - 127
        for shard in edited.shards.values()
        for name, t in shard.items()
        if ".experts." in name and name.endswith(".scale")
        for b in t.data
    ]
    assert (found.scales.lowest, found.scales.highest) == (min(bytes_), max(bytes_))
    assert found.scales.matrices == 60
    assert inspect(TINY).scales is None, "data is read only when asked"


@pytest.mark.parametrize("scheme", ["source", *SCHEMES])
def test_classes_add_up(scheme: str, converted: Callable[[str], Path]) -> None:
    folder = TINY if scheme == "source" else converted(scheme)
    found = inspect(folder, deep=True)
    assert found.defects == []
    assert sum(c.nbytes for c in found.classes) == found.nbytes
    assert sum(c.tensors for c in found.classes) == found.tensors
    assert all(sum(c.formats.values()) == c.weights for c in found.classes)
    sizes = [c.nbytes for c in found.classes]
    assert sizes == sorted(sizes, reverse=True)
    experts = next(c for c in found.classes if c.role == "routed experts")
    assert experts.weights == 4 * 4 * 3 * 128 * 128
    bits = {"source": 4.25, "mxfp4": 4.25, "int4-g32": 4.5, "int8-g128": 8.125, "nvfp4": 4.5}
    if scheme in bits:
        # int packs add 16 bytes of shape, nvfp4 8 bytes of scalars a matrix.
        assert experts.bits_per_weight == pytest.approx(bits[scheme], abs=0.02)


def test_all_defects_are_listed(edited: EditableCheckpoint, tmp_path: Path) -> None:
    edited.remove("layers.0.attn.wq_a.scale")
    edited.remove("layers.2.attn_norm.weight")
    edited.add("backdoor", "F32", (1,), bytes(4))
    edited["norm.weight"].shape = (2, 64)
    edited[f"{EXPERT}.scale"].shape = (64, 8)
    found = inspect(edited.write(tmp_path), deep=True)
    text = "\n".join(found.defects)
    for part in ("layers.0.attn.wq_a.scale", "'layers.2.attn_norm' is missing", "'backdoor'",
                 "'norm' has shape [2, 64]", f"{EXPERT}.scale"):  # fmt: skip
        assert part in text, part
    assert len(found.defects) >= 5


def test_config_that_does_not_parse_is_a_defect(edited: EditableCheckpoint, tmp_path: Path) -> None:
    edited.config = {"model_type": ["deepseek_v4"], "n_routed_experts": "many"}
    found = inspect(edited.write(tmp_path), deep=True)
    assert found.kv_bytes_per_token is None and found.layer_kinds == {}
    assert len(found.defects) == 1 and "config.json" in found.defects[0]
    assert sum(c.nbytes for c in found.classes) == found.nbytes


def put(edited: EditableCheckpoint, name: str, at: int, data: bytes) -> None:
    old = edited[name].data
    edited[name].data = old[:at] + data + old[at + len(data) :]


def test_deep_reads_every_value(edited: EditableCheckpoint, tmp_path: Path) -> None:
    put(edited, "layers.1.ffn.gate.bias", 4, b"\x00\x00\xc0\x7f")
    put(edited, "norm.weight", 254, b"\x80\x7f")  # infinity in the last element
    put(edited, f"{EXPERT}.scale", 9, b"\xff")
    put(edited, "layers.0.attn.wq_a.weight", 77, b"\xff")
    put(edited, "layers.0.attn.wkv.scale", 0, b"\xff")
    folder = edited.write(tmp_path)
    assert inspect(folder).defects == [], "headers alone cannot tell"
    text = "\n".join(found := inspect(folder, deep=True).defects)
    for name in ("layers.1.ffn.gate.bias", "'norm.weight'", f"{EXPERT}.scale",
                 "layers.0.attn.wq_a.weight", "layers.0.attn.wkv.scale"):  # fmt: skip
        assert name in text, name
    assert len(found) == 5


@pytest.mark.parametrize(("value", "bad"), [(3, False), (4, True), (-1, True), (2**62, True)])
def test_routing_tables_out_of_range(
    value: int, bad: bool, edited: EditableCheckpoint, tmp_path: Path
) -> None:
    put(edited, "layers.0.ffn.gate.tid2eid", 8 * 700, torch.tensor([value]).numpy().tobytes())
    defects = inspect(edited.write(tmp_path), deep=True).defects
    assert bool(defects) == bad
    if bad:
        assert "tid2eid" in defects[0] and str(value) in defects[0]


def test_spreads_say_when_casts_are_exact(edited: EditableCheckpoint, tmp_path: Path) -> None:
    """A group 15 octaves below its tile, and another row's 18 below the matrix's top."""
    scale = edited[f"{EXPERT}.scale"]
    top = max(scale.data)
    scale.data = bytes([top] * 8 + [top - 15] + [top - 18] * 2) + scale.data[11:]
    found = inspect(edited.write(tmp_path), deep=True)
    assert found.scales is not None
    assert (found.scales.span_fp8, found.scales.span_nvfp4) == (18, 18)


def test_many_defects_are_cut(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "x")
    edited = EditableCheckpoint.read(TINY)
    for i in range(1500):
        edited.add(f"junk.{i}", "U8", (1,), b"x")
    found = inspect(edited.write(tmp_path / "x"))
    assert len(found.defects) == 1000
    assert Counter(c.role for c in found.classes)["unknown"] == 1
