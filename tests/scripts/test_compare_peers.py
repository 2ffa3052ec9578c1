"""The comparison with other quantizers: what is stored, and how their weights get in."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.conversion import convert
from tests.support.scripts import load_script
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense

TINY_A = Path(__file__).parents[1] / "data" / "tiny-a"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("compare_peers")


def test_the_page_is_that_of_the_stored_figures(script: ModuleType) -> None:
    found = json.loads(script.STORED.read_text())
    assert script.PAGE.read_text() == script.page(found)
    for row in found["rows"]:
        assert row["kl"] > 2 * found["floor_kl"] and row["versions"]
    assert len({row["who"] for row in found["rows"]}) >= 2


def test_experts_take_their_places(script: ModuleType, tmp_path: Path) -> None:
    convert(TINY_A, tmp_path / "bf16", "bf16")
    with open_checkpoint(tmp_path / "bf16") as plain:
        config = parse_model_config(dict(plain.config), "config.json")
        theirs = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        found = {}
        for layer in range(config.num_hidden_layers):
            for expert in range(config.n_routed_experts):
                for ours, name in theirs.items():
                    shape = plain.spec(f"layers.{layer}.ffn.experts.{expert}.{ours}.weight").shape
                    key = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                    found[key] = torch.randn(shape)
        script.put_experts(plain, found, tmp_path / "theirs", config)
        with open_checkpoint(tmp_path / "theirs") as out:
            for key, value in found.items():
                _, _, layer, _, _, expert, name = key.split(".")
                ours = next(p for p, n in theirs.items() if n == name)
                held = read_dense(out, f"layers.{layer}.ffn.experts.{expert}.{ours}")
                assert torch.equal(held, value), key
            shared = "layers.0.ffn.shared_experts.w1"
            assert torch.equal(read_dense(out, shared), read_dense(plain, shared))
        del found["model.layers.0.mlp.experts.1.up_proj"]
        with pytest.raises(script.PeerFailed, match="1 matrices are missing"):
            script.put_experts(plain, found, tmp_path / "again", config)
