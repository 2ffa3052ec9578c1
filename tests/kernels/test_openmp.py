"""Threads of a product wait briefly by default; what the user set about it stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from v4quant_kernels.openmp import DEFAULTS, set_defaults

PACKAGES = ("v4quant_kernels", "v4quant_formats", "v4quant_calibration", "v4quant")
SETTINGS = {*DEFAULTS, *(name for _, same in DEFAULTS.values() for name in same)}

LIBRARY_USER = """
import os, sys
import {package}
assert "torch" not in sys.modules, "too late: OpenMP reads its settings when torch is loaded"
assert os.environ["GOMP_SPINCOUNT"] == "1000" and os.environ["KMP_BLOCKTIME"] == "1"
"""


def run(*command: str, **settings: str) -> str:
    """The child's standard error; its environment is ours without OpenMP's, plus `settings`."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment = kept | {"PYTHONPATH": os.pathsep.join(sys.path)} | settings
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_settles_it_before_torch(package: str) -> None:
    run("-c", LIBRARY_USER.format(package=package))


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp on Linux alone")
@pytest.mark.parametrize(("given", "seen"), [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_the_library_took_it(given: dict[str, str], seen: str) -> None:
    """libgomp itself says what it has read."""
    told = run("-c", "import v4quant, torch", OMP_DISPLAY_ENV="VERBOSE", **given)
    assert f"GOMP_SPINCOUNT = '{seen}'" in told


def test_a_command_settles_it_before_torch() -> None:
    told = run("-X", "importtime", "-m", "v4quant", "quantize", "--help")
    order = [line.rsplit("|", 1)[-1].strip() for line in told.splitlines() if "|" in line]
    assert "v4quant_kernels.openmp" in order
    if "torch" in order:
        assert order.index("v4quant_kernels.openmp") < order.index("torch._C")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}),
        ({"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "1"}),
        ({"KMP_BLOCKTIME": "200"}, {"GOMP_SPINCOUNT": "1000"}),
        ({"KMP_LIBRARY": "turnaround"}, {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "active"}, {}),
        ({"GOMP_SPINCOUNT": ""}, {"KMP_BLOCKTIME": "1"}),
    ],
)
def test_what_the_user_set_stays(given: dict[str, str], expected: dict[str, str]) -> None:
    environment = dict(given)
    set_defaults(environment)
    assert environment == given | expected
