"""Conversions measured by transformers: both measurements of a model, and when they differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.scripts import load_script

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    return load_script("check_transformers_quality")


def test_transformers_finds_what_evaluate_finds(
    script: ModuleType,
    converted: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = load_file(DATA / "tiny-a.reference.safetensors")["input_ids"][0]
    np.save(tmp_path / "ids.npy", ids[:240].view(6, 40).numpy())
    folders = [str(DATA / "tiny-a"), str(converted("int2-g128")), str(converted("mxfp4"))]
    text = ["--corpus", str(tmp_path / "ids.npy"), "--tokens", "240", "--seq-len", "40", "--json"]
    assert script.main([*folders, *text]) == 0
    found = json.loads(capsys.readouterr().out)
    lossy, exact = found["rows"]
    theirs = lossy["transformers"]
    assert theirs["kl"] == pytest.approx(lossy["evaluate"]["kl"], rel=0.1)
    assert theirs["parts"] == {"ids": pytest.approx(theirs["kl"])}
    assert theirs["kl"] > 20 * exact["transformers"]["kl"] >= 0
    assert theirs["perplexity"] == pytest.approx(lossy["evaluate"]["perplexity"], rel=0.02)


def test_what_counts_as_another_result(script: ModuleType) -> None:
    assert script.agree(0.0103, 0.0110, 1e-4) and script.agree(1e-4, 2e-4, 1.5e-4)
    assert not script.agree(0.0100, 0.0125, 1e-4) and not script.agree(0.0125, 0.0100, 1e-4)
