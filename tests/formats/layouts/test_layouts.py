"""Containers: tensors as planned, configs engines parse, values other libraries decode alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors import QuantizationConfig
from compressed_tensors.compressors import PackedQuantizationCompressor
from safetensors.torch import load_file

from tests.calibration.oracle_loader import OracleParams
from tests.support.conversion import SCHEMES, TINY, VARIANTS, convert
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.layouts.table import LAYOUTS, choose_layout
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.spec import torch_dtype
from v4quant_formats.weight_reading import read_dense
from v4quant_formats.weights import find_weight
from v4quant_kernels.codec import quantize
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES as TABLE

Converted = Callable[[str], Path]
INTS = [s for s in SCHEMES if s.startswith("int")]
EVERY = (*SCHEMES, *VARIANTS)


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def config_of(folder: Path) -> dict[str, object]:
    table: dict[str, object] = json.loads((folder / "config.json").read_text())
    return table


def experts(tensors: dict[str, torch.Tensor]) -> list[str]:
    return sorted({n.rpartition(".")[0] for n in tensors if ".experts." in n})


@pytest.mark.parametrize("name", INTS)
def test_compressed_tensors_decompresses_to_our_values(name: str, converted: Converted) -> None:
    folder = converted(name)
    parsed = QuantizationConfig.model_validate(config_of(folder)["quantization_config"])
    (scheme,) = parsed.config_groups.values()
    weights = scheme.weights  # type: ignore[union-attr]
    assert weights is not None
    assert (weights.num_bits, weights.group_size) == (TABLE[name].bits, TABLE[name].group_size)
    assert parsed.format == "pack-quantized" and weights.symmetric
    tensors = load(folder)
    with open_checkpoint(folder) as checkpoint:
        for module in experts(tensors):
            parts = {
                p: tensors[f"{module}.{p}"]
                for p in ("weight_packed", "weight_scale", "weight_shape")
            }
            theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
            # The library multiplies in bfloat16; exact casts survive that, INT4 products round.
            ours = read_dense(checkpoint, module)
            assert torch.equal(theirs, ours.to(theirs.dtype)), module
            if name.startswith("int8"):
                assert torch.equal(theirs.float(), ours), module


@pytest.mark.parametrize("name", INTS)
def test_targets_hit_experts_and_ignores_hit_the_rest(name: str, converted: Converted) -> None:
    folder = converted(name)
    parsed = QuantizationConfig.model_validate(config_of(folder)["quantization_config"])
    target = parsed.config_groups["group_0"].targets[0].removeprefix("re:")  # type: ignore[union-attr]
    tensors = load(folder)
    coded = {n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")}
    linear = {n.rpartition(".")[0] for n, t in tensors.items() if t.dim() == 2 and "weight" in n}
    assert coded == {m for m in linear if re.match(target, m)} and coded
    theirs = coded | {m.replace("w1", "gate_proj").replace("w3", "up_proj") for m in coded}
    assert all(re.match(target, f"model.{m}") for m in theirs)
    for module in sorted(linear - coded):
        if "compressor" in module or module.endswith(
            ("proj", "wq_a", "wq_b", "wkv", "wo_a", "wo_b")
        ):
            assert any(re.match(i.removeprefix("re:"), module) for i in parsed.ignore or []), module


def test_dense_matrices_become_exact_bfloat16(converted: Converted) -> None:
    tensors, oracle = load(converted("int4-g32")), OracleParams(TINY)
    checked = 0
    for name, scale in oracle.tensors.items():
        module = name.removesuffix(".scale")
        if name.endswith(".scale") and ".experts." not in name and scale.dim() == 2:
            got = tensors[f"{module}.weight"]
            assert got.dtype == torch.bfloat16 and f"{module}.scale" not in tensors
            assert torch.equal(got.float(), oracle(module)), module
            checked += 1
    assert checked > 20


def test_nvfp4_decodes_to_the_source_values(converted: Converted) -> None:
    """Decoded from bytes with ml_dtypes: code * E4M3 scale per 16 * second-level scale."""
    tensors, oracle = load(converted("nvfp4")), OracleParams(TINY)
    for module in experts(tensors):
        raw = tensors[f"{module}.weight"].numpy()
        nibbles = np.stack((raw & 15, raw >> 4), -1).reshape(raw.shape[0], -1)
        values = nibbles.astype(np.uint8).view(np.uint8)
        codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        scale = tensors[f"{module}.weight_scale"].view(torch.uint8).numpy()
        scale = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float64).repeat(16, 1)
        decoded = codes[values] * scale * float(tensors[f"{module}.weight_scale_2"])
        assert (decoded == oracle(module).double().numpy()).all(), module
        assert float(tensors[f"{module}.input_scale"]) > 0


def test_nvfp4_fused_pairs_share_their_scales(converted: Converted) -> None:
    tensors = load(converted("nvfp4"))
    for module in experts(tensors):
        if module.endswith(".w1"):
            for part in ("weight_scale_2", "input_scale"):
                pair = [tensors[f"{module[:-1]}{i}.{part}"] for i in "13"]
                assert torch.equal(*pair), module


def test_fp8_values_and_scales(converted: Converted) -> None:
    tensors, oracle = load(converted("fp8")), OracleParams(TINY)
    for name in sorted(n for n in tensors if n.endswith(".scale")):
        module = name.removesuffix(".scale")
        scale = tensors[name]
        assert scale.dtype == torch.float32
        assert bool((torch.frexp(scale).mantissa == 0.5).all()), "engines want powers of two"
        tiles = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        weight = tensors[f"{module}.weight"].float()
        assert torch.equal(weight * tiles[: weight.shape[0], : weight.shape[1]], oracle(module))


def test_mxfp4_is_the_source_byte_for_byte(converted: Converted) -> None:
    ours, theirs = load(converted("mxfp4")), load(TINY)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        raw = [t.reshape(-1).view(torch.uint8) for t in (ours[name], tensor)]
        assert ours[name].dtype == tensor.dtype and torch.equal(*raw), name


@pytest.mark.parametrize("name", EVERY)
def test_nothing_but_experts_and_dense_matrices_changes(name: str, converted: Converted) -> None:
    ours, theirs = load(converted(name)), load(TINY)
    coded = {n.rpartition(".")[0] for n in theirs if n.endswith(".scale")}
    for tensor in theirs:
        if tensor.rpartition(".")[0] not in coded:
            raw = [t[tensor].reshape(-1).view(torch.uint8) for t in (ours, theirs)]
            assert torch.equal(*raw), tensor


@pytest.mark.parametrize("name", EVERY)
def test_config_states_what_the_files_hold(name: str, converted: Converted) -> None:
    source, ours = config_of(TINY), config_of(converted(name))
    kept = {k for k in source if k not in ("quantization_config", "expert_dtype")}
    assert {k: ours[k] for k in kept} == {k: source[k] for k in kept}
    quantization = ours.get("quantization_config")
    if name == "bf16":
        assert quantization is None and "expert_dtype" not in ours
        return
    assert isinstance(quantization, dict)
    if name in ("fp8", "mxfp4", "nvfp4", "nvfp4@sglang"):
        assert quantization["quant_method"] == "fp8"
        assert ("scale_fmt" in quantization) == (name != "fp8")
        assert ours["expert_dtype"] == ("fp8" if name == "fp8" else "fp4")
        assert (quantization.get("moe_quant_algo") == "NVFP4") == name.startswith("nvfp4")
    else:
        assert "expert_dtype" not in ours


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda x: x.name)
def test_parts_promise_what_tensors_deliver(layout) -> None:  # type: ignore[no-untyped-def]
    for name in layout.schemes:
        scheme = TABLE[name]
        x = torch.randn(130, 256)
        q: QTensor = quantize(x, scheme)
        parts = layout.expert_parts(scheme, (130, 256))
        tensors = layout.expert_tensors(q, 3.0)
        assert parts.keys() == tensors.keys()
        for suffix, (dtype, shape) in parts.items():
            got = tensors[suffix]
            assert (got.dtype, tuple(got.shape)) == (torch_dtype(dtype), shape), (name, suffix)


def test_choice_of_layout() -> None:
    for layout in LAYOUTS.values():
        for name in layout.schemes:
            assert choose_layout(TABLE[name], layout.name) is layout
    for scheme, name in (
        ("mxfp4", "deepseek"),
        ("nvfp4", "modelopt"),
        ("int2-g64", "compressed-tensors"),
        ("mxfp8", "compressed-tensors"),
        ("q4_k", "gguf"),
    ):
        assert choose_layout(TABLE[scheme], None) is LAYOUTS[name]
    for scheme, name in (("int4-g32", "deepseek"), ("mxfp4", "modelopt"), ("fp8", "modelopt")):
        with pytest.raises(UnsupportedPair, match="the pairs that work are deepseek: mxfp4"):
            choose_layout(TABLE[scheme], name)
    with pytest.raises(UnsupportedPair, match=r"unknown format 'tar'.*compressed-tensors"):
        choose_layout(TABLE["mxfp4"], "tar")


def test_engines_that_cannot_load_a_pair_are_refused_with_what_works() -> None:
    for scheme, remedy in (("int3-g128", "use vLLM"), ("mxfp8", "--format deepseek")):
        with pytest.raises(UnsupportedPair, match=f"for sglang.*{remedy}"):
            choose_layout(TABLE[scheme], "compressed-tensors", "sglang")
    assert choose_layout(TABLE["mxfp4"], None, "sglang") is LAYOUTS["deepseek"]
    assert choose_layout(TABLE["int4-g32"], None, "vllm").engine == "vllm"


def test_the_vllm_variant_keeps_the_trunk_in_fp8(converted: Converted) -> None:
    tensors, source = load(converted("int4-g32@vllm")), load(TINY)
    oracle = OracleParams(TINY)
    checked = 0
    for name in source:
        module = name.removesuffix(".scale")
        if not name.endswith(".scale") or ".experts." in name:
            continue
        weight = tensors[f"{module}.weight"]
        assert f"{module}.scale" not in tensors
        if name.startswith("mtp."):
            assert torch.equal(weight.float(), oracle(module)), module
            assert weight.dtype == torch.bfloat16
            continue
        assert torch.equal(weight.view(torch.uint8), source[f"{module}.weight"].view(torch.uint8))
        scale = tensors[f"{module}.weight_scale"]
        assert scale.dtype == torch.float32 and torch.equal(scale, source[name].float())
        checked += 1
    assert checked > 20


def test_the_vllm_variant_declares_what_it_holds(converted: Converted) -> None:
    """By the library's own matcher, under the names vLLM gives to modules."""
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    folder = converted("int4-g32@vllm")
    config = config_of(folder)["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.format == "mixed-precision"
    tensors, layers = load(folder), config_of(folder)["num_hidden_layers"]
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if tensor.dim() != 2 or part not in ("weight", "weight_packed"):
            continue
        draft = module.startswith("mtp.")
        theirs = re.sub(r"^mtp\.0", f"model.layers.{layers}", module)
        theirs = re.sub(r"^layers", "model.layers", theirs)
        hits = [
            number
            for number, group in enumerate(parsed.config_groups.values())
            if any(match_name(theirs, t) for t in group.targets)  # type: ignore[union-attr]
        ]
        ignored = any(match_name(theirs, i) for i in parsed.ignore or [])
        if ".experts." in module:
            assert hits == [0] and not ignored, module
        elif f"{module}.weight_scale" in tensors:
            assert hits == [1] and not ignored and not draft, module
        else:
            assert ignored or not hits, module


def test_the_sglang_variant_keeps_every_dense_byte(converted: Converted) -> None:
    tensors, source = load(converted("int4-g32@sglang")), load(TINY)
    for name, value in source.items():
        if ".experts." not in name:
            raw = [t.reshape(-1).view(torch.uint8) for t in (tensors[name], value)]
            assert torch.equal(*raw), name
    config = config_of(converted("int4-g32@sglang"))["quantization_config"]
    assert isinstance(config, dict)
    assert config["linear_fp8_config"]["weight_block_size"] == [128, 128]


def test_sglang_keeps_draft_experts_in_mxfp4(converted: Converted) -> None:
    tensors, source = load(converted("nvfp4@sglang")), load(TINY)
    drafts = [n for n in source if n.startswith("mtp.") and ".experts." in n]
    assert drafts
    for name in drafts:
        raw = [t.reshape(-1).view(torch.uint8) for t in (tensors[name], source[name])]
        assert torch.equal(*raw), name
    config = config_of(converted("nvfp4@sglang"))["quantization_config"]
    assert isinstance(config, dict) and "*mtp.0.ffn.experts*" in config["ignore"]


def test_drafts_that_must_be_mxfp4_become_it_again(converted: Converted, tmp_path: Path) -> None:
    """FP8 of MXFP4 values lies on the grid still, so the drafts are the release's once more."""
    convert(converted("fp8"), tmp_path / "out", "nvfp4@sglang")
    module = "mtp.0.ffn.experts.0.w1"
    with open_checkpoint(tmp_path / "out") as out, open_checkpoint(TINY) as source:
        assert find_weight(out, module).scheme == TABLE["mxfp4"]
        assert torch.equal(read_dense(out, module), read_dense(source, module))


@pytest.mark.parametrize("case", ["mxfp4/compressed-tensors", "mxfp8"])
def test_compressed_tensors_decompresses_mx(case: str, converted: Converted) -> None:
    """The library's registered decompressors give the source's values, bit for bit."""
    from compressed_tensors.compressors import BaseCompressor

    folder = converted(case)
    parsed = QuantizationConfig.model_validate(config_of(folder)["quantization_config"])
    group = parsed.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)  # type: ignore[union-attr]
    tensors, oracle = load(folder), OracleParams(TINY)
    for module in experts(tensors):
        parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        theirs = compressor.decompress(parts, group)["weight"]
        assert torch.equal(theirs.float(), oracle(module)), module


def test_compressed_tensors_decompresses_nvfp4(converted: Converted) -> None:
    """Our NVFP4 experts under compressed-tensors' names; its global scale is a divisor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    group = preset_name_to_scheme("NVFP4", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    tensors, oracle = load(converted("nvfp4")), OracleParams(TINY)
    for module in experts(tensors):
        parts = {
            "weight_packed": tensors[f"{module}.weight"],
            "weight_scale": tensors[f"{module}.weight_scale"],
            "weight_global_scale": 1 / tensors[f"{module}.weight_scale_2"].reshape(1),
        }
        theirs = compressor.decompress(parts, group)["weight"]
        assert torch.equal(theirs.float(), oracle(module)), module
