"""V4.1 in every layout and engine variant, read by a second implementation as that engine would.

The source is read by it too. Whatever the layout, all but the experts is the same number for
number; experts are where a scheme can hold them, and within its bound elsewhere.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.conversion import convert
from tests.support.second_v41 import Array, SecondReader
from v4quant.checks.verify import verify
from v4quant.recipe import Recipe
from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES

# scheme[/format][@engine] -> the engines it is for.
BOTH = ("vllm", "sglang")
CASES = {
    "mxfp4": BOTH,
    "fp8": BOTH,
    "bf16": BOTH,
    "nvfp4": ("vllm",),
    "nvfp4@sglang": ("sglang",),
    "int4-g128": BOTH,
    "int4-g128@vllm": ("vllm",),
    "int4-g32@sglang": ("sglang",),
    "mxfp4/compressed-tensors": ("vllm",),
    "mxfp4/compressed-tensors@vllm": ("vllm",),
    "mxfp8@vllm": ("vllm",),
}
SIZES = {
    "num_hidden_layers": 4,
    "n_routed_experts": 2,
    "dspark_n_routed_experts": 2,
    "o_lora_rank": 48,  # a tile of wo_a crosses the border of its two groups
    "index_n_heads": 3,
    "index_head_dim": 72,  # 216 rows: the last tile of indexer.wq_b is ragged
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    out = tmp_path_factory.mktemp("v41") / "source"
    write_checkpoint(out, Request("v41", overrides=tuple(SIZES.items()), seed=seed))
    return out


def recipe_of(case: str) -> Recipe:
    rest, _, engine = case.partition("@")
    scheme, _, layout = rest.partition("/")
    return Recipe(scheme, format=layout, engine=engine or "neutral")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("out") / "out"
            convert(source, made[case], recipe_of(case), workers=1)
        return made[case]

    return get


def round_to_nearest(x: Array, bits: int, group: int) -> Array:
    """Squared errors of groups under the plain rule: largest value to the largest code."""
    grouped = x.reshape(len(x), -1, group)
    scale = np.abs(grouped).max(-1, keepdims=True) / ((1 << (bits - 1)) - 1)
    scale = torch.from_numpy(scale).bfloat16().double().numpy()
    codes = np.rint(grouped / np.where(scale > 0, scale, 1)).clip(-(1 << (bits - 1)), None)
    return np.asarray(((codes * scale - grouped) ** 2).sum(-1))


@pytest.mark.parametrize("case", CASES)
def test_a_second_reader_finds_the_same_numbers(
    case: str, source: Path, converted: Callable[[str], Path]
) -> None:
    out, scheme = converted(case), SCHEMES[recipe_of(case).scheme]
    first = SecondReader(source, "vllm")
    for engine in CASES[case]:
        second = SecondReader(out, engine)
        assert second.modules() == first.modules()
        for module in first.modules():
            x, y = first.values(module), second.values(module)
            if ".ffn.experts." not in module or not scheme.is_packed_integer:
                np.testing.assert_array_equal(y, x, module)
                assert np.array_equal(np.signbit(x), np.signbit(y)), module
                continue
            error = ((y - x) ** 2).reshape(len(x), -1, scheme.group_size).sum(-1)
            plain = round_to_nearest(x, scheme.bits, scheme.group_size)
            assert error.sum() <= plain.sum() and error.any(), module


@pytest.mark.parametrize("case", CASES)
def test_engines_load_it(case: str, converted: Callable[[str], Path]) -> None:
    with open_checkpoint(converted(case)) as checkpoint:
        for engine in CASES[case]:
            found = preflight(checkpoint, engine)
            alarms = [f for f in found.findings if f.severity != "note"]
            assert found.loads and not alarms, alarms
            assert found.gpus
        refused = preflight(checkpoint, "transformers")
    assert not refused.loads
    assert any("no class for V4.1" in f.problem for f in refused.findings)


@pytest.mark.parametrize("case", ["fp8", "int4-g128@vllm", "mxfp8@vllm"])
def test_verify_agrees(case: str, source: Path, converted: Callable[[str], Path]) -> None:
    assert verify(converted(case), source, SilentProgress()).findings == ()


def test_vllm_reads_dense_matrices_as_mxfp8(converted: Callable[[str], Path]) -> None:
    table = json.loads((converted("int4-g128@vllm") / "config.json").read_text())
    groups = table["quantization_config"]["config_groups"]
    assert groups["group_1"]["format"] == "mxfp8-quantized"
    assert any("fused_wqa_wkv" in t for t in groups["group_1"]["targets"])
    second = SecondReader(converted("int4-g128@vllm"), "vllm")
    forms = {module: second.form(module) for module in second.modules()}
    assert forms["layers.0.attn.wq_b"] == forms["layers.1.engram.wkv"] == "ct-mxfp8"
    assert forms["layers.0.attn.wo_a"] == forms["mtp.0.attn.wq_b"] == "plain"


def test_an_output_projection_in_small_tiles_is_refused(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """What vLLM would load and break at, if FP8 experts had native tiles beside them."""
    out = converted("fp8")
    table = json.loads((out / "config.json").read_text())
    names = table["quantization_config"]["ignored_layers"]
    assert "layers.0.attn.wo_a" in names and "model.layers.4.attn.wo_a" in names
    table["quantization_config"].pop("ignored_layers")
    folder = tmp_path / "edited"
    shutil.copytree(out, folder)
    (folder / "config.json").write_text(json.dumps(table))
    with open_checkpoint(folder) as checkpoint:
        found = preflight(checkpoint, "vllm")
    assert any(f.rule == "wo_a" and "32x32" in f.problem for f in found.findings)


def test_bf16_comes_back_as_the_release(
    source: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(converted("bf16"), tmp_path / "again", "mxfp4", workers=1)
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "again") as after:
        for spec in before:
            mine, theirs = (c.read(spec.name).view(torch.uint8) for c in (before, after))
            assert torch.equal(mine, theirs), spec.name
    wanted = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == wanted


def test_columns_that_are_no_groups_are_refused_for_vllm(tmp_path: Path) -> None:
    sizes = {**SIZES, "q_lora_rank": 144}
    write_checkpoint(tmp_path / "in", Request("v41", overrides=tuple(sizes.items())))
    with pytest.raises(UnsupportedPair, match=r"144 input channels.*--engine neutral"):
        convert(tmp_path / "in", tmp_path / "out", Recipe("int4-g32", engine="vllm"))
