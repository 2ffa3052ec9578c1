"""Opening a checkpoint folder, whatever container holds it: safetensors shards or GGUF files.

The one place that chooses between readers, so that neither knows the other.
"""

from __future__ import annotations

from pathlib import Path

from v4quant_formats.checkpoint import Checkpoint, check_link, read_structure
from v4quant_formats.errors import FormatError
from v4quant_formats.gguf.checkpoint import is_gguf, open_gguf
from v4quant_formats.gguf.quants import almost_gguf, files_below
from v4quant_formats.naming import understood
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shard_files import (
    FileState,
    LocalShards,
    file_state,
)
from v4quant_formats.spec import TensorSpec


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint folder: config.json, the index (or one model.safetensors), all headers.

    A .gguf file, or a folder holding a model as such files, is opened by `gguf.checkpoint`.

    Raises ConfigError, InvalidIndex, UnsafePath, MissingShard, MissingTensor, UnexpectedTensor,
    DuplicateTensor, or what `read_header` raises. The index and the shards must agree exactly.
    """
    folder = Path(path)

    if is_gguf(folder):
        return open_gguf(folder)
    _refuse_pieces(folder)
    if not folder.is_dir():
        what = "is a file, no folder" if folder.is_file() else "no such folder"
        raise FormatError(f"{folder}: {what}; give the folder that holds config.json")
    files: dict[str, FileState] = {}

    def header_of(name: str) -> dict[str, TensorSpec]:
        check_link(folder, name)
        header = read_header(folder / name)
        files[name] = file_state((folder / name).stat())
        return header

    # macOS leaves a `._name` beside every file it copies to other file systems.
    found = [p.name for p in folder.glob("*.safetensors") if not p.name.startswith("._")]
    written, stored = read_structure(folder, header_of, found)
    config, tensors, renamed = understood(str(folder / "config.json"), written, stored)
    shards = LocalShards(folder, files)
    return Checkpoint(
        folder,
        config,
        tensors,
        files,
        shards,
        renamed=renamed,
        written_config=written,
        beside=tuple(sorted({*found, *_other_models(folder)} - files.keys())),
    )


def _other_models(folder: Path) -> list[str]:
    """GGUF files but those that are called companions of a model."""
    names = (name for name in files_below(folder) if "/" not in name)
    return [n for n in names if "imatrix" not in n.lower() and "mmproj" not in n.lower()]


def _refuse_pieces(path: Path) -> None:
    """Raise FormatError for what would be a GGUF model if it were whole, or called as one."""
    if path.is_file():
        names = [path.name]
    elif path.is_dir() and not (path / "config.json").exists():
        names = sorted(p.name for p in path.iterdir())
    else:
        return
    for name in names:
        if (problem := almost_gguf(name)) is not None:
            raise FormatError(f"{path if path.is_dir() else path.parent}: {problem}")
