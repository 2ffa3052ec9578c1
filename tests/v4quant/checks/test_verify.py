"""Verification finds nothing in good output, and names whatever was tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibration.oracle_loader import OracleParams
from tests.support.conversion import SCHEMES, TINY
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.checks.independent_decoder import decode_rows
from v4quant.checks.verify import Finding, verify
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.deepseek_v4 import split_part
from v4quant_formats.manifest import ManifestError, sealed
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weights import find_weight
from v4quant_kernels.progress import SilentProgress

Converted = Callable[[str], Path]
SHARD = "model-00001-of-00002.safetensors"
EXPERT = "layers.1.ffn.experts.2"


def findings(out: Path, source: Path | None = TINY) -> tuple[Finding, ...]:
    return verify(out, source, SilentProgress()).findings


def told(found: tuple[Finding, ...], where: str, text: str = "") -> bool:
    return any(where in f.where + f.problem and text in f.problem for f in found)


@pytest.fixture
def copy(converted: Converted, tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of a converted checkpoint, to be spoiled."""
    return lambda scheme: Path(shutil.copytree(converted(scheme), tmp_path / scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_good_output(scheme: str, converted: Converted) -> None:
    result = verify(converted(scheme), TINY, SilentProgress())
    assert result.findings == ()
    assert result.compared == result.modules > 150 and result.files == 4
    lossy = scheme.startswith(("int4", "int3", "int2"))
    assert result.exact == result.modules - (60 if lossy else 0)
    alone = verify(converted(scheme), None, SilentProgress())
    assert (alone.findings, alone.compared) == ((), 0)


@pytest.mark.parametrize("file", ["config.json", INDEX_NAME, SHARD])
@pytest.mark.parametrize("at", [0.0, 0.5, 0.999])
def test_one_flipped_bit_of_any_file(file: str, at: float, copy: Callable[[str], Path]) -> None:
    out = copy("int4-g32")
    content = bytearray((out / file).read_bytes())
    content[int(at * len(content))] ^= 1
    (out / file).write_bytes(content)
    for source in (None, TINY):
        assert told(findings(out, source), file, "bytes differ")


@pytest.mark.parametrize("file", ["config.json", INDEX_NAME, SHARD])
def test_missing_file(file: str, copy: Callable[[str], Path]) -> None:
    out = copy("int4-g32")
    (out / file).unlink()
    assert told(findings(out), file, "missing")
    (out / "v4quant.json").unlink()
    with pytest.raises(ManifestError, match="not written by v4quant"):
        findings(out)


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its own digest with it."""
    path = out / "v4quant.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(sealed(manifest)))


def row(manifest: dict[str, Any], module: str) -> dict[str, Any]:
    return next(r for r in manifest["tensors"] if r["module"] == module)


NUMBERS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("relative_rms", lambda m: row(m, f"{EXPERT}.w1").update(relative_rms=0.01), f"{EXPERT}.w1"),
    ("rms by 1 %", lambda m: row(m, f"{EXPERT}.w1").update(
        relative_rms=row(m, f"{EXPERT}.w1")["relative_rms"] * 1.01), f"{EXPERT}.w1"),
    ("max_error", lambda m: row(m, f"{EXPERT}.w1").update(max_error=1e-9), f"{EXPERT}.w1"),
    ("elements", lambda m: row(m, f"{EXPERT}.w1").update(elements=1), f"{EXPERT}.w1"),
    ("elements of a norm", lambda m: row(m, "norm").update(elements=127), "norm"),
    ("exact", lambda m: row(m, f"{EXPERT}.w1").update(exact=True), f"{EXPERT}.w1"),
    ("disposition", lambda m: row(m, f"{EXPERT}.w1").update(disposition="cast", exact=True),
     f"{EXPERT}.w1"),
    ("altered", lambda m: row(m, "layers.0.attn.wq_a").update(altered=3), "layers.0.attn.wq_a"),
    ("file size", lambda m: m["files"][0].update(bytes=1), SHARD),
    ("file hash", lambda m: m["files"][0].update(sha256="0" * 64), SHARD),
    ("file name", lambda m: m["files"][0].update(name="other.safetensors"), "other.safetensors"),
    ("file outside", lambda m: m["files"][0].update(name="../secret"), "outside"),
    ("absolute file", lambda m: m["files"][0].update(name="/etc/passwd"), "outside"),
    ("source digest", lambda m: m["source"].update(digest="0" * 64), str(TINY)),
    ("source tensors", lambda m: m["source"].update(tensors=1), "v4quant.json"),
    ("source bytes", lambda m: m["source"].update(bytes=1), "v4quant.json"),
    ("no source", lambda m: m.update(source=None), "v4quant.json"),
    ("module forgotten", lambda m: m["tensors"].remove(row(m, f"{EXPERT}.w1")), f"{EXPERT}.w1"),
    ("module invented", lambda m: m["tensors"].append({**row(m, "norm"), "module": "x"}), "x"),
    ("module twice", lambda m: m["tensors"].append(row(m, "norm")), "twice"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "where"), NUMBERS, ids=[n[0] for n in NUMBERS])
def test_one_changed_fact_of_the_manifest(
    name: str, change: Callable[[dict[str, Any]], object], where: str, copy: Callable[[str], Path]
) -> None:
    out = copy("int4-g32")
    edit_manifest(out, change)
    assert told(findings(out), where), name


@pytest.mark.parametrize("change", [
    lambda m: m.update(manifest_version=99),
    lambda m: m["tensors"].append({"module": "x"}),
    lambda m: m["tensors"].append({**m["tensors"][0], "elements": "many"}),
    lambda m: m["tensors"].append({**m["tensors"][0], "unknown": 1}),
    lambda m: m["tensors"].append(3),
    lambda m: m["files"].append({}),
])  # fmt: skip
def test_manifest_of_another_form(
    change: Callable[[dict[str, Any]], object], copy: Callable[[str], Path]
) -> None:
    out = copy("mxfp4")
    edit_manifest(out, change)
    with pytest.raises(ManifestError):
        findings(out)


def tamper(out: Path, change: Callable[[EditableCheckpoint], object]) -> None:
    """Change tensors, then make every hash true again: only the values can tell."""
    edited = EditableCheckpoint.read(out)
    kept = {n: (out / n).read_bytes() for n in ("config.json", INDEX_NAME)}
    change(edited)
    edited.write(out)
    for name, content in kept.items():
        (out / name).write_bytes(content)

    def rehash(manifest: dict[str, Any]) -> None:
        for entry in manifest["files"]:
            content = (out / entry["name"]).read_bytes()
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit_manifest(out, rehash)
    assert not findings(out, None), "hashes and structure are fine"


def swap(a: str, b: str) -> Callable[[EditableCheckpoint], None]:
    def change(c: EditableCheckpoint) -> None:
        c[a].data, c[b].data = c[b].data, c[a].data

    return change


def flip(name: str, at: int, mask: int) -> Callable[[EditableCheckpoint], None]:
    def change(c: EditableCheckpoint) -> None:
        data = bytearray(c[name].data)
        data[at] ^= mask
        c[name].data = bytes(data)

    return change


def double_scale(name: str) -> Callable[[EditableCheckpoint], None]:
    def change(c: EditableCheckpoint) -> None:
        scale = torch.frombuffer(bytearray(c[name].data), dtype=torch.bfloat16) * 2
        c[name].data = scale.view(torch.uint8).numpy().tobytes()

    return change


TAMPERED: list[tuple[str, str, Callable[[EditableCheckpoint], object], str]] = [
    ("swapped w1 and w3", "int4-g32",
     swap(f"{EXPERT}.w1.weight_packed", f"{EXPERT}.w3.weight_packed"), f"{EXPERT}.w3"),
    ("swapped experts", "mxfp4",
     swap(f"{EXPERT}.w1.weight", "layers.1.ffn.experts.0.w1.weight"), f"{EXPERT}.w1"),
    ("doubled scale", "int4-g32", double_scale(f"{EXPERT}.w2.weight_scale"), f"{EXPERT}.w2"),
    ("one code", "int8-g32", flip(f"{EXPERT}.w2.weight_packed", 77, 1), f"{EXPERT}.w2"),
    ("one sign", "mxfp4", flip(f"{EXPERT}.w2.weight", 77, 0x80), f"{EXPERT}.w2"),
    ("one scale", "nvfp4", flip(f"{EXPERT}.w1.weight_scale", 3, 0x08), f"{EXPERT}.w1"),
    ("second-level scale", "nvfp4", flip(f"{EXPERT}.w1.weight_scale_2", 2, 0x80), f"{EXPERT}.w1"),
    ("a tile's scale", "fp8", flip("layers.0.attn.wq_a.scale", 2, 0x80), "layers.0.attn.wq_a"),
    ("one dense element", "int4-g32", flip("layers.0.attn.wq_a.weight", 0, 1),
     "layers.0.attn.wq_a"),
    ("one bit of a norm", "int4-g32", flip("norm.weight", 0, 1), "norm"),
    ("a routing entry", "int4-g32", flip("layers.0.ffn.gate.tid2eid", 8, 1), "tid2eid"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scheme", "change", "where"), TAMPERED, ids=[t[0] for t in TAMPERED]
)
def test_rehashed_tampering(
    name: str, scheme: str, change: Callable[[EditableCheckpoint], object], where: str,
    copy: Callable[[str], Path],
) -> None:  # fmt: skip
    out = copy(scheme)
    tamper(out, change)
    assert told(findings(out), where), name


def test_another_source(copy: Callable[[str], Path], tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    flip(f"{EXPERT}.w1.scale", 5, 1)(edited)
    other = edited.write(tmp_path / "other")
    found = findings(copy("mxfp4"), other)
    assert told(found, str(other), "not the checkpoint") or told(found, f"{EXPERT}.w1")
    assert told(found, f"{EXPERT}.w1", "declared exact")


def test_extra_and_lost_tensors(copy: Callable[[str], Path]) -> None:
    out = copy("mxfp4")
    edited = EditableCheckpoint.read(out)
    edited.add("layers.0.extra", "F32", (1,), bytes(4))
    edited.remove("norm.weight")
    edited.write(out)
    found = findings(out)
    assert told(found, "norm", "config.json requires") and told(found, "layers.0.extra")


@pytest.mark.parametrize("scheme", ["source", *SCHEMES])
def test_second_decoder_agrees_with_the_oracle(scheme: str, converted: Converted) -> None:
    """Whole and from a later row; lossless forms against values of the safetensors library."""
    folder = TINY if scheme == "source" else converted(scheme)
    oracle = OracleParams(TINY)
    with open_checkpoint(folder) as checkpoint:
        for module in {split_part(n)[0] for n in checkpoint.tensors}:
            stored = find_weight(checkpoint, module)
            if "weight" not in stored.parts and "weight_packed" not in stored.parts:
                continue
            if scheme.startswith(("int4", "int3", "int2")) and ".experts." in module:
                continue
            rows = stored.shape[0]
            want = oracle(module).double().numpy().reshape(rows, -1)
            got = decode_rows(checkpoint, stored, 0, rows).reshape(rows, -1)
            assert (got == want).all(), module
            if rows > 128 and len(stored.shape) == 2:
                assert np.array_equal(decode_rows(checkpoint, stored, 128, rows), want[128:])
