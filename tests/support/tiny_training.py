"""What both tests of the training script need: words, seeds, one small run of it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WORDS = [chr(97 + i % 26) + "aeiou"[i % 5] + "nrst"[i % 4] for i in range(60)]


@pytest.fixture
def script_rooms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts' packages can be imported, and arithmetic takes one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield
    torch.set_num_threads(threads)


def seeded() -> torch.Generator:
    """Fresh randomness, repeatable from what a failing test shows."""
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    return torch.Generator().manual_seed(seed)


def prose(generator: torch.Generator, words: int) -> str:
    """Made-up words."""
    picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    return " ".join(WORDS[i] for i in picks)


def train(
    folder: Path,
    config: dict[str, Any],
    generator: torch.Generator,
    words: tuple[int, int],
    options: Sequence[str],
) -> str:
    """Two steps of the script into `folder/out`, on so many words of text and held-out text; what
    it said, which is an error only if the test fails here."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "train.txt").write_text(prose(generator, words[0]))
    (folder / "held.txt").write_text(prose(generator, words[1]))
    command = [sys.executable, str(ROOT / "scripts" / "train_tiny_v4.py")]
    command += ["--out", str(folder / "out"), "--steps", "2", "--heldout-windows", "2"]
    command += ["--only-given-text", "--text", str(folder / "train.txt")]
    command += ["--heldout", str(folder / "held.txt"), "--config", str(folder / "config.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "held.txt: perplexity" in run.stdout
    return run.stdout
