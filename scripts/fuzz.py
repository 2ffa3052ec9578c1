"""Mutate real checkpoint files for as long as told; every outcome is success or a V4QuantError.

    python scripts/fuzz.py --seconds 60
    python scripts/fuzz.py --seed 1234 --rounds 1     # repeat one round

Each round copies a small checkpoint, the release or what another tool makes of it (packs, GGUF,
with an adapter; see script_tools/checkpoints.py), damages one to three of its files (bytes flipped,
cut, grown, or swapped; header and index entries rewritten with plausible lies; files removed or
linked) and then opens, inspects, plans, converts and verifies it. Every other round damages one of
the other files that a user may hand us (recipes, corpora, statistics, journals, cards, ...; see
script_tools/readers.py) and reads it. A crash of any other kind, a round that takes longer than
--round-seconds or memory beyond --max-memory ends the run with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import atexit
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from types import FrameType

from script_tools.checkpoints import CHECKPOINT_SEEDS, CheckpointSeed
from script_tools.mutations import MUTATIONS
from script_tools.readers import READERS, TEXT_MUTATIONS

from v4quant import inspect, quantize, verify
from v4quant.sizes import parse_size
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_kernels.errors import V4QuantError

DEFAULT_SOURCE = Path(__file__).parents[1] / "tests" / "data" / "tiny-a"
SCHEMES = ("int4-g32", "int8-g128", "fp8", "mxfp4", "nvfp4", "q8_0")


def one_round(source: Path, work: Path, seed: int) -> str:
    """Mutate a copy and put it through everything; the outcome in a word."""
    rng = random.Random(seed)
    if seed % 2:
        return one_reader(rng, work)
    folder, out = work / "in", work / "out"
    kind = rng.choice(CHECKPOINT_SEEDS)
    shutil.copytree(_good(kind, source), folder)
    adapter = kind.adapter(work / "adapter") if kind.adapter else None
    places = [folder] if adapter is None else [folder, adapter]
    for _ in range(rng.randrange(1, 4)):
        files = sorted(p for f in places for p in f.iterdir() if p.is_file() and not p.is_symlink())
        if files:
            rng.choice(MUTATIONS)(rng.choice(files), rng)
    try:
        inspect(folder, deep=True)
        scheme, unknown = rng.choice(SCHEMES), rng.choice(("refuse", "copy"))
        quantize(folder, out, scheme=scheme, unknown=unknown, adapter=adapter, workers=1)
        damage(out, rng)
        verify(out, source=folder, adapter=adapter)
    except V4QuantError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            raise AssertionError(f"message is not one line: {error!r}") from error
        where = "verify" if (out / INDEX_NAME).exists() else "input"
        return f"refused ({where}): {type(error).__name__}"
    return "success"


@cache
def _good(kind: CheckpointSeed, source: Path) -> Path:
    """The undamaged folder of a seed, made once in a process."""
    kept = Path(tempfile.mkdtemp(prefix="v4quant-fuzz-"))
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    kind.make(source, kept / "good")
    return kept / "good"


def one_reader(rng: random.Random, work: Path) -> str:
    """Damage one of the small files that commands read, and read it; the outcome in a word."""
    reader = rng.choice(READERS)
    path = reader.make(work)
    for _ in range(rng.randrange(1, 3)):
        if path.is_file() and not path.is_symlink():
            rng.choice((*MUTATIONS, *TEXT_MUTATIONS))(path, rng)
    try:
        reader.read(path)
    except V4QuantError as error:
        return f"refused ({reader.name}): {type(error).__name__}"
    return f"success ({reader.name})"


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
