"""verify: does a converted checkpoint hold what its manifest says, in every byte and value?

Without a source: structure, completeness for its config, and every file's SHA-256. With one: every
module is decoded from both sides by the second decoder and compared; exactness claims must hold in
every element, and the error of quantized matrices must be what the manifest says.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from v4quant.checks.independent_decoder import decode_rows
from v4quant.checks.remade import differences
from v4quant.checks.soundness import unknown_of
from v4quant.conversion.records import TensorRecord, record_from_dict
from v4quant.hub.download import download
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import Remote, open_remote
from v4quant.hub.shard_cache import ShardCache
from v4quant.source import Source, open_source
from v4quant.temporary_folders import TemporaryFolder
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name, split_part
from v4quant_formats.errors import ImplausibleScales
from v4quant_formats.file_hash import hash_file
from v4quant_formats.gguf.quants import home_of
from v4quant_formats.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SEAL,
    ManifestError,
    read_manifest,
    seal_of,
)
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.sidecars import MAX_SIDECAR_BYTES, strangers
from v4quant_formats.structure import find_defects
from v4quant_formats.weights import find_weight
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress
from v4quant_kernels.scheme import SCHEMES

_ROWS = 512  # compared at a time; a multiple of every tile height
# Both sides add the same float64 numbers, perhaps in another order. One changed code of 8 million
# moves an error by 6e-8 of it.
_SAME_SUM = 1e-9


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


def verify(out: Source, source: Source | Checkpoint | None, progress: Progress) -> VerifyResult:
    """Check what `quantize` wrote, against its source (open or not) when that is given.

    out: a folder, whose files are hashed, or a repository, whose listing's digests are compared;
    of either, one of its GGUF quants. Raises ManifestError without a readable v4quant.json, and
    V4QuantError for a bad source.
    """
    if isinstance(out, HubRef):
        with open_source(out) as published:
            if not isinstance(published.shards, ShardCache):  # the hub's cache has all of it
                manifest = read_manifest(published.path)
                findings = list(_check_files(published.path, manifest, progress))
                return _check_values(published, manifest, findings, source, progress)
            remote = published.shards.remote
            manifest = _published_manifest(remote)
            findings = list(_check_listed(remote, manifest, progress))
            return _check_values(published, manifest, findings, source, progress)
    folder = home_of(out)
    manifest = read_manifest(folder)
    findings = list(_check_files(folder, manifest, progress))
    try:
        output = open_checkpoint(out)
    except V4QuantError as error:
        records = _records(manifest)
        findings += [*_check_claims(manifest, records), Finding(str(out), str(error))]
        return VerifyResult(len(manifest["files"]), len(records), 0, 0, tuple(findings))
    with output:
        return _check_values(output, manifest, findings, source, progress)


def _records(manifest: dict[str, Any]) -> dict[str, TensorRecord]:
    return {r.module: r for r in map(record_from_dict, manifest["tensors"])}


def _check_values(
    output: Checkpoint,
    manifest: dict[str, Any],
    findings: list[Finding],
    source: Source | Checkpoint | None,
    progress: Progress,
) -> VerifyResult:
    """What an open checkpoint is, beside what was found in its files."""
    records, compared, exact = _records(manifest), 0, 0
    findings = [*findings, *_check_claims(manifest, records), *_check_structure(output, records)]
    if source is not None:
        opened = nullcontext(source) if isinstance(source, Checkpoint) else open_source(source)
        with opened as original:
            findings += _check_identity(original, manifest)
            findings += (
                Finding(*told) for told in differences(original, output, manifest, records)
            )
            compared, exact, more = _compare_all(original, output, records, manifest, progress)
            findings += more
    return VerifyResult(len(manifest["files"]), len(records), compared, exact, tuple(findings))


def same_files(out: Source, other: Source) -> tuple[Finding, ...]:
    """Files in which two conversions differ, by their manifests' digests; nothing else is read.

    Raises ManifestError or HubError.
    """
    mine, theirs = (_digests(place) for place in (out, other))
    found = []
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in theirs or name not in mine:
            found.append(Finding(name, f"is in {out if name in mine else other} only"))
        elif mine[name] != theirs[name]:
            found.append(Finding(name, f"has other bytes in {other} (SHA-256)"))
    return tuple(found)


def _digests(place: Source) -> dict[str, str]:
    if isinstance(place, HubRef):
        manifest = _published_manifest(open_remote(place), place.quant)
    else:
        manifest = read_manifest(place)
    return {row["name"]: row["sha256"] for row in manifest["files"]}


def _published_manifest(remote: Remote, folder: str = "") -> dict[str, Any]:
    """v4quant.json of a repository, or of a folder there. Raises ManifestError or HubError."""
    file = remote.files.get(f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME)
    if file is None or file.size > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{remote}: holds no readable {MANIFEST_NAME}; it was not written by v4quant"
        )
    with TemporaryFolder() as fetched:
        download(remote, file, fetched / MANIFEST_NAME)
        return read_manifest(fetched)


def _check_listed(
    remote: Remote, manifest: dict[str, Any], progress: Progress
) -> Iterator[Finding]:
    """Compare a repository's listing with the manifest. Files outside large storage are read."""
    progress.start("Comparing digests", sum(f["bytes"] for f in manifest["files"]), "B")
    for entry in manifest["files"]:
        name, file = entry["name"], remote.files.get(entry["name"])
        if file is None:
            yield Finding(name, "file is missing")
        elif file.size != entry["bytes"]:
            yield Finding(name, "bytes differ from the manifest (size)")
        else:
            digest = file.sha256
            if not digest and file.size <= MAX_SIDECAR_BYTES:
                digest = hashlib.sha256(remote.read(name, 0, file.size)).hexdigest()
            if digest != entry["sha256"]:
                yield Finding(name, "bytes differ from the manifest (SHA-256)")
        progress.advance(entry["bytes"])
    progress.finish()


def _check_claims(manifest: dict[str, Any], records: dict[str, TensorRecord]) -> Iterator[Finding]:
    """What the manifest says twice must agree."""
    if manifest.get(SEAL) != seal_of(manifest):
        yield Finding(MANIFEST_NAME, "is not as it was written: its digest is that of other words")
    if len(records) != len(manifest["tensors"]):
        yield Finding(MANIFEST_NAME, "names a module twice")
    for row in manifest["tensors"]:
        if row.get("exact") != records[row["module"]].as_dict().get("exact"):
            yield Finding(row["module"], "its 'exact' contradicts the rest of its record")


def _check_files(out: Path, manifest: dict[str, Any], progress: Progress) -> Iterator[Finding]:
    progress.start("Hashing", sum(f["bytes"] for f in manifest["files"]), "B")
    for entry in manifest["files"]:
        name = entry["name"]
        path = out / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            yield Finding(name, "manifest names a file outside the folder")
        elif not path.is_file():
            yield Finding(name, "file is missing")
        elif path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
            yield Finding(name, "bytes differ from the manifest (size or SHA-256)")
        progress.advance(entry["bytes"])
    progress.finish()
    for name in strangers(out, {entry["name"] for entry in manifest["files"]}):
        yield Finding(name, "is not in the manifest, but programs that load the folder read it")


def _recorded_as(name: str) -> str:
    """What a manifest calls the module of a tensor; one that no release has, by its own name."""
    return split_part(name)[0] if parse_name(name) is not None else name


def _check_structure(output: Checkpoint, records: dict[str, TensorRecord]) -> Iterator[Finding]:
    modules = {_recorded_as(spec.name) for spec in output}
    found = find_defects(output)
    copies = unknown_of(output) == "copy"
    for defect in found.defects:
        if defect.kind is ImplausibleScales:
            continue  # a faithful copy of odd weights is not a wrong one; values are compared
        if defect.blocking and not (
            copies and defect.where in found.names and found.names[defect.where] is None
        ):
            yield Finding(defect.where or str(output.path), defect.problem)
    for module in sorted(modules ^ records.keys()):
        yield Finding(module, "in the shards or in the manifest, but not in both")


def _check_identity(original: Checkpoint, manifest: dict[str, Any]) -> Iterator[Finding]:
    said = manifest.get("source")
    if not isinstance(said, dict):
        yield Finding(MANIFEST_NAME, "does not name its source")
        return
    facts = (len(original.tensors), original.nbytes)
    if (said.get("tensors"), said.get("bytes")) != facts:
        yield Finding(MANIFEST_NAME, f"the source has {facts[0]} tensors of {facts[1]:,} bytes")
    if said.get("digest") != original.digest():
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
            module = _recorded_as(spec.name)
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
        except V4QuantError as error:
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
    if a.coding != record.source:
        return f"is {a.coding} in the source, the manifest says {record.source[:40]!r}"
    if record.target in SCHEMES and not b.coding.startswith(record.target):  # or in tiles
        return f"is {b.coding}, the manifest says {record.target}"
    if math.prod(a.shape) != record.elements:
        return f"has {math.prod(a.shape)} elements, the manifest says {record.elements}"
    if a.scheme is None and b.scheme is None and record.disposition == "copied":
        return _compare_bytes(original, output, a.parts, b.parts)
    if a.shape != b.shape:
        return f"shape {list(b.shape)} differs from the source's {list(a.shape)}"
    target = SCHEMES.get(record.target)  # none: plain numbers, which keep their signs
    signed = target is None or target.keeps_negative_zero
    altered, squared, norm, largest = 0, 0.0, 0.0, 0.0
    for start in range(0, a.shape[0], _ROWS):
        stop = min(start + _ROWS, a.shape[0])
        x = decode_rows(original, a, start, stop)
        y = decode_rows(output, b, start, stop)
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
        if abs(rms - record.relative_rms) > _SAME_SUM * rms:
            return f"relative RMS error is {rms:.12g}, the manifest says {record.relative_rms:.12g}"
        if abs(largest - record.max_error) > _SAME_SUM * largest:
            return f"largest error is {largest:.12g}, the manifest says {record.max_error:.12g}"
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
        pieces = zip(original.read_chunks(spec.name), output.read_chunks(other.name), strict=True)
        for (at, x), (_, y) in pieces:
            if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
                return f"'{spec.name}' was to be copied, but bytes differ after byte {at}"
    return None
