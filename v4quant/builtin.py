"""What ships inside the package: the tiny trained V4 and text to calibrate and score it on."""

from __future__ import annotations

from pathlib import Path

from v4quant_kernels.errors import V4QuantError

_DATA = Path(__file__).parent / "data"

TINY_V4 = "builtin:tiny-v4"
HELDOUT = "builtin:heldout"
CALIBRATION = "builtin:calibration"


class BuiltinError(V4QuantError):
    """A `builtin:` name that does not exist."""


def resolve_source(name: str) -> Path:
    """A checkpoint folder: a path, or `builtin:tiny-v4`. Raises BuiltinError."""
    if not name.startswith("builtin:"):
        return Path(name)
    if name == TINY_V4:
        return _DATA / "tiny-v4"
    raise BuiltinError(f"'{name}' is not built in; the only such checkpoint is {TINY_V4}")


def resolve_corpus(names: list[str]) -> list[Path]:
    """Corpus files: paths, `builtin:heldout` or `builtin:calibration`. Raises BuiltinError."""
    files: list[Path] = []
    for name in names:
        if not name.startswith("builtin:"):
            files.append(Path(name))
        elif name in (HELDOUT, CALIBRATION):
            files += sorted((_DATA / "text").glob(f"{name.partition(':')[2]}-*.txt"))
        else:
            raise BuiltinError(f"'{name}' is not built in; there are {HELDOUT} and {CALIBRATION}")
    return files
