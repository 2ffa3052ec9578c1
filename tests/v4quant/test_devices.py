"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from v4quant.devices import DeviceError, find_device


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
