"""Several ranks: a complete and fair division, the same bytes, and dead ranks made up for."""

from __future__ import annotations

import filecmp
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from v4quant.conversion.job import run_job
from v4quant.conversion.plan import ShardPlan, make_plan
from v4quant.conversion.ranks import Ranks, current_ranks
from v4quant.recipe import Recipe
from v4quant_formats.opening import open_checkpoint

SOURCE = Path(__file__).parents[2] / "data" / "tiny-a"


class _Sized(ShardPlan):
    """A shard plan of a given size, for the division alone."""

    nbytes = 0  # type: ignore[assignment]


def _shards(sizes: list[int]) -> list[ShardPlan]:
    shards: list[ShardPlan] = []
    for i, size in enumerate(sizes):
        shard = _Sized(f"model-{i:05}.safetensors", ())
        object.__setattr__(shard, "nbytes", size)
        shards.append(shard)
    return shards


def test_division_is_complete_disjoint_and_balanced() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for size in (1, 2, 3, 7):
        shards = _shards([rng.randrange(1, 1000) for _ in range(rng.randrange(1, 60))])
        shares = [Ranks(r, size).share(shards) for r in range(size)]
        files = [s.file for share in shares for s in share]
        assert sorted(files) == [s.file for s in shards]
        loads = [sum(s.nbytes for s in share) for share in shares]
        assert max(loads) - min(loads) <= max(s.nbytes for s in shards)
        for share in shares:
            assert share == [s for s in shards if s in share], "plan order is kept"


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with current_ranks() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1) and ranks.run != Ranks().run
        ranks.barrier()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    with open_checkpoint(SOURCE) as checkpoint:
        run_job(make_plan(checkpoint, Recipe("int4-g32")), out, workers=1)
    return out


def _torchrun(ranks: int, out: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
        "--master-addr=127.0.0.1", f"--master-port={random.randrange(20000, 40000)}",
        "-m", "v4quant", "quantize", os.fspath(SOURCE), os.fspath(out),
        "--scheme", "int4-g32", "--workers", "1",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _assert_same(a: Path, b: Path) -> None:
    names = sorted(p.relative_to(a).as_posix() for p in a.rglob("*"))
    assert names == sorted(p.relative_to(b).as_posix() for p in b.rglob("*"))
    _, mismatch, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    assert not mismatch and not errors


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_same_bytes(ranks: int, expected: Path, tmp_path: Path) -> None:
    assert _torchrun(ranks, tmp_path / "out").wait(120) == 0
    _assert_same(expected, tmp_path / "out")


def test_killed_group_is_made_up_for_by_another_size(expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _torchrun(2, out)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert _torchrun(3, out).wait(120) == 0
    _assert_same(expected, out)
