"""Mutate real checkpoint files for as long as told; every outcome is success or a V4QuantError.

    python scripts/fuzz.py --seconds 60
    python scripts/fuzz.py --seed 1234 --rounds 1     # repeat one round

Each round copies a small checkpoint, damages one to three of its files (bytes flipped, cut, grown,
or swapped; header and index entries rewritten with plausible lies; files removed or linked)
and then opens, inspects, plans, converts and verifies it. A crash of any other kind, a round that
takes longer than --round-seconds or memory beyond --max-memory ends the run with the seed that
repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from v4quant.checks.inspection import inspect_checkpoint
from v4quant.checks.verify import verify
from v4quant.conversion.job import run_job
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant.sizes import parse_size
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress

DEFAULT_SOURCE = Path(__file__).parents[1] / "tests" / "data" / "tiny-a"
SCHEMES = ("int4-g32", "int8-g128", "fp8", "mxfp4", "nvfp4")
LIES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, float("nan"), "", "x", "../x", "/etc/passwd",
    [], [0], [-1, 4], [2**62, 8], [[1]], {}, {"a": 1}, "F8_E4M3", "I8", "BF16", "F4", "\x00",
]  # fmt: skip


def flip_bytes(path: Path, rng: random.Random) -> None:
    """Overwrite a few bytes anywhere."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 8, 64))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def flip_front(path: Path, rng: random.Random) -> None:
    """Overwrite bytes of the header, where they hurt most."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 10))):
        if data:
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Truncate."""
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def grow(path: Path, rng: random.Random) -> None:
    """Append bytes."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 7, 4096))))


def remove(path: Path, rng: random.Random) -> None:
    """Delete, or replace by a folder, a link or nothing."""
    path.unlink()
    kind = rng.randrange(4)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.write_bytes(b"")


def swap(path: Path, rng: random.Random) -> None:
    """Give the file another file's content."""
    others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
    if others:
        shutil.copyfile(rng.choice(sorted(others)), path)


def lie_in_json(path: Path, rng: random.Random) -> None:
    """Change, drop or duplicate an entry of a JSON file or of a shard's header."""
    data = path.read_bytes()
    shard = path.suffix == ".safetensors"
    length = struct.unpack("<Q", data[:8])[0] if shard and len(data) > 8 else 0
    try:
        text = data[8 : 8 + length] if shard else data
        table = json.loads(text)
    except ValueError:
        return
    _lie(table, rng)
    text = json.dumps(table).encode()
    if shard:
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(data if shard else text)


def _lie(table: Any, rng: random.Random) -> None:
    """Walk to a random place and put a lie there."""
    for _ in range(rng.randrange(1, 5)):
        keys = list(table) if isinstance(table, dict) else list(range(len(table)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(table[key], dict | list) and rng.random() < 0.8:
            table = table[key]
            continue
        if rng.random() < 0.15 and isinstance(table, dict):
            table[rng.choice(("new", "layers.0.attn.wq_a.weight", "../x"))] = table.pop(key)
        elif isinstance(table[key], int) and rng.random() < 0.5:
            table[key] += rng.choice((-1, 1, 8, 2**40))
        else:
            table[key] = rng.choice(LIES)
        return


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flip_bytes, flip_front, cut, grow, remove, swap, lie_in_json, lie_in_json, lie_in_json,
]  # fmt: skip


def one_round(source: Path, work: Path, seed: int) -> str:
    """Mutate a copy and put it through everything; the outcome in a word."""
    rng = random.Random(seed)
    folder, out = work / "in", work / "out"
    shutil.copytree(source, folder)
    for _ in range(rng.randrange(1, 4)):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())
        if files:
            rng.choice(MUTATIONS)(rng.choice(files), rng)
    try:
        with open_checkpoint(folder) as checkpoint:
            inspect_checkpoint(checkpoint, SilentProgress(), deep=True)
            recipe = Recipe(rng.choice(SCHEMES), unknown=rng.choice(("refuse", "copy")))
            run_job(make_plan(checkpoint, recipe), out, workers=1)
        damage(out, rng)
        verify(out, folder, SilentProgress())
    except V4QuantError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            raise AssertionError(f"message is not one line: {error!r}") from error
        where = "verify" if (out / INDEX_NAME).exists() else "input"
        return f"refused ({where}): {type(error).__name__}"
    return "success"


def damage(out: Path, rng: random.Random) -> None:
    """Half of the time, damage the output too, so that verify reads hostile files."""
    if rng.random() < 0.5:
        path = rng.choice(sorted(p for p in out.iterdir() if p.is_file()))
        rng.choice(MUTATIONS)(path, rng)


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError("the round took too long")


def main() -> int:
    """Run rounds until the time is over; 0 when every outcome was fine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=DEFAULT_SOURCE)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, help="stop after this many")
    parser.add_argument("--seed", type=int, help="seed of the first round (default: random)")
    parser.add_argument("--round-seconds", type=int, default=30)
    parser.add_argument("--max-memory", default="8GiB", help="address space of the process")
    args = parser.parse_args()
    limit = parse_size(args.max_memory)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _too_slow)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**32)
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + args.seconds
    while time.monotonic() < end and (args.rounds is None or outcomes.total() < args.rounds):
        with tempfile.TemporaryDirectory() as work:
            signal.alarm(args.round_seconds)
            try:
                outcomes[one_round(args.source, Path(work), seed)] += 1
            except BaseException:
                print(f"FAILED: repeat with --seed {seed} --rounds 1", file=sys.stderr)
                raise
            finally:
                signal.alarm(0)
        seed += 1
    for outcome, count in outcomes.most_common():
        print(f"{count:7}  {outcome}")
    print(f"{outcomes.total():7}  rounds, all fine; next seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
