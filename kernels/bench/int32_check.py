"""Prove that no kernel's address leaves 32 bits at the sizes of V4-Pro.

    python kernels/bench/int32_check.py                  JSON on stdout: kernel, size, problems
    python kernels/bench/int32_check.py --scale 1 1000   at so many times the sizes

The sizes: 384 experts of 7168 x 3072, eight choices for each of 131,072 tokens, an indexer's
262,144 keys (a million tokens of context) for 4,096 tokens, and one key for 131,072 tokens. The
proof is `int32_offsets.py`'s, on the numbers of `intervals.py`. It sees no relation between
numbers, so the counts of a histogram, which add up to what was counted, are each as large as that.
Hence it holds at four times these sizes for every kernel but `place_kernel`, and for
`collect_kernel` with more tokens, but not with more keys.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from compile_grid import Job, launch_of, special_jobs
from int32_offsets import wrapped_addresses
from intervals import Value
from specialisations import first_form

from v4quant_kernels.gpu.tiles import SIZES

EXPERTS, HIDDEN, WIDTH, TOP_K = 384, 7168, 3072, 8
TOKENS, KEYS = 131_072, 262_144
SLOTS = TOKENS * TOP_K
Sizes = dict[str, int]


def up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def at_pro(job: Job, scale: int) -> Iterator[tuple[Job, Sizes, tuple[int, int, int]]]:
    """(kernel with Pro's constants, its integer arguments, grid) for each launch to be proven."""
    c, hidden, width, slots = job.constants, HIDDEN * scale, WIDTH * scale, SLOTS * scale
    routed = {"num_slots": slots, "map_size": EXPERTS, "num_experts": EXPERTS}
    if "gemm" in job.kernel:
        yield from gemms_at_pro(job, routed, hidden, width)
    elif job.kernel in {"count_kernel", "place_kernel"}:
        tiles = {"num_tiles": (slots + EXPERTS * 15) // 16}
        yield job, routed | tiles, (EXPERTS, 1, 1)
    elif job.kernel == "combine_kernel":
        sizes = routed | {"rows": hidden, "hidden": hidden}
        yield job, sizes, (slots // TOP_K, up(hidden, c["BLOCK"]), 1)
    elif job.kernel == "activate_kernel":
        sizes = routed | {"rows": 2 * width, "N": width}
        yield job, sizes, (slots, up(width, c["BLOCK"]), 1)
    elif job.kernel == "quantize_kernel":
        grid = up(slots, c["BR"]), up(hidden, c["BLOCK"]), 1
        yield job, {"rows": slots, "columns": hidden}, grid
    elif job.kernel in {"shared_kernel", "own_kernel"}:
        for tokens, columns in ((4096 * scale, KEYS * scale), (TOKENS * scale, 1)):
            keys = {"total_keys": KEYS * scale, "columns": columns, "skipped": KEYS * scale}
            per_program = (c["BS"], c["BQ"]) if "BQ" in c else (c["BS"] * c["TILES"], c["STEP"])
            programs = up(columns, per_program[0]) * up(tokens, per_program[1])
            yield job, keys | {"tokens": tokens}, (programs, 1, 1)
    elif job.kernel == "expand_kernel":
        vectors = TOKENS * 64 * scale
        yield job, {"vectors": vectors, "results": vectors}, (up(vectors, c["BLOCK"]), 1, 1)
    elif job.kernel == "collect_kernel":
        yield job, {"row_stride": KEYS, "columns": KEYS, "k": 2048}, (4096 * scale, 1, 1)
    else:  # error feedback: K x N of one expert, of which a group at a time
        apart = hidden * width
        names = launch_of(job).integers
        sizes = {n: apart if n.endswith("_batch") else hidden for n in names}
        yield job, sizes, (up(hidden, c["TILE"]), EXPERTS, 1)


def gemms_at_pro(
    job: Job, routed: Sizes, hidden: int, width: int
) -> Iterator[tuple[Job, Sizes, tuple[int, int, int]]]:
    """Gate and up, and down where it ends in sums."""
    c, slots = job.constants, routed["num_slots"]
    if c["BM"] == SIZES[0]:  # taken while experts get no more on average
        slots = min(slots, SIZES[0] * EXPERTS)
    tiles = (slots + EXPERTS * (c["BM"] - 1)) // c["BM"]
    shapes = [(hidden, 2 * width, width, TOP_K)]  # K, rows, channels, slots that share an input
    if c["EPILOGUE"] == "sums":
        shapes.append((width, hidden, hidden, 1))
    for k, rows, channels, sharing in shapes:
        constants = c | {"K": k, "ROWS": rows, "N": channels, "SLOTS_PER_ROW": sharing}
        grid = up(rows, c["BN"]), tiles, c["SPLIT"]
        yield replace(job, constants=constants), routed | {"num_slots": slots}, grid


def data_of(sizes: Sizes) -> dict[str, Value]:
    """What tensors of integers hold that the host or another kernel has filled."""
    slots, last = sizes.get("num_slots", 1), EXPERTS - 1
    keys = sizes.get("total_keys", 1) + sizes.get("skipped", 0)
    return {
        "ids_ptr": Value(-(2**31), 2**31 - 1),
        "map_ptr": Value(-1, last),
        "tile_expert_ptr": Value(-1, last),
        "sorted_slots_ptr": Value(-1, slots - 1),
        "counts_ptr": Value(0, slots),
        "end_ptr": Value(0, keys),
        "first_key_ptr": Value(0, sizes.get("total_keys", 1)),
    }


_FORMS: dict[str, str] = {}


def form_of(job: Job) -> str:
    """TTIR of a kernel, which sizes that are no constants leave as it is."""
    key = f"{job.name} {sorted(job.constants.items(), key=str)}"
    if key not in _FORMS:
        _FORMS[key] = first_form(launch_of(job), job.arch)
    return _FORMS[key]


def check(job: Job, scale: int) -> list[dict[str, Any]]:
    """A record for each launch of the kernel: its name, sizes and problems."""
    found = []
    for placed, sizes, grid in at_pro(job, scale):
        form = form_of(placed)
        problems = wrapped_addresses(form, sizes, grid, data_of(sizes))
        record = {"kernel": job.kernel, "name": placed.name, "scale": scale, "sizes": sizes}
        found.append(record | {"grid": grid, "problems": problems})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove that addresses stay within 32 bits.")
    parser.add_argument("--scale", type=int, nargs="+", default=[1], help="times V4-Pro's sizes")
    scales = parser.parse_args().scale
    records = [r for scale in scales for job in special_jobs() for r in check(job, scale)]
    sys.stdout.write(json.dumps(records))


if __name__ == "__main__":
    main()
