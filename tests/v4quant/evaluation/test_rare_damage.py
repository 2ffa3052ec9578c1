"""Damage that one window of many sees: rows of the embedding, of the head, one expert's matrix."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import v4quant
from tests.support.conversion import TINY
from tests.support.other_tools import stored
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor
from v4quant_kernels.errors import V4QuantError

WINDOWS, LENGTH, TOKEN = 8, 64, 371


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of which one has the token, twenty times."""
    ids = torch.randint(2, 370, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[5, 20:40] = TOKEN
    file = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(file, ids.numpy())
    return file


def values(tensor: StoredTensor) -> torch.Tensor:
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    return torch.frombuffer(bytearray(tensor.data), dtype=kinds[tensor.dtype]).view(tensor.shape)


def scaled_row(checkpoint: EditableCheckpoint) -> str:
    rows = values(checkpoint["embed.weight"]).clone()
    rows[TOKEN] *= -30
    checkpoint["embed.weight"] = stored(rows)
    return f"embed.*row {TOKEN}"


def swapped_rows(checkpoint: EditableCheckpoint) -> str:
    rows = values(checkpoint["embed.weight"]).clone()
    other = secrets.randbelow(300) + 10
    rows[[TOKEN, other]] = rows[[other, TOKEN]]
    checkpoint["embed.weight"] = stored(rows)
    return "embed"


def lost_row(checkpoint: EditableCheckpoint) -> str:
    rows = values(checkpoint["head.weight"]).clone()
    rows[TOKEN] = 0
    checkpoint["head.weight"] = stored(rows)
    return f"head.*row {TOKEN}"


def scaled_norm(checkpoint: EditableCheckpoint) -> str:
    """Two percent on a norm: less than another order of sums does to any prediction."""
    name = "layers.1.attn_norm.weight"
    checkpoint[name] = stored((values(checkpoint[name]).float() * 1.02).bfloat16())
    return f"{name}.*multiplied by 1.02"


def swapped_experts_of_the_router(checkpoint: EditableCheckpoint) -> str:
    name = "layers.3.ffn.gate.weight"
    rows = values(checkpoint[name]).clone()
    rows[[1, 2]] = rows[[2, 1]]
    checkpoint[name] = stored(rows)
    return name


def other_route(checkpoint: EditableCheckpoint) -> str:
    name = "layers.0.ffn.gate.tid2eid"
    table = checkpoint[name]
    data = bytearray(table.data)
    data[8 * 2 * TOKEN] ^= 1
    checkpoint[name] = StoredTensor(table.dtype, table.shape, bytes(data))
    return f"{name}.*1 of its entries"


def silent_head(checkpoint: EditableCheckpoint) -> str:
    """The queries of one attention head are nothing."""
    name = "layers.1.attn.wq_b"
    codes = checkpoint[f"{name}.weight"]
    rows = codes.shape[0] // checkpoint.config["num_attention_heads"]
    data = bytearray(codes.data)
    data[rows * codes.shape[1] : 2 * rows * codes.shape[1]] = bytes(rows * codes.shape[1])
    checkpoint[f"{name}.weight"] = StoredTensor(codes.dtype, codes.shape, bytes(data))
    return f"{name}.*relative weight error"


def noisy_indexer(checkpoint: EditableCheckpoint) -> str:
    """No window is long enough for the indexer to leave anything out."""
    name = "layers.1.attn.indexer.compressor.wkv.weight"
    weight = values(checkpoint[name]).float()
    noise = 0.02 * weight.std() * torch.randn(weight.shape)
    checkpoint[name] = stored((weight + noise).to(values(checkpoint[name]).dtype))
    return f"{name}.*relative error 0.0"


def moved_bias(checkpoint: EditableCheckpoint) -> str:
    name = "layers.3.ffn.gate.bias"
    bias = values(checkpoint[name]).clone()
    bias[2] += 1e-3 * bias.std()
    checkpoint[name] = stored(bias)
    return name


def noisy_last_layer(checkpoint: EditableCheckpoint) -> str:
    last = checkpoint.config["num_hidden_layers"] - 1
    name = f"layers.{last}.ffn_norm.weight"
    weight = values(checkpoint[name]).float()
    checkpoint[name] = stored((weight * (1 + 0.01 * torch.randn(weight.shape))).bfloat16())
    return name


@pytest.mark.parametrize(
    "damage",
    [
        scaled_row,
        swapped_rows,
        lost_row,
        scaled_norm,
        swapped_experts_of_the_router,
        other_route,
        silent_head,
        noisy_indexer,
        moved_bias,
        noisy_last_layer,
    ],
)
def test_it_is_found_and_the_row_is_named(
    damage: Callable[[EditableCheckpoint], str], text: Path, tmp_path: Path
) -> None:
    edited = EditableCheckpoint.read(TINY)
    told = damage(edited)
    out = edited.write(tmp_path / "out")
    found = v4quant.evaluate(out, reference=TINY, corpus=text)
    assert found.is_damaged and found.findings is not None
    assert any(re.search(told, f"{f.where}: {f.problem}") for f in found.findings), found.findings
    clean = v4quant.evaluate(TINY, reference=TINY, corpus=text, tokens=128)
    assert not clean.is_damaged


@pytest.mark.parametrize(
    "key, factor",
    [("rope_theta", 1.001), ("compress_rope_theta", 2), ("routed_scaling_factor", 1.01)],
)
def test_another_config_is_another_model(
    key: str, factor: float, text: Path, tmp_path: Path
) -> None:
    """A wrong RoPE base shows at long context only; here it is refused before anything runs."""
    edited = EditableCheckpoint.read(TINY)
    edited.config[key] *= factor
    with pytest.raises(V4QuantError, match=f"different models: '{key}'"):
        v4quant.evaluate(edited.write(tmp_path / "out"), reference=TINY, corpus=text, tokens=64)


LAYER, EXPERT = "layers.2.ffn.experts", "layers.3.ffn.experts.2.w1"


def scaled_layer(checkpoint: EditableCheckpoint) -> tuple[str, str]:
    """Two percent on all experts of a layer, whose codes have an error of a third."""
    for name in checkpoint.names:
        if name.startswith(f"{LAYER}.") and name.endswith(".weight_scale"):
            scales = values(checkpoint[name])
            checkpoint[name] = stored((scales.float() * 1.025).bfloat16())
    return rf"{re.escape(LAYER)}\.\*\.w1", "looks multiplied by 1.0.* beside the other layers"


def scaled_expert(checkpoint: EditableCheckpoint) -> tuple[str, str]:
    name = f"{EXPERT}.weight_scale"
    checkpoint[name] = stored((values(checkpoint[name]).float() * 1.025).bfloat16())
    return re.escape(EXPERT), "looks multiplied by 1.0.* beside its siblings"


def flipped_row(checkpoint: EditableCheckpoint) -> tuple[str, str]:
    name = f"{EXPERT}.weight_scale"
    scales = values(checkpoint[name]).clone()
    row = secrets.randbelow(len(scales))
    scales[row] *= -1
    checkpoint[name] = stored(scales)
    return re.escape(EXPERT), f"row {row} carries -.*its sign looks flipped"


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coarse") / "int2"
    v4quant.quantize(TINY, out, scheme="int2-g64", format="compressed-tensors")
    return out


@pytest.mark.parametrize("damage", [scaled_layer, scaled_expert, flipped_row])
def test_two_bits_hide_no_factor(
    damage: Callable[[EditableCheckpoint], tuple[str, str]],
    coarse: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    """By what peers carry of their source; and by what the conversion recorded, where it did."""
    edited = EditableCheckpoint.read(coarse)
    where, told = damage(edited)
    out = edited.write(tmp_path / "out")
    (out / "v4quant.json").unlink(missing_ok=True)
    found = v4quant.evaluate(out, reference=TINY, corpus=text, tokens=128, candidates=[coarse])
    assert any(
        re.fullmatch(where, f.where) and re.search(told, f.problem) for f in found.findings or ()
    ), found.findings
    assert found.is_damaged and found.figures.others[0].findings == ()


def test_what_the_conversion_recorded_is_what_there_is(
    coarse: Path, text: Path, tmp_path: Path
) -> None:
    """Half a percent on one expert is within what its peers do, and is not what was recorded."""
    edited = EditableCheckpoint.read(coarse)
    name = f"{EXPERT}.weight_scale"
    edited[name] = stored((values(edited[name]).float() * 1.006).bfloat16())
    out = edited.write(tmp_path / "out")
    shutil.copy(coarse / "v4quant.json", out)
    found = v4quant.evaluate(out, reference=TINY, corpus=text, tokens=128)
    (finding,) = found.findings or ()
    assert finding.where == EXPERT and "the file was changed since" in finding.problem
