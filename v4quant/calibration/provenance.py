"""What `calibrate` was asked, as it is recorded with its result: see `Provenance`.

Memory, threads and file names of the output are left out, since they change no figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from v4quant.builtin import PREFIX, resolve_corpus
from v4quant.conversion.calibrated import solved_part
from v4quant.recipe import Recipe
from v4quant_calibration.statistics.provenance import DEFAULTS, CorpusText, Option, Provenance
from v4quant_formats.file_hash import file_pieces


def provenance_of(
    names: Sequence[str], recipe: Recipe | None, propagate: bool, **options: Option | None
) -> Provenance:
    """Record a calibration on a corpus that has been read. recipe: what is solved, if anything.

    options: as in DEFAULTS, with underscores. Raises BuiltinError, and OSError for a file that has
    gone.
    """
    texts = tuple(_text(name) for name in names)
    told = {key.replace("_", "-"): value for key, value in options.items()}
    changed = {k: v for k, v in told.items() if v is not None and v != DEFAULTS[k]}
    if recipe is not None and not propagate:
        changed["no-propagate"] = True
    return Provenance(texts, changed, solved_part(recipe) if recipe is not None else {})


def _text(name: str) -> CorpusText:
    """A built-in corpus by the bytes of all its files, in their order."""
    sha, nbytes = hashlib.sha256(), 0
    for file in resolve_corpus([name]):
        for piece in file_pieces(file):
            sha.update(piece)
            nbytes += len(piece)
    told = name if name.startswith(PREFIX) else Path(name).name
    return CorpusText(told, nbytes, sha.hexdigest())
