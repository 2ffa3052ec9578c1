"""Make a checkpoint with random weights in the layout of any DeepSeek-V4 release.

    python scripts/make_synthetic.py --release flash --out tiny-flash
    python scripts/make_synthetic.py --release pro --scale full --headers-only --out pro-headers
    python scripts/make_synthetic.py --release flash --scale full --layers 4 --experts 8 --out part
    python scripts/make_synthetic.py --release flash --spread 15 --out adversarial

Converters need something to be tried on that is not 160 GB: the right names, dtypes, shapes and
order, with values of the right size, and on request the values that break careless code. Random
weights say nothing about quality; for that there is the trained model of train_tiny_v4.py.

Data is written one tensor at a time in bounded memory, and the same seed gives the same bytes.
`--headers-only` writes true headers over sparse files: all 145,116 tensors of Pro, to be inspected
and planned, on a few megabytes of disk (do not copy such files without sparse support).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from v4quant.synthetic.configs import RELEASES
from v4quant.synthetic.errors import RequestError
from v4quant.synthetic.values import DEFAULT_MODULE, Faults
from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_kernels.errors import V4QuantError

_FIELDS = {
    "layers": "num_hidden_layers",
    "experts": "n_routed_experts",
    "width": "hidden_size",
    "inner": "moe_intermediate_size",
    "vocab": "vocab_size",
}


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Request]:
    """The command line, and what it asks for."""
    parser = argparse.ArgumentParser(
        description="Make a checkpoint with random weights in the layout of a DeepSeek-V4 release.",
        epilog="example: python scripts/make_synthetic.py --release flash-dspark --out tiny",
    )
    add = parser.add_argument
    add("--release", choices=RELEASES, required=True, help="whose layout")
    add("--out", type=Path, required=True, help="folder to write (absent or empty)")
    add("--scale", choices=("tiny", "full"), default="tiny", help="dimensions (default tiny)")
    add("--seed", type=int, default=0, help="random seed (default 0)")
    add("--layers", type=int, help="trunk layers; the kinds of the first ones are kept")
    add("--experts", type=int, help="routed experts a layer")
    add("--width", type=int, help="hidden size, a multiple of 32")
    add("--inner", type=int, help="intermediate size of an expert, a multiple of 32")
    add("--vocab", type=int, help="vocabulary size")
    add("--set", action="append", default=[], metavar="KEY=N", help="any integer config field")
    add("--engram-rows", type=int, help="about so many rows in each of V4.1's n-gram tables")
    add("--headers-only", action="store_true", help="true headers, sparse files, no data")
    add("--spread", type=int, help="plant scales this many octaves apart in one tile")
    add("--zero-groups", action="store_true", help="plant groups of zeros")
    add("--edge-bytes", action="store_true", help="plant the scale bytes 0, 1, 253 and 254")
    add("--nan-scale", action="store_true", help="plant the scale byte 255 (NaN)")
    add("--plant-in", action="append", metavar="MODULE", help=f"where (default {DEFAULT_MODULE})")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    chosen = {key: getattr(args, key) for key in _FIELDS}
    overrides = {_FIELDS[k]: v for k, v in chosen.items() if v is not None}
    for assignment in args.set:
        key, _, value = assignment.partition("=")
        if not value.isdecimal():
            parser.error(f"--set {assignment}: expected KEY=N with a whole number")
        overrides[key] = int(value)
    if min(overrides.values(), default=1) < 1:
        parser.error("sizes must be at least 1")
    faults = Faults(
        modules=tuple(args.plant_in or [DEFAULT_MODULE]),
        spread=args.spread,
        zero_groups=args.zero_groups,
        edge_bytes=args.edge_bytes,
        nan_scale=args.nan_scale,
    )
    return args, Request(
        release=args.release,
        tiny=args.scale == "tiny",
        overrides=tuple(overrides.items()),
        engram_rows=args.engram_rows,
        seed=args.seed,
        headers_only=args.headers_only,
        faults=faults,
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the checkpoint and say what it holds."""
    args, request = parse_arguments(arguments)
    try:
        written = write_checkpoint(args.out, request)
    except (RequestError, V4QuantError) as error:
        sys.exit(f"Error: {error}")
    if args.json:
        print(json.dumps(asdict(written)))
        return
    kinds = ", ".join(f"{n:,} {dtype}" for dtype, n in sorted(written.dtypes.items()))
    counts = f"{written.files} files, {written.tensors:,} tensors, {written.bytes:,} bytes"
    print(f"{args.out}: {counts}")
    print(f"of which {kinds}")


if __name__ == "__main__":
    main()
