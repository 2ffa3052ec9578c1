"""What config.json declares falsely is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.conversion import TINY
from tests.support.shard_bytes import EditableCheckpoint
from v4quant_formats.model_config import ConfigError
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.structure import find_defects


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("quantization_config", None, "declares no quantization, but 104 matrices"),
        ("quantization_config", "fp8", "no object"),
        ("expert_dtype", "fp3", "expert_dtype 'fp3', but the experts are stored as e2m1"),
        ("model_type", "llama", "model_type is 'llama'"),
        ("rope_scaling", None, "no rope_scaling"),
        ("eos_token_id", 5000, "no token's number"),
        ("num_nextn_predict_layers", True, "no count"),
        ("model_type", "deepseek_v4x", "model_type is 'deepseek_v4x'"),
        ("architectures", ["LlamaForCausalLM"], "none of V4's"),
        ("torch_dtype", 7, "no dtype of weights"),
        ("swiglu_limit", 7.0, "every V4 release has 10"),
        ("rope_theta", 15000, "rope_theta is 15000, every V4 release has 10000"),
        ("hc_sinkhorn_iters", 21, "every V4 release has 20"),
        ("rms_norm_eps", 1e-5, "every V4 release has 1e-06"),
    ],
)
def test_statements_that_are_false_are_named(
    key: str, value: object, text: str, tmp_path: Path
) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    checkpoint.config[key] = value
    with open_checkpoint(checkpoint.write(tmp_path)) as opened:
        assert any(text in note for note in find_defects(opened).notes), find_defects(opened).notes


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("weight_block_size", [64, 64], r"the blocks are 128 x 128"),
        ("fmt", "e5m2", "says fmt 'e5m2', not e4m3"),
        ("activation_scheme", "static", "not dynamic"),
    ],
)
def test_what_is_said_of_blocks(key: str, value: object, text: str, tmp_path: Path) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    checkpoint.config["quantization_config"][key] = value
    with open_checkpoint(checkpoint.write(tmp_path)) as opened:
        assert any(text in note for note in find_defects(opened).notes), find_defects(opened).notes


@pytest.mark.parametrize(("key", "value"), [("norm_topk_prob", False), ("hidden_size", 64)])
def test_what_stands_twice_must_agree(key: str, value: object, tmp_path: Path) -> None:
    checkpoint = EditableCheckpoint.read(TINY.parent / "v41-tiny")
    checkpoint.config[key] = value
    with pytest.raises(ConfigError, match=rf"'{key}' stands twice"):
        open_checkpoint(checkpoint.write(tmp_path))
