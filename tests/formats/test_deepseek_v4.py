"""Names, roles, shapes and completeness of released checkpoints."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.configs import FLASH, PRO
from tests.support.conversion import TINY
from v4quant_formats.deepseek_v4 import (
    detect_release,
    draft_stages,
    expected_modules,
    expert_module,
    parse_name,
    split_part,
)
from v4quant_formats.model_config import load_model_config, parse_model_config
from v4quant_formats.module_shapes import module_shape
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weights import find_weight


@pytest.mark.parametrize(
    ("name", "module", "part", "stage", "role", "linear"),
    [
        ("embed.weight", "embed", "weight", "", "embedding and head", False),
        ("norm.weight", "norm", "weight", "", "norm", False),
        ("hc_head_fn", "hc_head_fn", "", "", "hyper-connection", False),
        ("layers.3.attn.wq_a.scale", "layers.3.attn.wq_a", "scale", "layers.3", "attention", True),
        ("layers.0.attn.attn_sink", "layers.0.attn.attn_sink", "", "layers.0", "attention", False),
        ("layers.2.ffn.gate.tid2eid", "layers.2.ffn.gate.tid2eid", "", "layers.2", "router", False),
        ("layers.9.ffn.gate.bias", "layers.9.ffn.gate.bias", "", "layers.9", "router", False),
        ("layers.9.ffn.gate.weight", "layers.9.ffn.gate", "weight", "layers.9", "router", False),
        ("layers.10.attn.indexer.wq_b.weight", "layers.10.attn.indexer.wq_b", "weight",
         "layers.10", "indexer", True),
        ("layers.1.attn.compressor.ape", "layers.1.attn.compressor.ape", "", "layers.1",
         "compressor", False),
        ("mtp.0.e_proj.weight", "mtp.0.e_proj", "weight", "mtp.0", "draft", True),
        ("mtp.0.attn.wo_b.weight", "mtp.0.attn.wo_b", "weight", "mtp.0", "attention", True),
    ],
)  # fmt: skip
def test_parse_name(name: str, module: str, part: str, stage: str, role: str, linear: bool) -> None:
    parsed = parse_name(name)
    assert parsed is not None
    got = (parsed.module, parsed.part, parsed.stage, parsed.role, parsed.is_linear)
    assert got == (module, part, stage, role, linear)
    assert parsed.is_draft == stage.startswith("mtp.")
    assert parsed.expert is None


def test_experts() -> None:
    parsed = parse_name("layers.42.ffn.experts.255.w2.weight_packed")
    assert parsed is not None
    assert (parsed.stage, parsed.expert, parsed.projection) == ("layers.42", 255, "w2")
    assert expert_module("layers.42", 255, "w2") == parsed.module
    assert split_part("a.b.weight_scale_2") == ("a.b", "weight_scale_2")
    assert split_part("a.b.tid2eid") == ("a.b.tid2eid", "")


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.attn.wq_a.weight", "layers.00.attn.wq_a.weight", "layers.-1.attn.wq_a.weight",
     "layers.\u0663.attn.wq_a.weight", "layers.0.ffn.experts.01.w1.weight", "layers.0.attn.wq_c",
     "layers.0.ffn.experts.0.w4.weight", "layers.0.e_proj.weight", "lm_head.weight", "",
     "layers.0.attn.wq_a.weight.weight", "layers.99999.attn_norm.weight"],
)  # fmt: skip
def test_names_no_release_has(name: str) -> None:
    assert parse_name(name) is None


def test_flash_and_pro_need_as_many_tensors_as_released() -> None:
    """Public counts: 69,187 and 145,116 tensors, one MTP stage included."""
    for raw, count in ((FLASH, 69_187), (PRO, 145_116)):
        config = parse_model_config(raw)
        modules = list(expected_modules(config, ["mtp.0.norm.weight"]))
        assert len(modules) == len(set(modules))
        # A linear module is a weight and a scale.
        tensors = sum(1 + bool((n := parse_name(m + ".weight")) and n.is_linear) for m in modules)
        assert tensors == count


def test_flash_bytes_by_shape() -> None:
    """Every module has a shape, and they add up to the released 159,609,485,896 bytes."""
    config = parse_model_config(FLASH)
    total = 0
    for module in expected_modules(config, ["mtp.0.norm.weight"]):
        shape = module_shape(config, module)
        assert shape is not None, module
        parsed = parse_name(f"{module}.weight")
        assert parsed is not None
        count = 1
        for size in shape:
            count *= size
        if parsed.expert is not None:
            total += count // 2 + count // 32
        elif parsed.is_linear:
            total += count + -(-shape[0] // 128) * -(-shape[1] // 128)
        else:
            plain = (".hc_", "hc_head", "attn_sink", ".ape", "gate.bias")
            size = 8 if module.endswith("tid2eid") else 4 if any(p in module for p in plain) else 2
            total += count * size
    assert total == 159_609_485_896


def test_tiny_checkpoint_is_complete_and_of_the_shapes() -> None:
    config = load_model_config(TINY)
    with open_checkpoint(TINY) as checkpoint:
        modules = set(expected_modules(config, checkpoint.tensors))
        assert modules == {split_part(s.name)[0] for s in checkpoint}
        for module in modules:
            assert find_weight(checkpoint, module).shape == module_shape(config, module), module
        assert draft_stages(checkpoint.tensors) == ["mtp.0"]
        roles = Counter(p.role for s in checkpoint if (p := parse_name(s.name)))
        assert roles["routed experts"] == 2 * 3 * 4 * 5
        assert detect_release(checkpoint.tensors, {"I8"}, "deepseek_v4") == "V4"
