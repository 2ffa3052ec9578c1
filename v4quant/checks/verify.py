"""verify: does a converted checkpoint hold what its manifest says, in every byte and value?

Without a source: structure, completeness for its config, and every file's SHA-256. With one: every
module is decoded from both sides by the second decoder and compared; exactness claims must hold in
every element, and the error of quantized matrices must be what the manifest says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from v4quant.checks.remade import differences
from v4quant.checks.soundness import unknown_of
from v4quant.checks.values import Values, Written, compare_values, recorded_as
from v4quant.conversion.records import TensorRecord, record_from_dict
from v4quant.hub.download import download
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import Remote, open_remote
from v4quant.hub.shard_cache import ShardCache
from v4quant.source import Source, open_source
from v4quant.temporary_folders import TemporaryFolder
from v4quant_formats.checkpoint import Checkpoint
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
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress


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
    return verify_all([out], source, progress)[0]


def verify_all(
    outs: Sequence[Source], source: Source | Checkpoint | None, progress: Progress
) -> list[VerifyResult]:
    """As `verify`, of several conversions of one source, which is read and decoded once."""
    with ExitStack() as stack:
        found = [_open(out, stack, progress) for out in outs]
        for one in found:
            one.findings += _check_claims(one.manifest, one.records)
            if one.output is None:
                one.findings.append(Finding(*one.unreadable))
            else:
                one.findings += _check_structure(one.output, one.records)
        values = dict[int, Values]()
        if source is not None:
            original = (
                source
                if isinstance(source, Checkpoint)
                else stack.enter_context(open_source(source))
            )
            whole = {
                i: Written(one.output, one.records, one.dropped)
                for i, one in enumerate(found)
                if one.output is not None
            }
            for i, written in whole.items():
                one = found[i]
                one.findings += _check_identity(original, one.manifest)
                told = differences(original, written.output, one.manifest, one.records)
                one.findings += (Finding(*what) for what in told)
            compared = compare_values(original, list(whole.values()), progress) if whole else []
            values = dict(zip(whole, compared, strict=True))
    return [_result(one, values.get(i, Values())) for i, one in enumerate(found)]


@dataclass
class _Conversion:
    """A conversion while it is verified. output: None where it cannot be opened; `unreadable` says
    where and why."""

    output: Checkpoint | None
    manifest: dict[str, Any]
    findings: list[Finding]
    unreadable: tuple[str, str] = ("", "")

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        """What the manifest says of each module."""
        return {r.module: r for r in map(record_from_dict, self.manifest["tensors"])}

    @property
    def dropped(self) -> set[str]:
        """Tensors that the conversion left out."""
        return {str(d.get("name")) for d in self.manifest.get("dropped", [])}


def _open(out: Source, stack: ExitStack, progress: Progress) -> _Conversion:
    """Open a conversion and check its files."""
    if isinstance(out, HubRef):
        published = stack.enter_context(open_source(out))
        if not isinstance(published.shards, ShardCache):  # the hub's cache has all of it
            manifest = read_manifest(published.path)
            findings = list(_check_files(published.path, manifest, progress))
            return _Conversion(published, manifest, findings)
        remote = published.shards.remote
        manifest = _published_manifest(remote)
        return _Conversion(published, manifest, list(_check_listed(remote, manifest, progress)))
    folder = home_of(out)
    manifest = read_manifest(folder)
    findings = list(_check_files(folder, manifest, progress))
    try:
        output = stack.enter_context(open_checkpoint(out))
    except V4QuantError as error:
        return _Conversion(None, manifest, findings, (str(out), str(error)))
    return _Conversion(output, manifest, findings)


def _result(one: _Conversion, values: Values) -> VerifyResult:
    findings = [*one.findings, *(Finding(*what) for what in values.problems)]
    return VerifyResult(
        len(one.manifest["files"]), len(one.records), values.compared, values.exact,
        tuple(findings),
    )  # fmt: skip


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


def _check_structure(output: Checkpoint, records: dict[str, TensorRecord]) -> Iterator[Finding]:
    modules = {recorded_as(spec.name) for spec in output}
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
