"""Which program is running: what it finds is known again only by itself."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import v4quant
import v4quant_calibration
import v4quant_formats
import v4quant_kernels


@cache
def own_code() -> str:
    """Digest of this program: another version, or a changed clone, may find otherwise."""
    sha = hashlib.sha256()
    for package in (v4quant_kernels, v4quant_formats, v4quant_calibration, v4quant):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            sha.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return sha.hexdigest()
