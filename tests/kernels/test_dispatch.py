"""Importing without Triton or a GPU, and the errors a user sees when a kernel cannot run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support.pretend_device import DEVICE, PretendDevice
from v4quant_kernels import dispatch

SCRIPT = """
import sys
import torch
from v4quant_kernels import cpu_products, dispatch, experts, qtensor, scheme, selfcheck
assert not [m for m in sys.modules if m.split(".")[0] == "triton"], "importing must not need Triton"
assert not torch.cuda.is_initialized()
assert not cpu_products.has_bf16_units.cache_info().currsize, "importing must not probe the CPU"

matrix = qtensor.QTensor(scheme.SCHEMES["bf16"], (8, 8), torch.eye(8).bfloat16())
one = experts.stack_experts([(matrix, matrix, matrix)])
ids = torch.zeros(1, 1, dtype=torch.int64)
call = (torch.ones(1, 8).bfloat16(), ids, torch.ones(1, 1), one, 10.0)
out = dispatch.moe(*call)
assert abs(float(out[0, 0]) - 0.7310586) < 0.004, out
assert "triton" not in sys.modules, "the torch twin must not need Triton"

def message(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except dispatch.BackendUnavailable as error:
        return str(error)
    raise AssertionError("not refused")

hidden = sys.argv[1] == "hidden"
expected = "Triton is not installed" if hidden else "set TRITON_INTERPRET=1 before starting Python"
if hidden:
    sys.modules["triton"] = None
    assert expected in message(selfcheck.run_isolated, one, 0)
assert expected in message(dispatch.moe, *call, backend="triton")
"""


def run(case: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_triton() -> None:
    run("hidden")


def test_without_the_interpreter() -> None:
    run("present")


def test_gpus_without_bfloat16_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with PretendDevice():
        there = torch.ones(1, device=DEVICE)
        assert not dispatch.uses_triton(there, "auto")
        with pytest.raises(dispatch.BackendUnavailable, match=r"sm_75.*sm_80 and later"):
            dispatch.uses_triton(there, "triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert dispatch.uses_triton(there, "auto") and dispatch.uses_triton(there, "triton")
        monkeypatch.setattr(dispatch, "has_triton", lambda: False)
        assert not dispatch.uses_triton(there, "auto"), "torch runs where Triton is not installed"
