"""A release at any size from hub to hub through v4quant, killed once, resumed, and sampled.

    python scripts/full_scale.py --release flash --tiny --scheme int4-g32 --out work     # a minute
    python scripts/full_scale.py --release flash --scheme nvfp4 --out work               # 159.6 GB
    python scripts/full_scale.py --release pro --set num_hidden_layers=4 --scheme mxfp4 --out work

The hub (script_tools/release_hub.py) makes the source's bytes when they are asked for and drops
what is uploaded, so neither side needs room; the conversion is the unmodified command with the
unmodified client, a process of its own under a disk cap. It is killed with SIGKILL when a third of
the output has arrived, and the same command finishes. Then every sampled module is decoded from
both sides by the independent decoder and compared with what the manifest says of it. At full size
the source's hashes take some minutes before the first request; `--hashes FILE` keeps them for the
next run. The JSON on stdout holds seconds, CPU seconds, peak memory, the most disk seen, bytes and
requests; exit code 1 means a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from script_tools.release_hub import SOURCE, TOKEN, USER, ReleaseHub
from script_tools.releases import Release

from v4quant.checks.independent_decoder import decode_rows
from v4quant.conversion.records import record_from_dict
from v4quant.synthetic.configs import RELEASES
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.shards import shard_header
from v4quant_formats.spec import TensorSpec
from v4quant_formats.weights import find_weight

TARGET = f"{USER}/converted"


class Watch(threading.Thread):
    """Samples a process's memory and processor time, and its folder's bytes of shards."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        super().__init__(daemon=True)
        self._process, self._folder = psutil.Process(process.pid), folder
        self.peak_bytes, self.disk_bytes, self.cpu_seconds = 0, 0, 0.0

    def run(self) -> None:
        try:
            while True:
                times = self._process.cpu_times()
                self.cpu_seconds = times.user + times.system
                self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
                self.disk_bytes = max(self.disk_bytes, _shards_in(self._folder))
                time.sleep(0.05)
        except psutil.Error:
            return


def _shards_in(folder: Path) -> int:
    total = 0
    with suppress(OSError):  # files come and go, in the end the folder too
        for path in folder.rglob("*.safetensors*"):
            with suppress(OSError):
                total += path.stat().st_size
    return total


def convert(hub: ReleaseHub, options: argparse.Namespace, kill_after: int | None) -> dict[str, Any]:
    """Run the conversion; kill it when so many bytes have arrived. Figures of this run."""
    work = options.out / "work"
    command = [sys.executable, "-m", "v4quant", "quantize", f"hf://{SOURCE}", f"hf://{TARGET}"]
    command += ["--scheme", options.scheme, "--scratch", str(work)]
    command += ["--disk-cap", options.disk_cap] if options.disk_cap else []
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(options.out / "home"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    started = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        watch = Watch(process, work)
        watch.start()
        while process.poll() is None:
            if kill_after is not None and hub.received >= kill_after:
                process.kill()
            time.sleep(0.02)
        watch.join()
    return {
        "code": process.returncode, "seconds": time.monotonic() - started,
        "cpu_seconds": watch.cpu_seconds, "peak_bytes": watch.peak_bytes,
        "disk_bytes": watch.disk_bytes,
    }  # fmt: skip


def check(hub: ReleaseHub, folder: Path) -> tuple[int, list[str]]:
    """Decode every sampled module from both sides; how many, and what differs."""
    files = hub.repos[TARGET]
    manifest = json.loads(hub.small[files[MANIFEST_NAME].blob])
    records = {r.module: r for r in map(record_from_dict, manifest["tensors"])}
    problems = [
        f"{row['name']}: {files.get(row['name'])} is not what the manifest says"
        for row in manifest["files"]
        if row["name"] not in files or files[row["name"]].size != row["bytes"]
        or files[row["name"]].sha256 not in ("", row["sha256"])
    ]  # fmt: skip
    kept: dict[str, tuple[TensorSpec, bytes | memoryview]] = {}
    for entry in files.values():
        if entry.sha256:
            uploaded = hub.objects[entry.sha256]
            for name, data in uploaded.tensors.items():
                told = uploaded.header[name]
                kept[name] = TensorSpec(name, told["dtype"], tuple(told["shape"])), data
    config = hub.small[files["config.json"].blob]
    modules = {name.rpartition(".")[0] for name in kept}
    source = {
        s.name: (s, hub.release.tensor(s))
        for plan in hub.release.plans.values() for s in plan.specs
        if s.name.rpartition(".")[0] in modules
    }  # fmt: skip
    with (
        _checkpoint(folder / "source", hub.release.small["config.json"], source) as before,
        _checkpoint(folder / "converted", config, kept) as after,
    ):
        compared = 0
        for module in sorted(modules & records.keys()):
            compared += 1
            problems += _compare(before, after, records[module])
    return compared, problems


def _checkpoint(
    folder: Path, config: bytes, tensors: dict[str, tuple[TensorSpec, bytes | memoryview]]
) -> Checkpoint:
    """A folder that holds these tensors and nothing else."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(config)
    header = shard_header([spec for spec, _ in tensors.values()])
    order = [n for n in json.loads(header[8:]) if n != "__metadata__"]
    data = header + b"".join(tensors[name][1] for name in order)
    (folder / "model.safetensors").write_bytes(data)
    return open_checkpoint(folder)


def _compare(before: Checkpoint, after: Checkpoint, record: Any) -> list[str]:
    a, b = find_weight(before, record.module), find_weight(after, record.module)
    if len(a.shape) != 2:
        return []
    x, y = decode_rows(before, a, 0, a.shape[0]), decode_rows(after, b, 0, b.shape[0])
    if record.exact:
        return [] if np.array_equal(x, y) else [f"{record.module}: declared exact, but differs"]
    rms = float(np.sqrt(((y - x) ** 2).sum() / (x**2).sum()))
    near = abs(rms - record.relative_rms) <= 1e-4 * rms + 1e-12
    return (
        [] if near else [f"{record.module}: error {rms}, the manifest says {record.relative_rms}"]
    )


def main() -> int:
    """The whole run; 0 when everything is as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--release", choices=RELEASES, default="flash")
    add("--tiny", action="store_true", help="the release's layout in small")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=N",
        help="any integer config field, num_hidden_layers=4 for fewer shards",
    )
    add("--scheme", default="nvfp4")
    add("--disk-cap", help="as of quantize")
    add("--samples", type=int, default=4, help="modules checked in each output shard")
    add("--no-kill", action="store_true", help="one run from end to end, for its figures")
    add("--seed", type=int, help="which modules are checked (default: random)")
    add("--hashes", type=Path, help="file of the source's hashes; written if absent")
    add("--out", type=Path, required=True, help="folder for work files (absent)")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    overrides = {k: int(v) for k, _, v in (item.partition("=") for item in options.set)}
    release = Release(options.release, overrides, options.tiny, options.out / "large")
    nbytes = sum(plan.nbytes for plan in release.plans.values())
    with ReleaseHub(release, seed, options.samples, options.hashes) as hub:
        killed = None if options.no_kill else convert(hub, options, nbytes // 3)
        finished = convert(hub, options, None)
        problems = [] if finished["code"] == 0 else ["the conversion did not end well"]
        compared = 0
        if not problems:
            compared, problems = check(hub, options.out / "check")
    print(json.dumps({
        "release": options.release, "scheme": options.scheme, "seed": seed, "bytes": nbytes,
        "shards": len(release.plans), "killed": killed, "finished": finished,
        "sent_bytes": hub.sent, "received_bytes": hub.received, "requests": hub.requests,
        "compared": compared, "problems": problems,
    }, indent=1))  # fmt: skip
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
