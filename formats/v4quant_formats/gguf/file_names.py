"""What GGUF files are called: the model's name and the quant, `DeepSeek-V4-Flash-IQ2_XXS`.

The name is that of the source as its user knows it: a repository's, what a GGUF file says of
itself, else a folder's. A fine-tune therefore never gets its base's name. It says nothing about the
bytes: the same source in a folder of another name gives the same files under other names.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from v4quant_formats.checkpoint import Checkpoint, link_root
from v4quant_formats.gguf.carried import trunk_header
from v4quant_formats.gguf.quants import without_label
from v4quant_formats.system import real_path

UNNAMED = ("DeepSeek-V4", "DeepSeek-V4.1")
"""What `general.name` says where only the family was known, as in files v4quant made."""
OLDER = "model"
"""The name in files of conversions that were begun before names carried the model."""
_LONGEST = 120  # bytes; with the quant, the part and what else is added far below every limit
_KINDS = re.compile(r"(?:^|(?<=[-._]))(?:gguf|imatrix|mmproj)(?=$|[-._])", re.IGNORECASE)


def file_stem(checkpoint: Checkpoint, scheme: str) -> str:
    """The stem of the files of a conversion: `model_name` and the quant as llama.cpp writes it."""
    return f"{model_name(checkpoint)}-{quant_label(scheme)}"


def quant_label(scheme: str) -> str:
    """A scheme as llama.cpp's community writes it in names: `IQ2_XXS`."""
    return scheme.upper()


def model_name(checkpoint: Checkpoint) -> str:
    """The model's name, as `clean_name` leaves it, with the name of a merged adapter.

    A name that only says DeepSeek-V4, as v4quant writes into files, is not the model's: then the
    file's own name counts.
    """
    name = clean_name(_raw_name(checkpoint))
    adapter = checkpoint.deltas.name if checkpoint.deltas is not None else ""
    return clean_name(f"{name}-{adapter}") if adapter else name


def _raw_name(checkpoint: Checkpoint) -> str:
    if checkpoint.origin is not None:
        return checkpoint.origin.repo.rpartition("/")[2]
    header = trunk_header(checkpoint)
    if header is not None:
        said = header.metadata.get("general.name")
        if isinstance(said, str) and said not in UNNAMED and clean_name(said) != OLDER:
            return said
        file = next(name for name, found in checkpoint.container.items() if found is header)
        stem = clean_name(re.sub(r"-\d{5}-of-\d{5}$", "", Path(file).stem))
        if stem != OLDER:
            return stem
    return _folder_name(checkpoint.path)


def _folder_name(folder: Path) -> str:
    """A folder's name; that of its repository for a snapshot in the hub's cache."""
    root = link_root(folder)
    cached = root.name.startswith("models--") and root != real_path(folder)
    return root.name.rpartition("--")[2] if cached else real_path(folder).name


def clean_name(text: str) -> str:
    """A name as part of a file's name on every system: ASCII letters, digits, `.`, `_` and `-`.

    What says how a file is coded (`-GGUF`, a quant at the end) goes. `model` where nothing is left.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    plain = re.sub(r"-{2,}|\.{2,}", "-", _KINDS.sub("", plain))
    plain = without_label(plain.strip("-._"))[:_LONGEST].strip("-._")
    return plain or OLDER
