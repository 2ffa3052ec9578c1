"""full_scale.py, small: killed, resumed, and a damaged byte is found."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import load_script

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_a_small_release_from_hub_to_hub(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "full_scale.py", "--release", "flash", "--tiny",
         "--set", "num_hidden_layers=2", "--set", "n_routed_experts=4",
         "--scheme", "int4-g32", "--out", tmp_path / "out"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["killed"]["code"] in (-9, 0) and found["finished"]["code"] == 0
    assert found["compared"] >= found["shards"] and not found["problems"]
    assert found["received_bytes"] > 0 and not (tmp_path / "out" / "work").exists()


def test_the_source_is_the_same_at_every_request() -> None:
    load_script("full_scale")  # makes script_tools known
    from script_tools.releases import Release

    release = Release("flash", {"num_hidden_layers": 1, "n_routed_experts": 2}, True)
    file, plan = max(release.plans.items(), key=lambda item: item[1].nbytes)
    whole = b"".join(release.read(file, 0, plan.nbytes))
    assert len(whole) == plan.nbytes
    for start, stop in ((0, 9), (7, 5000), (plan.nbytes - 3, plan.nbytes)):
        assert b"".join(release.read(file, start, stop)) == whole[start:stop]


def test_a_changed_tensor_is_noticed(tmp_path: Path) -> None:
    script = load_script("full_scale")
    from script_tools.release_hub import Entry, ReleaseHub
    from script_tools.releases import Release
    from script_tools.uploads import Uploaded

    release = Release("flash", {"num_hidden_layers": 1, "n_routed_experts": 2}, True)
    file, spec = next(
        (file, s) for file, plan in release.plans.items() for s in plan.specs
        if s.dtype == "BF16" and len(s.shape) == 2
    )  # fmt: skip
    module = spec.name.rpartition(".")[0]
    record = {"module": module, "disposition": "copied", "source": "bf16", "target": "bf16",
              "elements": spec.numel, "altered": 0}  # fmt: skip
    for flip in (False, True):
        with ReleaseHub(release, 0, 1) as hub:
            data = bytearray(release.tensor(spec))
            data[0] ^= flip
            header = {spec.name: {"dtype": spec.dtype, "shape": list(spec.shape)}}
            hub.objects["a" * 64] = Uploaded(9, b"", header, {spec.name: bytes(data)})
            rows = [{"name": file, "bytes": 9, "sha256": "a" * 64}]
            manifest = json.dumps({"files": rows, "tensors": [record]}).encode()
            config = release.small["config.json"]
            hub.small |= {"m": manifest, "c": config}
            hub.repos[script.TARGET] = {
                file: Entry(9, "", "a" * 64), "v4quant.json": Entry(1, "m"),
                "config.json": Entry(1, "c"),
            }  # fmt: skip
            compared, problems = script.check(hub, tmp_path / str(flip))
        assert compared == 1 and bool(problems) == flip


@pytest.mark.parametrize("seed", [1, 2])
def test_samples_are_whole_modules(seed: int) -> None:
    load_script("full_scale")
    from script_tools.uploads import UploadStream

    names = ["a.w1.weight", "a.w1.scale", "b.weight", "c.weight"]
    header = json.dumps({n: {"data_offsets": [i, i + 1]} for i, n in enumerate(names)}).encode()
    stream = UploadStream(seed, 2)
    for byte in struct.pack("<Q", len(header)) + header + b"abcd":
        stream.add(bytes([byte]))
    wanted = stream.end().tensors
    assert len({n.rpartition(".")[0] for n in wanted}) == 2
    assert ("a.w1.weight" in wanted) == ("a.w1.scale" in wanted)
    assert all(data == b"abcd"[names.index(n) :][:1] for n, data in wanted.items())
