"""`evaluate --max-memory`: plans that fit, and a peak measured from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.conversion import TINY
from tests.support.peak import peak_of
from tests.support.synthetic import Request, write_checkpoint
from v4quant.evaluation.memory import MemoryPlan, Work, plan_evaluation
from v4quant.memory import Limits
from v4quant.sizes import SizeError
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.model_config import load_model_config

CONFIG = load_model_config(TINY)
WORK = Work(models=3, candidates=1, lengths=(4000,) * 50, weights=True)
GIB = 2**30


def plan(cap: int | None, work: Work = WORK, on_disk: bool = False) -> MemoryPlan:
    return plan_evaluation(CONFIG, work, Limits(cap), on_disk)


def test_less_memory_first_spills_then_reads_experts_again() -> None:
    free = plan(None)
    assert not free.spill and free.expert_tokens is None
    assert plan(free.nbytes) == free
    tighter = plan(free.nbytes - GIB // 2)
    assert tighter.spill
    assert plan(None, on_disk=True).spill
    seen = [plan(cap) for cap in range(free.nbytes, 600 * 2**20, -(64 * 2**20))]
    assert all(
        p.nbytes <= cap for p, cap in zip(seen, range(free.nbytes, 0, -(64 * 2**20)), strict=False)
    )
    through = [p.expert_tokens or WORK.tokens for p in seen]
    assert through == sorted(through, reverse=True) and through[-1] < WORK.tokens
    options = seen[-1].apply(ForwardOptions(activations="official"))
    assert options.official and options.expert_tokens == through[-1]


def test_a_gpu_has_a_limit_of_its_own() -> None:
    """Streams stay with the host; what is in work fits the GPU, in smaller pieces if it must."""
    free = plan_evaluation(CONFIG, WORK, Limits(None, 24 * GIB))
    assert not free.spill and free.expert_tokens is None
    assert free.device_bytes < 24 * GIB and free.nbytes < plan(None).nbytes
    small = plan_evaluation(CONFIG, WORK, Limits.of(None, GIB))
    assert small.device_bytes <= GIB and small.expert_tokens is not None and not small.spill
    capped = plan_evaluation(CONFIG, WORK, Limits.of(GIB, 24 * GIB))
    assert capped.nbytes <= GIB >= capped.device_bytes and capped.spill
    with pytest.raises(SizeError, match=r"0\.10 GB of the GPU's memory are too little.*0\.\d\d GB"):
        plan_evaluation(CONFIG, WORK, Limits.of(None, 10**8))


def test_too_little_says_how_much_it_takes() -> None:
    with pytest.raises(SizeError, match=r"0\.30 GB is too little: this run needs 0\.\d\d"):
        plan(300 * 10**6)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a child")
def test_peak_stays_below_the_cap(tmp_path: Path) -> None:
    """Streams and experts' rows alone are more than the cap leaves room for."""
    sizes = {"hidden_size": 1024, "vocab_size": 512, "n_routed_experts": 2}
    folder = tmp_path / "wide"
    request = Request("flash", overrides=tuple({**sizes, "num_hidden_layers": 1}.items()))
    write_checkpoint(folder, request)
    rng = np.random.default_rng()
    np.save(tmp_path / "ids.npy", rng.integers(0, 512, (12, 500)))
    base = [sys.executable, "-m", "v4quant", "evaluate", str(folder), "--json"]
    base += ["--corpus", str(tmp_path / "ids.npy")]
    free, result = peak_of(base, tmp_path)
    capped, again = peak_of([*base, "--max-memory", "460MB"], tmp_path)
    print(f"peak {free / 1e6:.0f} MB without a cap, {capped / 1e6:.0f} MB with one")
    assert capped < 460e6 < free
    for key in ("tokens", "sequences"):
        assert result[key] == again[key]
    assert again["nll"] == pytest.approx(result["nll"], rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a child")
def test_peak_does_not_grow_with_engram_tables(tmp_path: Path) -> None:
    """Two gigabytes of table, which the file system pretends, under a cap of half of one."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 3, "n_routed_experts": 2}
    sizes |= {"dspark_n_routed_experts": 2}
    np.save(tmp_path / "ids.npy", np.random.default_rng().integers(3, 400, (3, 500)))
    peaks = []
    for rows in (10_000, 30_000_000):
        folder = tmp_path / str(rows)
        write_checkpoint(
            folder,
            Request("v41", overrides=tuple(sizes.items()), engram_rows=rows, headers_only=True),
        )
        table = max(p.stat().st_size for p in folder.iterdir())
        base = [sys.executable, "-m", "v4quant", "evaluate", str(folder), "--json"]
        command = [*base, "--corpus", str(tmp_path / "ids.npy"), "--max-memory", "500MB"]
        peak, result = peak_of(command, tmp_path)
        print(f"{rows:,} rows, largest file {table / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
        assert result["tokens"] == 3 * 499
        peaks.append(peak)
    assert table > 1.9e9
    assert max(peaks) < 500e6
    assert abs(peaks[1] - peaks[0]) < 20e6
