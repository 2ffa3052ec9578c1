"""Layers with schemes of their own in compressed-tensors, for vLLM: written, declared, solved."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support.conversion import convert
from v4quant.builtin import TINY_V4, resolve_source
from v4quant.calibration.collect import solve_settings
from v4quant.checks.verify import verify
from v4quant.recipe import Recipe, RecipeError
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight
from v4quant_formats.weight_reading import read_weight
from v4quant_formats.weights import find_weight
from v4quant_kernels.codec import dequantize
from v4quant_kernels.progress import SilentProgress

SOURCE = Path(resolve_source(TINY_V4))
WANTED = {
    **dict.fromkeys(("layers.0", "layers.3", "layers.5"), "int3-g128"),
    **dict.fromkeys(("layers.1", "layers.2"), "mxfp4"),
    "layers.4": "int2-g64",
    "mtp.0": "int2-g64",
}


def mixed(schemes: dict[str, str], **more: str) -> Recipe:
    lines = [(f"{stage}.{group}", s) for stage, s in schemes.items() for group in GROUPS]
    return Recipe("int3-g128", "compressed-tensors", engine="vllm", schemes=tuple(lines), **more)


GROUPS = ("gate_up", "down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    convert(SOURCE, out, mixed(WANTED))
    return out


def modules(checkpoint: Checkpoint) -> list[str]:
    names = (n.removesuffix(".weight_packed") for n in checkpoint.tensors if "_packed" in n)
    return [n for n in names if ".experts." in n]


def test_every_layer_has_its_scheme(folder: Path) -> None:
    with open_checkpoint(folder) as out, open_checkpoint(SOURCE) as source:
        for module in modules(out):
            stage = module.partition(".ffn.")[0]
            assert find_weight(out, module).scheme.name == WANTED[stage], module  # type: ignore[union-attr]
        assert len(modules(out)) == 7 * 16 * 3
        assert not verify(folder, source, SilentProgress()).findings


def test_vllm_reads_each_layer_by_its_group(folder: Path) -> None:
    """By the library's own matcher and decompressor, as vLLM asks: expert 0, by its names."""
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    with open_checkpoint(folder) as out:
        declared = out.config["quantization_config"]
        assert declared["format"] == "mixed-precision"
        groups = list(declared["config_groups"].values())
        dense = ("layers.0.attn.wq_a", "layers.0.ffn.shared_experts.w1")
        for module in modules(out):
            theirs = "model." + re.sub(r"^mtp\.0", "layers.6", module)
            found = [g for g in groups if any(match_name(theirs, t) for t in g["targets"])]
            assert len(found) == 1, theirs
            assert not any(match_name(theirs, i) for i in declared["ignore"]), theirs
            scheme = quantization.QuantizationScheme(**found[0])
            if module.endswith(("experts.0.w1", "experts.15.w2")):
                parts = {
                    suffix: out.read(f"{module}.{suffix}")
                    for suffix in ("weight_packed", "weight_scale", "weight_shape")
                    if f"{module}.{suffix}" in out
                }
                compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
                held = compressor.decompress(parts, scheme)["weight"]
                ours = dequantize(read_weight(out, find_weight(out, module)))
                assert torch.equal(held.float(), ours.to(held.dtype).float()), module
        for module in dense:
            found = [
                g for g in groups if any(match_name(f"model.{module}", t) for t in g["targets"])
            ]
            assert [g["format"] for g in found] == ["float-quantized"], module


def test_preflight_knows_who_loads_it(folder: Path) -> None:
    with open_checkpoint(folder) as out:
        assert not preflight(out, "vllm").findings
        assert any(f.severity == "error" for f in preflight(out, "transformers").findings)


def test_draft_stages_may_be_dropped(tmp_path: Path) -> None:
    kept = {stage: scheme for stage, scheme in WANTED.items() if stage != "mtp.0"}
    convert(SOURCE, tmp_path / "out", mixed(kept, draft="drop"))
    with open_checkpoint(tmp_path / "out") as out:
        targets = [
            t
            for g in out.config["quantization_config"]["config_groups"].values()
            for t in g["targets"]
        ]
        assert not any("mtp" in t for t in targets)
        assert not preflight(out, "vllm").findings


def test_a_layer_has_one_scheme() -> None:
    with pytest.raises(RecipeError, match=r"layers.2.gate_up int3-g128 and layers.2.down mxfp4"):
        Recipe(
            "int3-g128", "compressed-tensors", engine="vllm", schemes=(("layers.2.down", "mxfp4"),)
        )


@pytest.mark.parametrize("engine", ["neutral", "sglang"])
def test_other_engines_are_refused(engine: str) -> None:
    with pytest.raises((RecipeError, UnsupportedPair), match=r"engine = 'vllm'"):
        Recipe(
            "int4-g128", "compressed-tensors", engine=engine,
            schemes=(("layers.2.down", "int8-g128"), ("layers.2.gate_up", "int8-g128")),
        )  # fmt: skip


def test_dense_matrices_are_not_chosen_here() -> None:
    with pytest.raises(RecipeError, match="dense matrices are as the format has them"):
        Recipe(
            "int4-g128", "compressed-tensors", engine="vllm", schemes=(("layers.2.dense", "q8_0"),)
        )


def test_layers_are_solved_for_their_schemes() -> None:
    """What is exact is left out."""
    with open_checkpoint(SOURCE) as source:
        settings = solve_settings(source, mixed(WANTED))
        found = settings.schemes
        assert found is not None
        assert found["layers.4.ffn.experts.3.w2"].name == "int2-g64"
        assert found["mtp.0.ffn.experts.0.w1"].name == "int2-g64"
        assert not any(module.startswith("layers.1.") for module in found)
        plain = Recipe("int3-g128", "compressed-tensors", engine="vllm")
        assert solve_settings(source, plain).schemes is None
