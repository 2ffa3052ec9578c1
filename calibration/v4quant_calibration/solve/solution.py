"""Solution: expert matrices that a solver has coded, on disk until a conversion packs them.

A folder with one safetensors file per stage (each matrix as packed codes, scales and shape, like
compressed-tensors' `pack-quantized`; GGUF's blocks as bytes under the name of their type) and
`solution.json`, which says for which checkpoint, scheme and settings they are and what each
stage's file hashes to; a file is held against that when the first of its matrices is asked for, so
that no other layer's file and no damaged one is packed. The header is written first without stages
and last with all of them: a folder whose `finished` is false resumes, stage by stage, and nothing
unfinished is taken for a result. Moments of the experts' inputs lie beside it, for what a solver
does not cover.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from v4quant_calibration.statistics.provenance import Provenance, provenance_from
from v4quant_calibration.statistics.stats import Stats, StatsError, load_stats
from v4quant_calibration.statistics.table_use import RowUse
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.file_hash import hash_file
from v4quant_formats.json_object import read_json_object
from v4quant_formats.manifest import to_json
from v4quant_formats.model_config import ConfigError
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shard_files import LocalShards, file_state
from v4quant_formats.shards import (
    ShardWriter,
    all_leftovers,
    leftovers,
    output_error,
    remove_leftovers,
    write_file_atomically,
)
from v4quant_formats.spec import TensorSpec
from v4quant_formats.weight_reading import read_weight
from v4quant_formats.weights import find_weight
from v4quant_kernels.ggml_types import block_type, get_type
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref.pack import packed_bytes
from v4quant_kernels.scheme import Scheme

SOLUTION_NAME = "solution.json"
STATS_NAME = "stats.v4q"
SOLUTION_VERSION = 1
_MAX_BYTES = 64 * 2**20
# Names of tensors of blocks end in this and the type; safetensors has no dtype for them.
_BLOCKS = "blocks_"
_PROVENANCE = "provenance"
# Of a stage, of what is solved before its experts, and a rank's part of either.
_STAGE_FILE = re.compile(r"([a-z]+\.\d+(\.attn)?|head)\.safetensors(\.rank\d+)?")


class SolutionError(StatsError):
    """A solution that is unfinished, damaged, or of another checkpoint, scheme or version."""


def stage_file(folder: Path, stage: str) -> Path:
    """Where a stage's coded matrices lie."""
    return folder / f"{stage}.safetensors"


HEAD = "head"


def attention_file(stage: str) -> str:
    """Name of the file of a stage's matrices that are solved before its experts."""
    return f"{stage}.attn"


def files_of(module: str) -> list[str]:
    """Names of the files that may hold a module's codes."""
    if module == HEAD:
        return [HEAD]
    name = parse_name(f"{module}.weight")
    return [name.stage, attention_file(name.stage)] if name is not None and name.stage else []


def stage_specs(
    modules: Mapping[str, tuple[int, int]], schemes: Mapping[str, Scheme]
) -> list[TensorSpec]:
    """Tensors of a stage's file: modules by name with their shape [N, K], and their schemes."""
    specs = []
    for module, (rows, columns) in modules.items():
        scheme = schemes[module]
        if scheme.is_block_type:
            row_bytes = get_type(scheme.name).row_bytes(columns)
            specs.append(TensorSpec(f"{module}.{_BLOCKS}{scheme.name}", "U8", (rows, row_bytes)))
            continue
        words, groups = packed_bytes(columns, scheme.bits) // 4, columns // scheme.group_size
        specs += [
            TensorSpec(f"{module}.weight_packed", "I32", (rows, words)),
            TensorSpec(f"{module}.weight_scale", "BF16", (rows, groups)),
            TensorSpec(f"{module}.weight_shape", "I64", (2,)),
        ]
    return specs


def add_matrix(writer: ShardWriter, module: str, q: QTensor) -> None:
    """Write one coded matrix, from wherever it is, into a stage's file."""
    q = q.to(torch.device("cpu"))
    if q.scheme.is_block_type:
        writer.add(f"{module}.{_BLOCKS}{q.scheme.name}", q.codes)
        return
    assert q.scale is not None
    writer.add(f"{module}.weight_packed", q.codes.view(torch.int32))
    writer.add(f"{module}.weight_scale", q.scale)
    writer.add(f"{module}.weight_shape", torch.tensor(q.shape, dtype=torch.int64))


def open_stage(folder: Path, stage: str) -> Checkpoint:
    """A finished stage's file as something to read matrices from. Raises FormatError."""
    path = stage_file(folder, stage)
    tensors = {spec.name: spec for spec in map(_as_read, read_header(path).values())}
    states = {path.name: file_state(path.stat())}
    table = MappingProxyType(tensors)
    return Checkpoint(folder, MappingProxyType({}), table, states, LocalShards(folder, states))


def holds(stage: Checkpoint, module: str) -> bool:
    """Whether a stage's file has a matrix's codes."""
    return f"{module}.weight_packed" in stage or f"{module}.weight" in stage


def _as_read(spec: TensorSpec) -> TensorSpec:
    """A stored tensor as the reader of checkpoints knows it: block types have dtypes there."""
    module, _, kind = spec.name.rpartition(f".{_BLOCKS}")
    if block_type(kind.upper()) is None:
        return spec
    return replace(spec, name=f"{module}.weight", dtype=kind.upper())


@dataclass(frozen=True)
class Solution:
    """Coded matrices of every stage the solver covered, and the statistics beside them.

    recipe: what of a recipe decided the schemes of matrices, where more than one did. hashes: what
    the stages' files hash to. provenance: how it was made, where that is known; `digest` covers
    everything else.
    """

    folder: Path
    scheme: str
    recipe: Mapping[str, Any] | None
    stages: Mapping[str, Checkpoint]
    hashes: Mapping[str, str]
    stats: Stats
    digest: str
    provenance: Provenance | None = None
    _intact: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def importance(self, module: str) -> Tensor | None:
        """As `Stats.importance`."""
        return self.stats.importance(module)

    def input_amax(self, module: str) -> float | None:
        """As `Stats.input_amax`."""
        return self.stats.input_amax(module)

    @property
    def tables(self) -> Mapping[str, RowUse]:
        """As `Stats.tables`."""
        return self.stats.tables

    def solved(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> QTensor | None:
        """The solver's codes of a matrix; None for one that was not solved.

        Raises SolutionError when the solution is for another scheme or shape, or its file is not
        the one that was solved.
        """
        names = [name for name in files_of(module) if name in self.stages]
        for name in names:
            self._require_intact(name)
        stage = next((s for s in map(self.stages.__getitem__, names) if holds(s, module)), None)
        if stage is None:
            return None
        q = read_weight(stage, find_weight(stage, module))
        if q.scheme.name != scheme.name or q.shape != shape:
            raise SolutionError(
                f"{self.folder}: holds '{module}' as {q.scheme.name} {list(q.shape)}, not as "
                f"{scheme.name} {list(shape)}; calibrate again with --solve {scheme.name}"
            )
        return q

    def _require_intact(self, name: str) -> None:
        """Hash a file, once: a conversion reads it whole anyway. Raises SolutionError."""
        with self._lock:
            if name in self._intact:
                return
            path = stage_file(self.folder, name)
            if hash_file(path) != self.hashes[name]:
                raise SolutionError(
                    f"{path}: is not the file that was solved (another layer's, or damaged); copy "
                    "the folder again, or calibrate again into a new one"
                )
            self._intact.add(name)

    def close(self) -> None:
        """Close the stage files."""
        for stage in self.stages.values():
            stage.close()


Evidence = Stats | Solution
"""What `calibrate` left: statistics alone, or a solution with its statistics."""


def is_solution(path: Path) -> bool:
    """Whether a path given as statistics is a solution's folder."""
    return (path / SOLUTION_NAME).is_file()


def is_solution_file(name: str) -> bool:
    """Whether a file in a solution's folder, finished or not, has a name that solving gives."""
    return name in (SOLUTION_NAME, STATS_NAME) or bool(_STAGE_FILE.fullmatch(name))


def holds_another(folder: Path, header: Mapping[str, Any]) -> bool:
    """Whether a folder holds something else than a solution that was begun with this header."""
    if is_solution(folder):
        return not _begun_with(_read(folder), header)
    torn = set(leftovers(folder, [SOLUTION_NAME]))
    return folder.is_dir() and any(path not in torn for path in folder.iterdir())


def is_own_solution(folder: Path) -> bool:
    """Whether a folder has the header of a solution, finished or not."""
    if not is_solution(folder):
        return False
    try:
        return {"version", "source_digest", "corpus_digest", "finished"} <= _read(folder).keys()
    except SolutionError:
        return False


def clear_solution(folder: Path) -> None:
    """Remove a solution's files, whatever it is of; its header last."""
    if is_own_solution(folder):
        names = sorted(folder.iterdir(), key=lambda path: path.name == SOLUTION_NAME)
        torn = set(all_leftovers(folder, is_solution_file))
        for path in names:
            if is_solution_file(path.name) or path in torn:
                path.unlink(missing_ok=True)


def _begun_with(found: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    return {k: found.get(k) for k in header} == dict(header)


def begin_solution(folder: Path, header: Mapping[str, Any]) -> None:
    """Create the folder, or see that what it holds was begun with the same header.

    Raises SolutionError for a folder with other contents or another header.
    """
    path = folder / SOLUTION_NAME
    if path.exists():
        found = _read(folder)
        if not _begun_with(found, header):
            raise SolutionError(
                f"{path}: was begun for another checkpoint, corpus or setting; choose a new "
                "folder, or replace it with --overwrite"
            )
        for left in all_leftovers(folder, is_solution_file):
            left.unlink(missing_ok=True)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from None
    remove_leftovers(folder, [SOLUTION_NAME])
    if any(folder.iterdir()):
        raise SolutionError(f"{folder}: is not empty and holds no solution; choose a new folder")
    write_file_atomically(path, to_json({**header, "finished": False}))


def finish_solution(
    folder: Path,
    header: Mapping[str, Any],
    stages: Mapping[str, Any],
    provenance: Provenance | None = None,
) -> None:
    """Hash every stage's file and declare the folder finished. stages: facts of each."""
    table = {
        stage: {**facts, "sha256": hash_file(stage_file(folder, stage))}
        for stage, facts in stages.items()
    }
    made = {_PROVENANCE: provenance.as_dict()} if provenance else {}
    data = to_json({**header, "finished": True, **made, "stages": table})
    write_file_atomically(folder / SOLUTION_NAME, data)


def load_solution(folder: Path, source_digest: str) -> Solution:
    """Open a finished solution for the checkpoint with `source_digest`. Raises SolutionError."""
    found = _read(folder)
    if found.get("version") != SOLUTION_VERSION:
        raise SolutionError(
            f"{folder / SOLUTION_NAME}: is not a solution of version {SOLUTION_VERSION}; calibrate "
            "again with this release"
        )
    if found.get("source_digest") != source_digest:
        raise SolutionError(
            f"{folder}: was solved for another checkpoint (digest "
            f"{str(found.get('source_digest'))[:12]}, this one is {source_digest[:12]}); "
            "calibrate this checkpoint"
        )
    stages, scheme = found.get("stages"), found.get("scheme")
    if found.get("finished") is not True or not isinstance(stages, dict):
        raise SolutionError(f"{folder}: is unfinished; run the same calibrate command again")
    if not isinstance(scheme, str) or not all(_plain(*entry) for entry in stages.items()):
        raise SolutionError(f"{folder / SOLUTION_NAME}: is damaged; calibrate again")
    hashes = {name: facts["sha256"] for name, facts in stages.items()}
    opened = {stage: open_stage(folder, stage) for stage in stages}
    stats = load_stats(folder / STATS_NAME, source_digest)
    made = provenance_from(found.pop(_PROVENANCE, None))
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return Solution(folder, scheme, found.get("recipe"), opened, hashes, stats, digest, made)


def _plain(stage: str, facts: object) -> bool:
    """Whether a stage is named as one and its file's hash is told."""
    told = isinstance(facts, dict) and isinstance(facts.get("sha256"), str)
    return told and stage.replace(".", "").isalnum()


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read_json_object(folder / SOLUTION_NAME, limit=_MAX_BYTES)
    except ConfigError as error:
        raise SolutionError(str(error)) from None
