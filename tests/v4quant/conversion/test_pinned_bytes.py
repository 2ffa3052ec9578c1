"""The same conversions give the same bytes from release to release.

Digests of whole outputs (all files but the manifest, which names the version) of the tiny random
checkpoint. They were taken before the source tree was rebuilt; a change of one is a change of what
users get, and belongs into the change log together with the new digest.

Nothing here needs statistics, so no product of matrices whose order of sums a processor may choose
is behind these bytes: they are the same on every machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert, folder_bytes

MANIFEST = "v4quant.json"
PINNED = {
    "mxfp4": "e6fcccc549370cbf",
    "fp8": "a2daa6c3bac9f585",
    "bf16": "3fc31700fc8aea73",
    "nvfp4": "f2ebe4aa489f7433",
    "int8-g32": "47f830786d10aa93",
    "int4-g32": "00738d68721622a1",
    "int3-g128": "d3a7849afdf9b475",
    "int2-g64": "e22c5d0a73d98ac2",
    "mxfp8": "93d7b269156ef3a1",
    "mxfp4/compressed-tensors@vllm": "eef4c77f9453eb39",
    "int4-g32@vllm": "49d4345ec08f155c",
    "nvfp4@sglang": "b3e5631438e2d9a4",
    "mxfp4/gguf": "90422843486b9045",
    "q8_0/gguf": "f104dcb4a4f790c8",
    "q6_k/gguf": "d3399bacbbc33b0e",
    "q4_k/gguf": "5fdf350b5a7f6629",
    "q2_k/gguf": "8eb34bcc45199c3b",
}


def digest(folder: Path) -> str:
    """SHA-256 over names and bytes of every file but the manifest."""
    total = hashlib.sha256()
    for name, data in sorted(folder_bytes(folder).items()):
        if name != MANIFEST:
            total.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return total.hexdigest()[:16]


@pytest.mark.parametrize("case", PINNED)
def test_bytes_are_those_of_earlier_versions(case: str, tmp_path: Path) -> None:
    convert(TINY, tmp_path / "out", case)
    assert digest(tmp_path / "out") == PINNED[case]
