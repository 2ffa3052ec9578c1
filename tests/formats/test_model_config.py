"""config.json: what Flash and Pro say, and that nothing is guessed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.configs import FLASH, PRO
from tests.support.conversion import TINY
from v4quant_formats.json_object import read_json_object
from v4quant_formats.model_config import ConfigError, load_model_config, parse_model_config


def test_flash_and_pro() -> None:
    flash, pro = parse_model_config(FLASH), parse_model_config(PRO)
    assert (flash.kv_bytes_per_token(), pro.kv_bytes_per_token()) == (6880, 9848)
    kinds = [Counter(layer.kind for layer in c.layers) for c in (flash, pro)]
    assert kinds == [{"swa": 2, "csa": 21, "hca": 20}, {"csa": 30, "hca": 31}]
    assert flash.yarn is not None and flash.yarn.factor == 16.0
    assert (flash.hidden_size, pro.n_routed_experts, pro.index_topk) == (4096, 384, 1024)


def test_tiny_checkpoint() -> None:
    config = load_model_config(TINY)
    assert (config.num_hidden_layers, config.n_routed_experts) == (4, 4)
    assert [layer.kind for layer in config.layers] == ["swa", "csa", "hca", "csa"]


REQUIRED = [
    k for k in FLASH
    if k not in ("architectures", "model_type", "num_key_value_heads", "n_shared_experts",
                 "scoring_func", "max_position_embeddings", "num_nextn_predict_layers",
                 "bos_token_id", "eos_token_id", "rope_scaling")
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_every_missing_field_is_named(key: str) -> None:
    config = {k: v for k, v in FLASH.items() if k != key}
    with pytest.raises(ConfigError, match=f"here.json: '{key}'"):
        parse_model_config(config, "here.json")


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize(
    "value", [None, True, "6", -1, [], {}, float("nan"), float("inf"), 10**40], ids=repr
)
def test_wrong_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        parse_model_config({**FLASH, key: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_experts_per_tok": 257}, "num_experts_per_tok > n_routed_experts"),
        ({"o_groups": 7}, "not divisible by o_groups"),
        ({"qk_rope_head_dim": 1024}, "qk_rope_head_dim > head_dim"),
        ({"qk_rope_head_dim": 63}, "odd"),
        ({"num_hash_layers": 44}, "num_hash_layers > num_hidden_layers"),
        ({"compress_ratios": [0, 3] * 22}, "compress_ratios"),
        ({"compress_ratios": [0] * 42}, "compress_ratios"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "beta_fast"),
    ],
)
def test_contradictions(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_model_config({**FLASH, **changes})


def test_json_objects_only(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="missing"):
        read_json_object(path)
    path.write_text(json.dumps({"a": [[[1]]]}))
    assert read_json_object(path) == {"a": [[[1]]]}
    with pytest.raises(ConfigError, match="limit of 3"):
        read_json_object(path, limit=3)
    path.write_text('{"a":' + "[" * 70 + "]" * 70 + "}")
    with pytest.raises(ConfigError, match="nested deeper"):
        read_json_object(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="list"):
        read_json_object(path)
