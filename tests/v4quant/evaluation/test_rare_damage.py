"""Damage that one window of many sees: rows of the embedding, of the head, one expert's matrix."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import v4quant
from tests.support.conversion import TINY
from tests.support.other_tools import stored
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor

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


@pytest.mark.parametrize(
    "damage",
    [
        scaled_row,
        swapped_rows,
        lost_row,
        scaled_norm,
        swapped_experts_of_the_router,
        other_route,
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
