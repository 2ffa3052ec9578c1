"""What a conversion must say besides its values: its plan is made again, from source and recipe.

Values are compared with the source's, tensor by tensor. Everything else that a folder says follows
from the same two things: config.json, the index, a GGUF file's header, which small files travel and
most of the manifest. So the plan is made once more and each is held to it; a changed key of
config.json is found here, whatever digests were written anew. Another version of v4quant may
say some of it otherwise: only what this one wrote is judged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from v4quant import __version__
from v4quant.conversion.experts import input_amax
from v4quant.conversion.finish import STATISTICS_NAME, index_of, manifest_facts
from v4quant.conversion.plan import Plan, make_plan, under_stem
from v4quant.conversion.records import TensorRecord
from v4quant.conversion.units import ShardPlan
from v4quant.recipe import recipe_from_table
from v4quant_formats.checkpoint import MAX_INDEX_BYTES, Checkpoint
from v4quant_formats.json_object import read_json_object
from v4quant_formats.layouts.modelopt import NVFP4_MAX
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_formats.shards import FilePlan
from v4quant_formats.sidecars import MAX_SIDECAR_BYTES, small_file, tokenizer_digest, travelling
from v4quant_formats.small_files import read_small
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.errors import V4QuantError

_NAMED = ("source", "adapter")
_MOVED = ("repo", "revision", "license")
"""What another copy of the same source, or of the same adapter, may say otherwise or not at all,
beside its name."""

_PIECE = 32 * 2**20

Told = tuple[str, str]
"""Where something differs, and how."""


def differences(
    original: Checkpoint,
    output: Checkpoint,
    manifest: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
) -> Iterator[Told]:
    """What the output says otherwise than a conversion of this source by the manifest's recipe."""
    tool = manifest.get("tool")
    if not isinstance(tool, dict) or tool.get("v4quant") != __version__:
        return
    try:
        plan = _plan(original, manifest)
    except V4QuantError as error:
        yield MANIFEST_NAME, f"no conversion is as it says: {error}"
        return
    yield from _of_manifest(plan, manifest, records)
    if output.origin is not None:
        return  # a repository's listing has the digests of all files
    folder = output.path if output.path.is_dir() else output.path.parent
    yield from _of_json(folder / "config.json", plan.output_config())
    if index := index_of(plan):
        yield from _of_json(folder / plan.recipe.layout.index, json.loads(index))
    told = manifest.get("tokenizer")
    yield from _of_small_files(plan, output, folder, told)
    if plan.recipe.layout.stores_input_scale:
        yield from _of_input_scales(plan, output)
    if told is None and not plan.recipe.layout.index:
        yield from _of_gguf_files(plan.shards, output)


def _plan(original: Checkpoint, manifest: Mapping[str, Any]) -> Plan:
    """The conversion that the manifest tells of. Raises V4QuantError where there is none."""
    recipe, stats = manifest.get("recipe"), manifest.get("stats")
    table = recipe if isinstance(recipe, dict) else {}
    digest = stats if isinstance(stats, str) else ""
    plan = make_plan(original, recipe_from_table(table, MANIFEST_NAME), digest)
    tail = plan.shards[0].file.removeprefix(plan.stem)
    first = str(manifest["files"][0]["name"]) if manifest["files"] else ""
    if plan.stem and first.endswith(tail):
        return under_stem(plan, first.removesuffix(tail))
    return plan


def _of_manifest(
    plan: Plan, manifest: Mapping[str, Any], records: Mapping[str, TensorRecord]
) -> Iterator[Told]:
    wanted = manifest_facts(plan, records.values())
    if "tokenizer" in manifest:  # one that was given, which only its digest tells
        wanted |= {key: manifest.get(key) for key in ("tokenizer", "plan")}
    known = wanted.keys() | {"manifest_version", "tool", "files", "calibration", "digest"}
    for key in sorted(manifest.keys() - known):
        yield MANIFEST_NAME, f"says {key[:80]!r}, which no manifest has"
    for key, value in wanted.items():
        if _still(key, manifest.get(key)) != _still(key, json.loads(json.dumps(value))):
            yield MANIFEST_NAME, f"its {key!r} is not what source and recipe give"
    files = [f["name"] for f in manifest["files"]]
    wanted_files = {s.file for s in plan.shards} | {"config.json"}
    wanted_files |= {plan.recipe.layout.index} - {""}
    missing = wanted_files - {*files}
    for name in sorted(missing):
        yield name, "is not in the manifest's list of files"
    if len(files) != len({*files}):
        yield MANIFEST_NAME, "lists a file twice"
    allowed = wanted_files | {STATISTICS_NAME, *travelling(plan.checkpoint)}
    if "tokenizer" not in manifest:
        for name in sorted({*files} - allowed):
            yield name, "is in the manifest's list of files, but no part of this conversion"


def _still(key: str, value: object) -> object:
    """A fact of a manifest without what a copy of the source says otherwise."""
    if key not in _NAMED or not isinstance(value, dict):
        return value
    named = {**value, "name": isinstance(value.get("name"), str)}
    return {k: v for k, v in named.items() if k not in _MOVED}


def _of_json(path: Path, wanted: Mapping[str, Any]) -> Iterator[Told]:
    try:
        found = read_json_object(path, MAX_INDEX_BYTES)
    except V4QuantError as error:
        yield path.name, str(error)
        return
    wanted = json.loads(json.dumps(wanted))
    for key in sorted(wanted.keys() | found.keys()):
        if key not in found or key not in wanted:
            yield path.name, f"{key[:80]!r} is {'missing' if key in wanted else 'new'}"
        elif json.dumps(found[key], sort_keys=True) != json.dumps(wanted[key], sort_keys=True):
            yield path.name, f"{key[:80]!r} is not what source and recipe give"


def _of_small_files(plan: Plan, output: Checkpoint, folder: Path, told: object) -> Iterator[Told]:
    """Small files are the source's; of a tokenizer that was given the manifest has the digest."""
    if told is not None:
        if plan.recipe.layout.index and tokenizer_digest(replace(output, tokenizer=None)) != told:
            yield MANIFEST_NAME, "the tokenizer is not the one that was given"
        return
    for name in travelling(plan.checkpoint):
        try:
            wanted = small_file(plan.checkpoint, name)
        except V4QuantError:
            continue  # a GGUF file's own, which no tokenizer.json can hold
        path = folder / name
        if not path.is_file():
            yield name, "is missing, which the source has"
        elif wanted is not None and read_small(path, MAX_SIDECAR_BYTES) != wanted:
            yield name, "is not the source's"


def _of_input_scales(plan: Plan, output: Checkpoint) -> Iterator[Told]:
    """Scales of activations, which no weight tells: the bound that is proven, or, where statistics
    measured them, one number for the two matrices that engines fuse.
    """
    for unit in plan.units:
        places = [f"{stored.module}.input_scale" for stored in unit.sources]
        if unit.action != "experts" or not all(place in output for place in places):
            continue
        found = [float(output.read(place)) for place in places]
        wanted = found[:]
        if plan.stats_digest:
            wanted[1] = wanted[0]
        else:
            bounds = (input_amax(plan, stored, None) for stored in unit.sources)
            wanted = [float(torch.tensor(bound / NVFP4_MAX).float()) for bound in bounds]
        for place, value, right in zip(places, found, wanted, strict=True):
            if value != right or not 0 < value < math.inf:
                yield place, f"is {value:.6g}, where source and recipe give {right:.6g}"


def _of_gguf_files(shards: Sequence[ShardPlan], output: Checkpoint) -> Iterator[Told]:
    """Headers, zeros between tensors, and tensors that a draft's file repeats, which no comparison
    of values reads.
    """
    first: dict[str, tuple[str, TensorSpec]] = {}
    for shard in shards:
        if shard.file not in output.files:
            yield shard.file, "is missing"
            return
        plan = shard.file_plan()
        (header,) = output.shards.slices(shard.file, [0], len(plan.header))
        if header != plan.header:
            told = "its metadata or list of tensors is not what source and recipe give"
            yield shard.file, told
            return
        yield from _of_gaps(shard.file, plan, output)
        for spec in plan.specs:
            file, known = first.setdefault(spec.name, (shard.file, spec))
            if known is not spec and not _is_same(output, (file, known), (shard.file, spec)):
                yield shard.file, f"its '{spec.name}' is not that of {file}"


def _of_gaps(file: str, plan: FilePlan, output: Checkpoint) -> Iterator[Told]:
    end, gaps = len(plan.header), list[tuple[int, int]]()
    for spec in sorted(plan.specs, key=lambda s: s.offset):
        if spec.offset > end:
            gaps.append((end, spec.offset))
        span = spec.stride * (spec.shape[0] - 1) + spec.row_bytes if spec.stride else spec.nbytes
        end = max(end, spec.offset + span)
    gaps.append((end, plan.nbytes))
    longest = max(stop - start for start, stop in gaps)
    read = output.shards.slices(file, [start for start, _ in gaps], longest)
    for (start, stop), data in zip(gaps, read, strict=True):
        if data[: stop - start].strip(b"\0"):
            yield file, f"bytes {start} to {stop} belong to no tensor and are not zero"


def _is_same(
    output: Checkpoint, one: tuple[str, TensorSpec], other: tuple[str, TensorSpec]
) -> bool:
    """Whether a tensor has the same bytes in two files."""
    (file, a), (copy, b) = one, other
    starts = range(0, max(a.nbytes, b.nbytes), _PIECE)
    return all(
        output.shards.slices(file, [a.offset + at], min(_PIECE, a.nbytes - at))
        == output.shards.slices(copy, [b.offset + at], min(_PIECE, b.nbytes - at))
        for at in starts
    )
