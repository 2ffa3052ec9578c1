"""Several processes between two repositories share work and cap, and nobody who dies is missed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.support.conversion import convert, folder_bytes
from tests.support.fake_hub import TOKEN, USER, FakeHub
from v4quant.publishing.reproduction import RECIPE_NAME

ROOT = Path(__file__).parents[3]
SOURCE, TARGET = "maker/V4-Tiny", f"{USER}/V4-Tiny-INT4"

# Imports once and forks two ranks for every line it reads, as torchrun would start them; tells both
# ids, then each rank as it ends and how.
NURSERY = """
import os, socket, sys
import huggingface_hub, httpx2
from v4quant.cli import cli
for line in sys.stdin:
    scratch, cap, log = line.rstrip().split("|")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            os.dup2(2, 1)
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }
            options = ["--scheme", "int4-g64", "--workers", "1", "--scratch", scratch]
            try:
                cli.main(
                    ["quantize", SOURCE, TARGET, *options, "--disk-cap", cap],
                    standalone_mode=False,
                )
            except BaseException as error:
                with open(f"{log}-{rank}", "w") as out:
                    print(type(error).__name__, error, file=out)
                os._exit(1)
            os._exit(0)
    print(*children, flush=True)
    for _ in range(2):
        child, status = os.wait()
        print(children.index(child), os.waitstatus_to_exitcode(status), flush=True)
"""


class Nursery:
    """The process that starts ranks, and what it says."""

    def __init__(self, hub: FakeHub, tmp_path: Path, cap: int) -> None:
        self._log = tmp_path / "log"
        self._order = f"{tmp_path / 's'}|{cap}|{self._log}\n"
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        script = f"SOURCE, TARGET = 'hf://{SOURCE}', 'hf://{TARGET}'\n{NURSERY}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self) -> list[int]:
        """Start two ranks; their process ids."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(self._order)
        self.process.stdin.flush()
        return list(map(int, self.process.stdout.readline().split()))

    def wait(self) -> tuple[int, int]:
        """Wait until a rank ends: which, and its exit code."""
        assert self.process.stdout is not None
        rank, code = map(int, self.process.stdout.readline().split())
        return rank, code

    def said(self, rank: int) -> str:
        """The error a rank ended with."""
        path = self._log.with_name(f"log-{rank}")
        return path.read_text() if path.exists() else ""


def test_ranks_killed_in_the_middle_are_made_up_for(
    plain_hub: FakeHub, model_files: dict[str, bytes], model_folder: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    convert(model_folder, tmp_path / "expected", "int4-g64")
    expected = folder_bytes(tmp_path / "expected")
    plain_hub.add_repo(SOURCE, model_files, license="mit")
    plain_hub.add_repo(TARGET, {".gitattributes": b""})
    cap = 2 * sum(
        max(len(d) for n, d in files.items() if n.endswith(".safetensors"))
        for files in (model_files, expected)
    )  # what two ranks need
    held: list[int] = []

    def measure(route: str, path: str) -> None:
        with suppress(FileNotFoundError):
            files = [p for p in (tmp_path / "s").rglob("*.safetensors*") if p.suffix != ".json"]
            held.append(sum(p.stat().st_size for p in files))

    def commits() -> int:
        return len(plain_hub.repos[TARGET].commits)

    plain_hub.on_request = measure
    nursery = Nursery(plain_hub, tmp_path, cap)
    with nursery.process:
        for victim in (1, 0):
            before, ranks = commits(), nursery.start()
            deadline = time.monotonic() + 100
            while commits() == before:
                assert time.monotonic() < deadline, (nursery.said(0), nursery.said(1))
                time.sleep(0.005)
            time.sleep(rng.random() * 0.1)
            os.kill(ranks[victim], signal.SIGKILL)
            if victim:  # the first rank may be waiting for it: what torchrun does
                os.kill(ranks[0], signal.SIGTERM)
            ends = dict(nursery.wait() for _ in ranks)
            assert ends[victim] == -signal.SIGKILL and ends[1 - victim], "too late to mean anything"
        assert "RankLost" in nursery.said(1) and "the same command" in nursery.said(1)
        nursery.start()
        ends = dict(nursery.wait() for _ in range(2))
        assert ends == {0: 0, 1: 0}, (nursery.said(0), nursery.said(1))
        assert nursery.process.stdin is not None
        nursery.process.stdin.close()
    found = plain_hub.files(TARGET)
    assert found.keys() - {"README.md", RECIPE_NAME, ".gitattributes"} == expected.keys()
    for name in expected.keys() - {"v4quant.json"}:
        assert found[name] == expected[name], name
    assert 0 < max(held) <= cap
    assert not (tmp_path / "s").exists()
