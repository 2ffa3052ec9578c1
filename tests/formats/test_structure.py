"""Every tensor is accounted for before any verb begins, and what is not is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY
from tests.support.other_tools import decode, stored
from tests.support.shard_bytes import EditableCheckpoint
from tests.support.synthetic import RELEASES, make_small
from v4quant.checks.diff import diff_checkpoints
from v4quant.checks.soundness import require_sound
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant_formats.errors import MissingTensor, UnexpectedTensor, WrongDtype
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight
from v4quant_formats.structure import find_defects
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress

Edit = Callable[[EditableCheckpoint], object]
EXPERT = "layers.2.ffn.experts.1.w2"
V41 = TINY.parent / "v41-tiny"
TABLE = "layers.0.ffn.gate.tid2eid"


def add(name: str, shape: tuple[int, ...] = (8, 8)) -> Edit:
    return lambda c: c.add(name, *_zeros(shape))


def _zeros(shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], bytes]:
    value = stored(torch.zeros(shape, dtype=torch.bfloat16))
    return value.dtype, value.shape, value.data


def remove(*parts: str) -> Edit:
    def edit(c: EditableCheckpoint) -> None:
        for name in [n for n in c.names if any(p in n for p in parts)]:
            c.remove(name)

    return edit


def table(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(c: EditableCheckpoint) -> None:
        ids = torch.frombuffer(bytearray(c[TABLE].data), dtype=torch.int64).view(c[TABLE].shape)
        c[TABLE] = stored(change(ids.clone()))

    return edit


def put(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(ids: torch.Tensor) -> torch.Tensor:
        ids[77, 1] = value if value != 99 else ids[77, 0]
        return ids

    return change


def second_stage(c: EditableCheckpoint) -> None:
    """mtp.0 becomes mtp.1: a chain with a hole."""
    for name in [n for n in c.names if n.startswith("mtp.0.")]:
        c.rename(name, name.replace("mtp.0.", "mtp.1."))


DEFECTS: list[tuple[str, Edit, type[V4QuantError], str]] = [
    ("adapter", add("layers.2.attn.wq_a.lora_A.weight"), UnexpectedTensor, "adapter.*--adapter"),
    ("DoRA", add("layers.2.attn.wq_a.lora_magnitude_vector"), UnexpectedTensor, "adapter"),
    ("bias of a matrix", add("layers.2.attn.wq_b.bias", (8,)), UnexpectedTensor, "bias"),
    ("bias of an expert", add(f"{EXPERT}.bias", (8,)), UnexpectedTensor, "bias"),
    ("rotation", add("layers.2.attn.R1.rotation"), UnexpectedTensor, "transform"),
    ("smoothing", add(f"{EXPERT}.pre_quant_scale", (8,)), UnexpectedTensor, "transform"),
    ("zero points beside FP4", add(f"{EXPERT}.weight_zero_point"), WrongDtype, "zero_point"),
    ("group index beside FP4", add(f"{EXPERT}.g_idx", (8,)), WrongDtype, "g_idx"),
    ("compressor of a window layer", add("layers.0.attn.compressor.wkv.weight"),
     V4QuantError, "no such module|implies"),
    ("bias of a hashed router", add("layers.0.ffn.gate.bias", (4,)), UnexpectedTensor,
     "no such module"),
    ("expert too many", add("layers.2.ffn.experts.4.w1.weight"), V4QuantError, "no such|implies"),
    ("half a draft stage", remove("mtp.0.h_proj"), MissingTensor, "mtp.0.h_proj"),
    ("draft experts missing", remove("mtp.0.ffn.experts.3."), MissingTensor, "experts.3"),
    ("a hole in the chain", second_stage, MissingTensor, "without mtp.0"),
    ("stale table", table(put(4)), WrongDtype, "0 to 4 of 4"),
    ("negative id", table(put(-1)), WrongDtype, "-1 to"),
    ("fewer experts in one layer", remove("layers.2.ffn.experts.3."), MissingTensor, "experts.3"),
    ("other compression", lambda c: c.config.update(compress_ratios=[0, 4, 128, 0, 0]),
     V4QuantError, "compressor|indexer"),
    ("fewer hash layers", lambda c: c.config.update(num_hash_layers=0), V4QuantError, "gate"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "kind", "text"), DEFECTS, ids=[d[0] for d in DEFECTS])
def test_no_verb_passes_over_it(
    name: str, edit: Edit, kind: type[V4QuantError], text: str, tmp_path: Path
) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    edit(checkpoint)
    folder = checkpoint.write(tmp_path)
    with open_checkpoint(folder) as opened, open_checkpoint(TINY) as right:
        with pytest.raises(kind, match=text):
            require_sound(opened)
        with pytest.raises(kind, match=text):
            make_plan(opened, Recipe("int4-g32"))
        found = diff_checkpoints(right, opened, SilentProgress(), samples=1)
        assert not found.same and any(d.startswith("B: ") for d in found.defects)


def test_every_release_is_sound(tmp_path: Path) -> None:
    for release in RELEASES:
        with open_checkpoint(make_small(tmp_path / release, release)) as opened:
            assert find_defects(opened).defects == (), release


def test_a_half_stage_may_be_left_out(tmp_path: Path) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    remove("mtp.0.h_proj", "mtp.0.ffn.experts.3.w1")(checkpoint)
    with open_checkpoint(checkpoint.write(tmp_path)) as opened:
        plan = make_plan(opened, Recipe("int4-g32", draft="drop"))
        drafts = {n for n in checkpoint.names if n.startswith("mtp.")}
        assert {d.name for d in plan.dropped} == drafts
        assert plan.output_config()["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (remove("mtp."), "promises 1 draft stages, and there is none"),
        (lambda c: c.config.update(num_nextn_predict_layers=0), "promises no draft stage"),
        (lambda c: c.config.update(num_nextn_predict_layers=3), "promises 3 draft.* there is 1"),
        (lambda c: c.config.update(tie_word_embeddings=True), "a head of its own"),
        (table(put(99)), "twice for 1 tokens"),
        (lambda c: c.config.update(n_routed_experts=16), "says 16 routed experts.* has 4"),
        (lambda c: c.config.update(expert_dtype="fp8"), "expert_dtype 'fp8', but.*e2m1"),
        (lambda c: (said := c.config["quantization_config"], decode(c),
                    c.config.update(quantization_config=said)), "nothing is quantized"),
    ],
)  # fmt: skip
def test_the_tensors_decide(edit: Edit, text: str, tmp_path: Path) -> None:
    """What config.json says of the tensors against them is named, and put right in the output."""
    checkpoint = EditableCheckpoint.read(TINY)
    edit(checkpoint)
    with open_checkpoint(checkpoint.write(tmp_path)) as opened:
        notes = find_defects(opened).notes
        require_sound(opened)
        config = make_plan(opened, Recipe("mxfp4")).output_config()
    assert len(notes) == 1 and re.search(text, notes[0])
    has_drafts = any(n.startswith("mtp.") for n in checkpoint.names)
    assert config["num_nextn_predict_layers"] == int(has_drafts)
    assert config["expert_dtype"] == "fp4"


@pytest.mark.parametrize(
    ("scaling", "text"),
    [({"type": "linear", "rope_type": "yarn"}, "'rope_type' say different"),
     ({"type": "dynamic"}, "'dynamic' is not supported"), ({"mscale": 0.7}, "mscale 0.7"),
     ({"truncate": False}, "truncate False")],
)  # fmt: skip
def test_another_yarn_is_refused(scaling: dict[str, object], text: str, tmp_path: Path) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    checkpoint.config["rope_scaling"] |= scaling
    opened = open_checkpoint(checkpoint.write(tmp_path))
    with opened, pytest.raises(V4QuantError, match=text):
        require_sound(opened)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu"), ("scoring_func", "sigmoid"), ("norm_topk_prob", False),
     ("attention_bias", True), ("n_shared_experts", 2), ("topk_method", "greedy"),
     ("num_key_value_heads", 8), ("n_group", 8), ("first_k_dense_replace", 1)],
)  # fmt: skip
def test_another_arithmetic_is_refused(key: str, value: object, tmp_path: Path) -> None:
    for folder in (TINY, V41):
        checkpoint = EditableCheckpoint.read(folder)
        checkpoint.config.get("text_config", checkpoint.config)[key] = value
        written = checkpoint.write(tmp_path / folder.name)
        refused = pytest.raises(V4QuantError, match=f"{key}.*another architecture")
        with open_checkpoint(written) as opened, refused:
            require_sound(opened)


def test_weights_beside_the_models_own_are_named(tmp_path: Path) -> None:
    folder = EditableCheckpoint.read(TINY).write(tmp_path / "model")
    shard = next(folder.glob("*.safetensors"))
    (folder / "model.safetensors").write_bytes(shard.read_bytes())
    (folder / "consolidated.safetensors").write_bytes(b"whatever it is")
    with open_checkpoint(folder) as opened:
        require_sound(opened)
        first, second = find_defects(opened).notes
        found = preflight(opened, "transformers")
    assert "consolidated.safetensors lies beside" in first
    assert "model.safetensors lies beside" in second and "transformers loads it" in second
    assert not found.loads and any(f.rule == "stray" for f in found.findings)
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(shard.read_bytes())
    refused = pytest.raises(UnexpectedTensor, match="adapter that was not merged")
    with open_checkpoint(folder) as opened, refused:
        require_sound(opened)


def test_unknown_tensors_that_were_copied_are_expected(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "out")
    checkpoint = EditableCheckpoint.read(TINY)
    checkpoint.add("extra.table", "U8", (3,), b"abc")
    folder = checkpoint.write(tmp_path / "out")
    with open_checkpoint(folder) as opened:
        with pytest.raises(UnexpectedTensor, match="extra"):
            require_sound(opened)
        manifest = {
            "manifest_version": 1,
            "files": [],
            "tensors": [],
            "recipe": {"unknown": "copy"},
        }
        (folder / "v4quant.json").write_text(json.dumps(manifest))
        require_sound(opened)
