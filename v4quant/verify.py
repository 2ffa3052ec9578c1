"""verify: does a converted checkpoint hold what its manifest says, byte for byte and value for value?

Without a source: structure, completeness for its config, and every file's SHA-256. With one: every
module is decoded from both sides by the second decoder and compared; exactness claims must hold in
every element, and the error of quantized matrices must be what the manifest says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from v4quant.records import TensorRecord, record_from_dict
from v4quant.second_decoder import decode_rows
from v4quant_formats.checkpoint import Checkpoint, open_checkpoint
from v4quant_formats.deepseek_v4 import expected_modules, split_part
from v4quant_formats.errors import FormatError
from v4quant_formats.manifest import read_manifest
from v4quant_formats.model_config import parse_dimensions
from v4quant_formats.shards import hash_file
from v4quant_formats.weights import find_weight
from v4quant_kernels.progress import Progress

_ROWS = 512  # compared at a time; a multiple of every tile height


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    where: str
    problem: str


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of a verification; `findings` empty means all held."""

    files: int
    modules: int
    compared: int
    exact: int
    findings: tuple[Finding, ...]


def verify(out: Path, source: Path | None, progress: Progress) -> VerifyResult:
    """Check a folder written by `quantize`. Raises FormatError when it cannot even be opened."""
    manifest = read_manifest(out)
    findings = list(_check_files(out, manifest, progress))
    records = {r["module"]: record_from_dict(r) for r in manifest["tensors"]}
    with open_checkpoint(out) as output:
        findings += _check_structure(output, records)
        compared = exact = 0
        if source is not None:
            with open_checkpoint(source) as original:
                findings += _check_identity(original, manifest)
                compared, exact, more = _compare_all(original, output, records, manifest, progress)
                findings += more
    return VerifyResult(len(manifest["files"]), len(records), compared, exact, tuple(findings))


def _check_files(out: Path, manifest: dict[str, Any], progress: Progress) -> Iterator[Finding]:
    progress.start("Hashing", sum(int(f.get("bytes", 0)) for f in manifest["files"]), "B")
    for entry in manifest["files"]:
        name = str(entry.get("name"))
        path = out / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            yield Finding(name, "manifest names a file outside the folder")
        elif not path.is_file():
            yield Finding(name, "file is missing")
        elif path.stat().st_size != entry.get("bytes") or hash_file(path) != entry.get("sha256"):
            yield Finding(name, "bytes differ from the manifest (size or SHA-256)")
        progress.advance(int(entry.get("bytes", 0)))
    progress.finish()


def _check_structure(output: Checkpoint, records: dict[str, TensorRecord]) -> Iterator[Finding]:
    config = parse_dimensions(dict(output.config), str(output.path / "config.json"))
    modules = {split_part(spec.name)[0] for spec in output}
    for module in expected_modules(config, output.tensors):
        if module not in modules:
            yield Finding(module, "missing, but config.json requires it")
    for module in sorted(modules ^ records.keys()):
        yield Finding(module, "in the shards or in the manifest, but not in both")


def _check_identity(original: Checkpoint, manifest: dict[str, Any]) -> Iterator[Finding]:
    said = manifest.get("source", {}).get("digest")
    if said != original.digest():
        yield Finding(str(original.path), "is not the checkpoint the manifest names as its source")


def _compare_all(
    original: Checkpoint,
    output: Checkpoint,
    records: dict[str, TensorRecord],
    manifest: dict[str, Any],
    progress: Progress,
) -> tuple[int, int, list[Finding]]:
    findings: list[Finding] = []
    dropped = {str(d.get("name")) for d in manifest.get("dropped", [])}
    by_module: dict[str, int] = {}
    for spec in original:
        if spec.name not in dropped:
            module = split_part(spec.name)[0]
            by_module[module] = by_module.get(module, 0) + spec.nbytes
    progress.start("Comparing", sum(by_module.values()), "B")
    exact = 0
    for module, nbytes in by_module.items():
        record = records.get(module)
        if record is None:
            findings.append(Finding(module, "is in the source, but nothing says what became of it"))
            continue
        try:
            problem = _compare(original, output, record)
        except FormatError as error:
            problem = str(error)
        if problem:
            findings.append(Finding(module, problem))
        elif record.exact:
            exact += 1
        progress.advance(nbytes)
    progress.finish()
    return len(by_module), exact, findings


def _compare(original: Checkpoint, output: Checkpoint, record: TensorRecord) -> str | None:
    """Compare one module; the problem in words, or None."""
    a, b = find_weight(original, record.module), find_weight(output, record.module)
    if a.scheme is None and b.scheme is None:
        return _compare_bytes(original, output, a.parts, b.parts)
    if a.shape != b.shape:
        return f"shape {list(b.shape)} differs from the source's {list(a.shape)}"
    altered, squared, norm, largest = 0, 0.0, 0.0, 0.0
    for start in range(0, a.shape[0], _ROWS):
        stop = min(start + _ROWS, a.shape[0])
        x = decode_rows(original, a.parts, start, stop)
        y = decode_rows(output, b.parts, start, stop)
        # Integers have no -0; every float target must keep it.
        signed = not record.target.startswith("int")
        differ = (x != y) | (signed & (np.signbit(x) != np.signbit(y)) & record.exact)
        altered += int(differ.sum())
        error = y - x
        squared += float((error * error).sum())
        norm += float((x * x).sum())
        largest = max(largest, float(np.abs(error).max()))
    if record.exact and altered:
        return f"declared exact, but {altered} elements differ (largest by {largest:.3g})"
    if not record.exact:
        rms = (squared / norm) ** 0.5 if norm else 0.0
        if abs(rms - record.relative_rms) > 1e-4 * rms + 1e-12:
            return f"relative RMS error is {rms:.6g}, the manifest says {record.relative_rms:.6g}"
        if record.disposition == "cast" and altered != record.altered:
            return f"{altered} elements differ, the manifest says {record.altered}"
    return None


def _compare_bytes(
    original: Checkpoint, output: Checkpoint, a: dict[str, Any], b: dict[str, Any]
) -> str | None:
    for part, spec in a.items():
        other = b.get(part)
        if other is None or (other.dtype, other.shape) != (spec.dtype, spec.shape):
            return f"'{spec.name}' was to be copied, but dtype or shape differ"
        pieces = zip(
            original.read_chunks(spec.name), output.read_chunks(other.name), strict=True
        )
        for (at, x), (_, y) in pieces:
            if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
                return f"'{spec.name}' was to be copied, but bytes differ after byte {at}"
    return None
