"""What makes a folder of shards a checkpoint: sidecars, config, manifest and, last, the index.

The index, or where a layout has none the manifest, is written when everything else has its name, so
that a folder without it is never taken for a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from v4quant import __version__
from v4quant.conversion.journal import FinishedShard
from v4quant.conversion.plan import Plan
from v4quant.conversion.records import TensorRecord
from v4quant.conversion.size_by_role import byte_classes
from v4quant.own_commit import source_commit
from v4quant.own_folders import refuse_links
from v4quant_calibration.solve.solution import Evidence
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.adapter import Adapter
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import detect_release
from v4quant_formats.errors import OutputError, SourceChanged, UnknownTokenizer
from v4quant_formats.file_hash import file_pieces, hash_file
from v4quant_formats.manifest import MANIFEST_NAME, MANIFEST_VERSION, index_json, sealed, to_json
from v4quant_formats.shards import WrittenFile, write_file_atomically, write_pieces_atomically
from v4quant_formats.sidecars import small_file, tokenizer_digest, travelling
from v4quant_formats.system import real_path

STATISTICS_NAME = "v4quant-statistics.v4q"
MOST_STATISTICS_BYTES = 10**9  # Flash's are 0.6 GB as stored


def travelling_sidecars(plan: Plan, stats: Evidence | None) -> list[WrittenFile]:
    """What will travel with the checkpoint, decided before the work.

    Statistics do, where they are a file that is small beside the model, for without them nobody
    else can make the same bytes; a solution is as large as the model, and told by its command.
    Beside a GGUF file, which holds its tokenizer itself, a tokenizer.json that cannot be made may
    be missing. Raises FormatError.
    """
    found, checkpoint = list[WrittenFile](), plan.checkpoint
    for name in travelling(checkpoint):
        try:
            data = small_file(checkpoint, name) or b""
        except UnknownTokenizer:
            if plan.recipe.layout.index:
                raise
            continue
        found.append(WrittenFile(name, len(data), _sha256(data)))
    if (file := _statistics(stats)) is not None:
        found.append(WrittenFile(STATISTICS_NAME, file.stat().st_size, hash_file(file)))
    return found


def _statistics(stats: Evidence | None) -> Path | None:
    file = stats.file if isinstance(stats, Stats) else None
    small = file is not None and file.stat().st_size <= MOST_STATISTICS_BYTES
    return file if small else None


def finish_folder(
    plan: Plan,
    out: Path,
    shards: list[FinishedShard],
    sidecars: list[WrittenFile],
    stats: Evidence | None = None,
) -> dict[str, Any]:
    """Write sidecars, config, manifest and, last, the index, if any; the manifest.

    Raises SourceChanged when a sidecar is no longer what it was when the work began, OutputError
    when somebody has put other files in their places.
    """
    config, index = to_json(plan.output_config()), index_of(plan)
    named = {s.name: s.sha256 for s in sidecars} | {"config.json": _sha256(config)}
    if index:
        named[plan.recipe.layout.index] = _sha256(index)
    for name, digest in named.items():
        _refuse_anothers(out, name, digest)
    files = [s.file for s in shards]
    folder, given = plan.checkpoint.path, _statistics(stats)
    for sidecar in sidecars:
        path = folder / sidecar.name
        if sidecar.name == STATISTICS_NAME and given is not None:
            path, written = given, write_pieces_atomically(out / sidecar.name, file_pieces(given))
        else:
            data = small_file(plan.checkpoint, sidecar.name) or b""
            written = write_file_atomically(out / sidecar.name, data)
        if written.sha256 != sidecar.sha256:
            (out / sidecar.name).unlink()
            raise SourceChanged(
                f"{path}: changed during the conversion; the same command goes on with what it is "
                "now"
            )
        files.append(sidecar)
    files.append(write_file_atomically(out / "config.json", config))
    if index:
        files.append(WrittenFile(plan.recipe.layout.index, len(index), _sha256(index)))
    manifest = _manifest(plan, files, [r for s in shards for r in s.records], stats)
    write_file_atomically(out / MANIFEST_NAME, to_json(manifest))
    if index:
        write_file_atomically(out / plan.recipe.layout.index, index)
    return manifest


def _refuse_anothers(out: Path, name: str, digest: str) -> None:
    """Raise OutputError for a file that no run of this conversion left in its last steps."""
    refuse_links(out, name)
    path = out / name
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file() or hash_file(path) != digest:
        raise OutputError(
            f"{path}: was put there by somebody else while the conversion ran, or between its "
            "runs; move it away, and the same command goes on"
        )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def index_of(plan: Plan) -> bytes:
    """The output's index; empty where its layout has none."""
    if not plan.recipe.layout.index:
        return b""
    specs = [(spec, shard.file) for shard in plan.shards for spec in shard.outputs]
    return index_json({s.name: f for s, f in specs}, sum(s.nbytes for s, _ in specs))


def _manifest(
    plan: Plan, files: list[WrittenFile], records: list[TensorRecord], stats: Evidence | None
) -> dict[str, Any]:
    made = stats.provenance.as_dict() if stats is not None and stats.provenance else None
    tool = {
        "v4quant": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **source_commit(),
    }
    listed = [{"name": f.name, "bytes": f.nbytes, "sha256": f.sha256} for f in files]
    facts = {
        "manifest_version": MANIFEST_VERSION,
        "tool": tool,
        **manifest_facts(plan, records),
        **({"calibration": made} if made else {}),
    }
    last = {key: facts.pop(key) for key in ("experts", "classes", "dropped", "tensors")}
    return sealed({**facts, "files": listed, **last})


def manifest_facts(plan: Plan, records: Iterable[TensorRecord]) -> dict[str, Any]:
    """What a manifest says that follows from the plan and what became of every tensor."""
    checkpoint, records = plan.checkpoint, list(records)
    experts = {s.first.dtype for u in plan.units if u.action == "experts" for s in u.sources}
    kind = str(checkpoint.config.get("model_type", ""))
    given = checkpoint.tokenizer is not None
    return {
        "source": {
            **_source_name(checkpoint),
            "release": detect_release(checkpoint.tensors, experts, kind),
            "digest": plan.source_digest,
            "tensors": len(checkpoint.tensors),
            "bytes": checkpoint.nbytes,
        },
        **({"tokenizer": tokenizer_digest(checkpoint)} if given else {}),
        **_adapter(checkpoint),
        "recipe": plan.recipe.as_dict(),
        "stats": plan.stats_digest or None,
        "plan": plan.digest,
        "experts": _expert_kinds(records),
        "classes": [vars(c) for c in byte_classes(plan)],
        "dropped": [{"name": d.name, "reason": d.reason} for d in plan.dropped],
        "tensors": [r.as_dict() for r in records],
    }


def _adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """The adapter that was merged, with the Frobenius norm of what it added to each matrix and the
    modules it replaced."""
    deltas = checkpoint.deltas
    if not isinstance(deltas, Adapter):
        return {}
    norms = {m: float(f"{n:.6g}") for m, n in deltas.norms().items()}
    origin = deltas.origin
    where = {} if origin is None else {"repo": origin.repo, "revision": origin.revision}
    facts = {"name": deltas.name, **where, "digest": deltas.digest, "norms": norms}
    if deltas.replaced:
        facts["replaced"] = list(deltas.replaced)
    return {"adapter": facts}


def _expert_kinds(records: list[TensorRecord]) -> dict[str, int]:
    """How the source stores its experts' matrices: how many of each kind."""
    kinds = Counter(
        f"{r.source}, values of {r.grid}" if r.grid else r.source
        for r in records
        if ".ffn.experts." in r.module
    )
    return dict(kinds.most_common())


def _source_name(checkpoint: Checkpoint) -> dict[str, str]:
    origin = checkpoint.origin
    if origin is None:
        return {"name": real_path(checkpoint.path).name}
    told = {"repo": origin.repo, "revision": origin.revision, "license": origin.license}
    return {"name": origin.repo.partition("/")[2], **{k: v for k, v in told.items() if v}}
