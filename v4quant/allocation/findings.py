"""Findings: what an allocation has measured so far, in a file beside its recipe until it is there.

Measuring a large model takes hours, place by place. Each finding is written down when it is made,
so that the same command, after it was killed, measures only what is missing. Findings do not
depend on the budget: they serve a second try with another one as well.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from v4quant import __version__
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.forward.kept import UNFINISHED
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.small_files import read_small

_KIND = "v4quant allocation"
_MAX_BYTES = 2**26
_SECONDS_BETWEEN = 1.0


class Findings:
    """JSON values by name, in a file or, without one, in memory alone."""

    def __init__(self, out: Path | None = None, key: str = "") -> None:
        """out: the recipe that is being made. key: digest of what decides the findings."""
        self._file = None if out is None else out.with_name(f"{out.name}{UNFINISHED}.json")
        self._key, self._found, self._written = key, dict[str, Any](), 0.0
        if self._file is not None and (self._file.exists() or self._file.is_symlink()):
            self._take(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def number(self, name: str) -> float:
        """A finding that is one number."""
        return float(self._found[name])

    def numbers(self, name: str) -> dict[str, float]:
        """A finding that is several, by scheme."""
        return dict(self._found[name])

    def add(self, name: str, value: float | dict[str, float]) -> None:
        """A new finding; those of the last second may not be written down yet."""
        self._found[name] = value
        if time.monotonic() - self._written > _SECONDS_BETWEEN:
            self.keep()

    def keep(self) -> None:
        """Write all findings down. Where that cannot be done they are not kept."""
        if self._file is None:
            return
        state = {"kind": _KIND, "key": self._key, "found": self._found}
        with suppress(OutputError):
            write_file_atomically(self._file, json.dumps(state).encode())
        self._written = time.monotonic()

    def forget(self) -> None:
        """The recipe is there: remove the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()

    def _take(self, file: Path) -> None:
        """Take over a file of ours; one of somebody else's is left alone, and nothing kept."""
        state = None
        if not file.is_symlink():
            with suppress(FormatError, ValueError, RecursionError):
                state = json.loads(read_small(file, _MAX_BYTES))
        if not isinstance(state, dict) or state.get("kind") != _KIND:
            self._file = None
        elif state.get("key") == self._key and isinstance(found := state.get("found"), dict):
            self._found = {
                k: v for k, v in found.items() if _is_finding(v, several=k.startswith("error "))
            }


def findings_key(
    checkpoint: Checkpoint, choices: object, stats: Stats | None, corpus: Corpus | None
) -> str:
    """Digest of all that decides findings. choices: whose repr says what is measured."""
    sha = hashlib.sha256()
    sha.update(repr((__version__, torch.__version__, checkpoint.digest(), choices)).encode())
    for stage in () if stats is None else stats.stages.values():
        for tensor in (stage.tokens, *stage.sums.values()):
            sha.update(tensor.contiguous().numpy().tobytes())
    for window in () if corpus is None else corpus.windows:
        sha.update(f"{len(window)}:".encode() + window.numpy().tobytes())
    return sha.hexdigest()


def _is_finding(value: object, several: bool) -> bool:
    if isinstance(value, dict) != several:
        return False
    numbers = value.values() if isinstance(value, dict) else (value,)
    return all(type(number) in (int, float) for number in numbers)
