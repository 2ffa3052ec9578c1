"""Several processes solving together: nothing missing, and codes as good as one process's."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support import team_worker
from v4quant.calibration.collect import require_work
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solution import load_solution
from v4quant_calibration.solve.team import Team
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.codec import dequantize
from v4quant_kernels.errors import OptionError
from v4quant_kernels.scheme import SCHEMES

ROOT = Path(__file__).parents[3]


def test_windows_are_divided_in_order_and_nobody_is_left_without() -> None:
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    for _ in range(50):
        size = rng.randrange(1, 9)
        texts = [torch.arange(rng.randrange(1, 600)) for _ in range(rng.randrange(size, 60))]
        shares = [Team(rank, size).windows(texts) for rank in range(size)]
        assert all(shares), seed
        assert [id(t) for share in shares for t in share] == [id(t) for t in texts], seed
        tokens = [sum(map(len, share)) for share in shares]
        if len(texts) > 4 * size:
            assert max(tokens) < sum(tokens) / size + 2 * max(map(len, texts)), seed
        modules = list(range(rng.randrange(1, 40)))
        divided = [m for rank in range(size) for m in Team(rank, size).share(modules)]
        assert sorted(divided) == modules, seed


def test_ranks_without_work_are_refused() -> None:
    settings, texts = SolveSettings(SCHEMES["q4_0"]), [torch.arange(8)]
    require_work(Team(), None, texts)
    with pytest.raises(OptionError, match="--solve"):
        require_work(Team(0, 2), None, texts)
    with pytest.raises(OptionError, match="1 windows for 2 ranks"):
        require_work(Team(0, 2), settings, texts)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "solved"
    team_worker.main(folder)
    return folder


def test_a_rank_that_falls_silent_ends_the_others(tmp_path: Path) -> None:
    """One of two is stopped, as a network that dies would leave it: no connection closes."""
    command = [sys.executable, "-m", "tests.support.team_worker", os.fspath(tmp_path / "out"), "4"]
    port = random.randrange(20000, 40000)
    ranks = []
    for rank in range(2):
        told = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {k: str(v) for k, v in told.items()}
        environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE))
    first, second = ranks
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "out").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        second.send_signal(signal.SIGSTOP)  # before that both have met
        told = first.communicate(timeout=80)[1].decode()
        assert first.returncode == 1
        assert "of this run" in told.splitlines()[-1], told
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def _torchrun(ranks: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
        "--master-addr=127.0.0.1", f"--master-port={random.randrange(20000, 40000)}",
        "-m", "tests.support.team_worker", os.fspath(folder),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _check(folder: Path, alone: Path) -> None:
    """The same files and counts; in the first layer the same codes but for ties, later as good."""
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
    told, wanted = (json.loads((f / "solution.json").read_text()) for f in (folder, alone))
    assert told.keys() == wanted.keys() and told["stages"].keys() == wanted["stages"].keys()
    assert told["stages"]["layers.0"]["tokens"] == wanted["stages"]["layers.0"]["tokens"]
    with open_checkpoint(team_worker.TINY) as source:
        ours = load_solution(folder, source.digest())
        theirs = load_solution(alone, source.digest())
        for module, scheme in team_worker.schemes().items():
            values = read_dense(source, module)
            shape = (values.shape[0], values.shape[1])
            pair = [s.solved(module, scheme, shape) for s in (ours, theirs)]
            assert pair[0] is not None and pair[1] is not None, module
            here, there = (dequantize(q) for q in pair if q is not None)
            lost, known = (float((v - values).norm() / values.norm()) for v in (here, there))
            # Rounding decides ties, and these what later layers see: codes differ, not their worth.
            assert lost == pytest.approx(known, rel=0.2), module
            if module.startswith("layers.0."):
                assert float((here == there).float().mean()) > 0.9, module
        for stage, stats in theirs.stats.stages.items():
            found = ours.stats.stages[stage]
            seen, known = (float(s.sums["w13"].sum()) for s in (found, stats))
            assert seen == pytest.approx(known, rel=0.05)
            assert int(found.tokens.sum()) == int(stats.tokens.sum())
        ours.close()
        theirs.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_solve_what_one_process_solves(ranks: int, alone: Path, tmp_path: Path) -> None:
    assert _torchrun(ranks, tmp_path / "out").wait(120) == 0
    _check(tmp_path / "out", alone)


def test_a_killed_team_is_made_up_for_by_another_size(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _torchrun(2, out)
    deadline = time.monotonic() + 200
    while not (out / "layers.0.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert not json.loads((out / "solution.json").read_text())["finished"]
    before = (out / "layers.0.safetensors").stat().st_mtime_ns
    assert _torchrun(3, out).wait(120) == 0
    assert (out / "layers.0.safetensors").stat().st_mtime_ns == before, "solved once"
    _check(out, alone)
