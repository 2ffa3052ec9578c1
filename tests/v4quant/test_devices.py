"""Devices by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from v4quant.devices import DeviceError, arithmetic_threads, find_device
from v4quant_kernels.errors import OptionError


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("cuda") == torch.device("cuda")
    assert find_device("cuda:1").index == 1
    with pytest.raises(DeviceError, match="2 CUDA devices here"):
        find_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "meta", "cuda:-1", "x" * 500])
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(DeviceError, match="none of cpu, cuda") as error:
        find_device(name)
    assert len(str(error.value)) < 200


def test_a_machine_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="no CUDA device here; use cpu"):
        find_device("cuda")


def test_threads_are_set_for_a_while() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), arithmetic_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise KeyError
    assert torch.get_num_threads() == before
    with arithmetic_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(OptionError, match="--threads 0"), arithmetic_threads(0):
        pass


@pytest.mark.parametrize("step", ["evaluate", "calibrate"])
def test_a_pass_uses_the_threads_it_is_given(step: str, tmp_path: Path) -> None:
    """Every product of the pass is asked for how many threads it has, in a process of its own."""
    more = {"min_tokens": 1, "out": str(tmp_path / "stats.v4q")} if step == "calibrate" else {}
    script = (
        "import torch, v4quant\n"
        "from v4quant_kernels import dispatch\n"
        "seen, product = set(), dispatch.float32_product\n"
        "def watched(a, b):\n"
        "    seen.add(torch.get_num_threads())\n"
        "    return product(a, b)\n"
        "dispatch.float32_product = watched\n"
        f"v4quant.{step}('builtin:tiny-v4', tokens=32, threads=3, **{more!r})\n"
        "print(seen)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.strip() == "{3}"
