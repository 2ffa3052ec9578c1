"""What ships inside the package: tiny trained models, and text to calibrate and score them on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.near_names import did_you_mean

_DATA = Path(__file__).parent / "data"

PREFIX = "builtin:"
TINY_V4 = "builtin:tiny-v4"
TINY_V41 = "builtin:tiny-v41"
CHECKPOINTS = {TINY_V4: "tiny-v4", TINY_V41: "tiny-v41"}
# English prose and Python: the text that published figures of the tiny model are measured on.
HELDOUT = "builtin:heldout"
CALIBRATION = "builtin:calibration"
# These, and documentation, C and JavaScript, other languages, and chats in every mode.
MIXED_HELDOUT = "builtin:mixed-heldout"
MIXED_CALIBRATION = "builtin:mixed-calibration"

_PLAIN = ("code.txt", "prose.txt")
_MIXED = (*_PLAIN, "docs.txt", "c-js.txt", "languages.jsonl", "chats.jsonl")
_CORPORA = {
    HELDOUT: ("heldout", _PLAIN),
    CALIBRATION: ("calibration", _PLAIN),
    MIXED_HELDOUT: ("heldout", _MIXED),
    MIXED_CALIBRATION: ("calibration", _MIXED),
}


class BuiltinError(V4QuantError):
    """A `builtin:` name that does not exist."""


def resolve_source(name: str) -> Path:
    """A checkpoint folder: a path, or the name of a built-in one. Raises BuiltinError."""
    if not name.startswith(PREFIX):
        return Path(name)
    if name in CHECKPOINTS:
        return _DATA / CHECKPOINTS[name]
    raise _not_built_in(name, CHECKPOINTS)


def resolve_corpus(names: list[str]) -> list[Path]:
    """Corpus files: paths, or those of a built-in corpus. Raises BuiltinError."""
    files: list[Path] = []
    for name in names:
        if not name.startswith(PREFIX):
            files.append(Path(name))
        elif name in _CORPORA:
            half, kinds = _CORPORA[name]
            files += [_DATA / "text" / f"{half}-{kind}" for kind in kinds]
        else:
            raise _not_built_in(name, _CORPORA)
    return files


def _not_built_in(name: str, known: Iterable[str]) -> BuiltinError:
    names = list(known)
    meant = did_you_mean(name, names)
    return BuiltinError(f"'{name}' is not built in; {meant}there are {', '.join(names)}")
