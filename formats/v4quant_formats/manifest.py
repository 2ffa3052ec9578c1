"""Manifest (`v4quant.json`): what every file and tensor of a converted checkpoint is made of.

Holds no clock time and no absolute path, so the same conversion gives the same bytes anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4quant_formats.errors import FormatError
from v4quant_formats.json_object import read_json_object
from v4quant_formats.model_config import ConfigError

MANIFEST_NAME = "v4quant.json"
ONNX_MANIFEST = "v4quant-onnx.json"
"""That of a folder of graphs, which lists layers in place of tensors."""
MANIFEST_VERSION = 1
SEAL = "digest"
MAX_MANIFEST_BYTES = 512 * 2**20


class ManifestError(FormatError):
    """v4quant.json is absent, damaged or of another version."""


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON with one line per top-level list item: readable and compact at 100,000 tensors."""
    lines = []
    for key, item in value.items():
        if isinstance(item, list) and item:
            rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in item)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(item, ensure_ascii=False)}")
    # Half a surrogate pair has no UTF-8 form; as its escape it comes back as it was.
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode(errors="backslashreplace")


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its own digest, by which a later change of it is seen."""
    return {**manifest, SEAL: seal_of(manifest)}


def seal_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says but this, as JSON with sorted keys."""
    said = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, name: str = MANIFEST_NAME) -> dict[str, Any]:
    """Read and check a manifest, `folder/v4quant.json`. Raises ManifestError."""
    path = folder / name
    if not path.exists():
        raise ManifestError(f"{path}: missing; this checkpoint was not written by v4quant")
    try:
        table = read_json_object(path, limit=MAX_MANIFEST_BYTES)
    except ConfigError as error:
        raise ManifestError(str(error)) from None
    if table.get("manifest_version") != MANIFEST_VERSION:
        raise ManifestError(f"{path}: manifest version {table.get('manifest_version')!r} unknown")
    for key in ("files", "tensors" if name == MANIFEST_NAME else "layers", "dropped"):
        rows = table.get(key, [] if key == "dropped" else None)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ManifestError(f"{path}: '{key}' must be a list of objects")
    for row in table["files"]:
        kinds = [type(row.get(k)) for k in ("name", "bytes", "sha256")]
        if kinds != [str, int, str] or row["bytes"] < 0:
            raise ManifestError(f"{path}: an entry of 'files' lacks name, bytes or sha256")
    return table


def index_json(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """A compact model.safetensors.index.json; `total_size` counts tensor bytes."""
    value = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(value, separators=(",", ":")).encode()


def to_json_text(value: object) -> str:
    """The one JSON form of results on disk."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
