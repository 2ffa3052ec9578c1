"""The check a user runs on real tensors: it must pass when right and fail when anything is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.kernel_tools import KERNEL_SCHEMES, random_experts, random_qtensor
from v4quant_kernels import dispatch, selfcheck
from v4quant_kernels.codec import dequantize
from v4quant_kernels.errors import UnsupportedScheme, V4QuantError
from v4quant_kernels.experts import ExpertQTensors, stack_experts
from v4quant_kernels.scheme import SCHEMES


def mixed_expert(rng: torch.Generator) -> ExpertQTensors:
    w1, w3 = (random_qtensor("mxfp4", 64, 96, rng) for _ in range(2))
    return w1, w3, random_qtensor("int4-g64", 96, 64, rng)


def test_in_a_process_of_its_own(generator: torch.Generator) -> None:
    pytest.importorskip("triton")
    experts = stack_experts([mixed_expert(generator) for _ in range(2)])
    checks = selfcheck.run_isolated(experts, seed=generator.initial_seed() % 1000)
    assert [c.name for c in checks] == ["moe bf16", "moe e4m3", "indexer"]
    assert [c.scheme for c in checks] == ["mxfp4+int4-g64", "mxfp4+int4-g64", "mxfp4"]
    assert all(c.ok and 0 < c.max_abs_error <= c.bound for c in checks), checks


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "fp8", "int8-g32", "bf16"])
def test_experts_survive_the_file(scheme: str, tmp_path: Path, generator: torch.Generator) -> None:
    experts = random_experts(scheme, 2, 128, 64, generator)
    selfcheck._save(experts, 12, tmp_path / "experts.safetensors")
    loaded, seed = selfcheck._load(tmp_path / "experts.safetensors")
    assert seed == 12 and loaded.num_experts == 2
    for expert in range(2):
        for actual, expected in zip(loaded[expert], experts[expert], strict=True):
            assert torch.equal(dequantize(actual), dequantize(expected))


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_kernel_fails(
    wrong: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = stack_experts([mixed_expert(generator)])
    assert selfcheck.check_moe(experts, 3, "torch").ok
    assert selfcheck.check_indexer(3, "torch").ok
    right_moe, right_indexer = dispatch.moe, dispatch.indexer_logits

    def damaged(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> torch.Tensor:
            result = function(*arguments, **options)
            result[1, result[1].isfinite().nonzero()[-1]] *= wrong
            return result

        return call

    monkeypatch.setattr(dispatch, "moe", damaged(right_moe))
    monkeypatch.setattr(dispatch, "indexer_logits", damaged(right_indexer))
    moe, indexer = selfcheck.check_moe(experts, 3, "torch"), selfcheck.check_indexer(3, "torch")
    assert not moe.ok and moe.max_abs_error > moe.bound
    assert not indexer.ok and indexer.max_abs_error > indexer.bound


def test_a_damaged_environment_is_one_error(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(selfcheck.sys, "argv", ["selfcheck"])
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    experts = stack_experts([mixed_expert(generator)])
    with pytest.raises(V4QuantError, match="kernel check failed to run"):
        selfcheck.run_isolated(experts, 0)


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_crop_is_the_corner(scheme: str, generator: torch.Generator) -> None:
    matrix = random_qtensor(scheme, 256, 384, generator)
    corner = selfcheck.crop(matrix, 128, 256)
    assert corner.shape == (128, 256)
    assert torch.equal(dequantize(corner), dequantize(matrix)[:128, :256])
    if SCHEMES[scheme].group_size > 1:
        with pytest.raises(UnsupportedScheme, match="choose multiples of"):
            selfcheck.crop(matrix, 128, 250)
    with pytest.raises(UnsupportedScheme, match="cannot cut"):
        selfcheck.crop(matrix, 512, 256)
