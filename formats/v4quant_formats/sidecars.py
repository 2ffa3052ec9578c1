"""Sidecars: the small files that travel with a checkpoint, by allow-list.

Everything not listed stays behind: a model folder may hold scripts, credentials or gigabytes of
something else, and a converted checkpoint should contain nothing its maker did not vouch for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from v4quant_formats.checkpoint import Checkpoint, link_root
from v4quant_formats.engram import read_token_map
from v4quant_formats.small_files import read_small
from v4quant_formats.system import real_path

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
# What belongs to one vocabulary, and is wrong beside another's.
_VOCABULARY = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
WORDS = (*_VOCABULARY, CHAT_TEMPLATE)
"""What says what text means: what `--tokenizer` gives in place of the source's."""
ALLOWED_FILES = (
    "generation_config.json",
    *WORDS,
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
ALLOWED_FOLDERS = {"encoding": (".py", ".md", ".json", ".txt", ".jinja")}
MAX_SIDECAR_BYTES = 256 * 2**20
# What loaders look for by name besides, and what v4quant never writes.
_LOADED = re.compile(
    r"(quantize|hf_quant|adapter|processor|quantization)_config\.json|params\.json|chat_template\.json"
    r"|tokenizer\.model|.+\.safetensors|.+\.safetensors\.index\.json|pytorch_model.*\.bin(\.index\.json)?"
    r"|(configuration|modeling|tokenization)_.+\.py"
)


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


def strangers(folder: Path, known: Collection[str]) -> list[str]:
    """Files of a checkpoint folder that are not among the `known` ones, and that programs which
    load such folders read: weights, configurations, tokenizers, templates.
    """
    loaded = {*ALLOWED_FILES} - {n for n in ALLOWED_FILES if n.startswith("LICENSE")}
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    return [n for n in names if n not in known and (n in loaded or _LOADED.fullmatch(n))]


def travelling(checkpoint: Checkpoint) -> list[str]:
    """Names of the small files that go where a checkpoint goes, sorted: of its folder, of what a
    GGUF file says as metadata, and in place of the vocabulary the tokenizer that was given for it.
    """
    names = {*find_sidecars(checkpoint.path), *checkpoint.carried}
    given = checkpoint.tokenizer
    if given is not None:
        beside = [n for n in WORDS if (given.parent / n).is_file()]
        names = names - set(_VOCABULARY) | {TOKENIZER, *beside}
    return sorted(names)


def small_file(checkpoint: Checkpoint, name: str) -> bytes | None:
    """The bytes of a small file of a checkpoint, None where there is none of this name.

    It lies where `place_of` says, or is made of a GGUF file's metadata. Raises FormatError for one
    that cannot be read or made.
    """
    path = place_of(checkpoint, name)
    if path.is_file():
        return read_small(path, MAX_SIDECAR_BYTES)
    if checkpoint.tokenizer is not None and name in _VOCABULARY:
        return None
    made = checkpoint.carried.get(name)
    return None if made is None else made()


def place_of(checkpoint: Checkpoint, name: str) -> Path:
    """Where a small file of a checkpoint lies, or would lie: with the tokenizer that was given for
    it, or in its folder."""
    given = checkpoint.tokenizer
    if given is not None and name == TOKENIZER:
        return given
    elsewhere = given is not None and name in WORDS
    if given is not None and elsewhere:
        beside = given.parent / name
        if name != CHAT_TEMPLATE or beside.is_file():
            return beside
    return checkpoint.path / name


def tokenizer_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of everything that says what text means. Raises FormatError."""
    sha = hashlib.sha256()
    for name in WORDS:
        data = small_file(checkpoint, name)
        sha.update(f"{name} {-1 if data is None else len(data)}\n".encode() + (data or b""))
    return sha.hexdigest()


def token_map_of(checkpoint: Checkpoint, vocab_size: int, compressed_size: int) -> tuple[int, ...]:
    """The compressed id of every token id by a checkpoint's tokenizer, for V4.1's Engram.

    Raises what `read_token_map` and `small_file` raise.
    """
    data, place = small_file(checkpoint, TOKENIZER), place_of(checkpoint, TOKENIZER)
    return read_token_map(data, place, vocab_size, compressed_size)


def _is_sidecar(folder: Path, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > MAX_SIDECAR_BYTES:
        return False
    return real_path(path).is_relative_to(link_root(folder))
