"""Sidecars: the small files that travel with a checkpoint, by allow-list.

Everything not listed stays behind: a model folder may hold scripts, credentials or gigabytes of
something else, and a converted checkpoint should contain nothing its maker did not vouch for.
"""

from __future__ import annotations

from pathlib import Path

from v4quant_formats.checkpoint import link_root
from v4quant_formats.small_files import read_small

ALLOWED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
ALLOWED_FOLDERS = {"encoding": (".py", ".md", ".json", ".txt", ".jinja")}
MAX_SIDECAR_BYTES = 256 * 2**20


def find_sidecars(folder: Path) -> list[str]:
    """Relative names (with /) of a checkpoint folder's sidecars, sorted; links out excluded."""
    found = [n for n in ALLOWED_FILES if _is_sidecar(folder, folder / n)]
    for name, suffixes in ALLOWED_FOLDERS.items():
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            found += [
                p.relative_to(folder).as_posix()
                for p in (folder / name).rglob("*")
                if p.suffix in suffixes and _is_sidecar(folder, p)
            ]
    return sorted(found)


def read_sidecar(folder: Path, name: str) -> bytes:
    """The bytes of a sidecar. Raises FormatError when it cannot be read."""
    return read_small(folder / name, MAX_SIDECAR_BYTES)


def _is_sidecar(folder: Path, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > MAX_SIDECAR_BYTES:
        return False
    return path.resolve().is_relative_to(link_root(folder))
