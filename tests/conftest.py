"""What has to happen before any test module is imported.

Triton decides at import whether kernels run on a GPU or in its interpreter, and the kernel tests
share this process with all others, so the choice is made here. On a GPU machine start pytest with
TRITON_INTERPRET=0 to run the same tests on the device. (Compilation needs a process without the
interpreter; `kernels/test_compile.py` starts one.)
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
# No probe of speed may decide about last digits, nor write to the cache of whoever runs the tests;
# and what an earlier run left in that must not answer for other code.
os.environ.setdefault("V4QUANT_FLOAT32", "default")
_CACHE = tempfile.TemporaryDirectory(prefix="v4quant-tests-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` say why they did not run."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh randomness for every run, repeatable from the seed a failing test shows."""
    generator = torch.Generator()
    sys.stdout.write(f"torch seed: {generator.seed()}\n")
    return generator


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny checkpoint converted to a scheme; made once, not to be changed."""
    from tests.support.conversion import TINY, convert

    made: dict[str, Path] = {}

    def get(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("converted") / re.sub("[/@]", "_", scheme)
            convert(TINY, made[scheme], scheme)
        return made[scheme]

    return get
