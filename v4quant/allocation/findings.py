"""Findings: what an allocation has measured, beside its recipe until that is there, then cached.

Measuring a large model takes hours, place by place. Each finding is written down when it is made,
so that the same command, after it was killed, measures only what is missing. Findings depend on
neither the budget nor the container, so when a recipe is finished they move to the user's cache
folder: the next one of the same checkpoint measures what is new to it.

A file's key is the digest of all that decides findings, this program's own code among it, so what
is stale is never asked for; the newest `KEPT` files stay.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4quant.own_code import own_code
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.forward.kept import UNFINISHED
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.small_files import read_small
from v4quant_kernels.user_cache import keep_newest, record_name

_KIND = "v4quant allocation"
_MAX_BYTES = 2**26
_SECONDS_BETWEEN = 1.0
_CACHED = "allocate-"
KEPT = 32
"""Files of findings in the cache: for Flash one has some 100 KB."""


class Findings:
    """JSON values by name, in a file or, without one, in memory alone."""

    def __init__(
        self, out: Path | None = None, key: str = "", finished: Path | None = None
    ) -> None:
        """out: the recipe that is being made. key: digest of what decides the findings. finished:
        folder for those of finished recipes."""
        self._file = None if out is None else out.with_name(f"{out.name}{UNFINISHED}.json")
        self._cached = None if finished is None else finished / record_name(_CACHED, key)
        self._key, self._found, self._written = key, dict[str, Any](), 0.0
        if self._cached is not None:
            self._found |= self._read(self._cached) or {}
        if self._file is not None and (self._file.exists() or self._file.is_symlink()):
            if (kept := self._read(self._file)) is None:
                self._file = None  # somebody else's: it is left alone
            else:
                self._found |= kept

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
        if self._file is not None:
            self._write(self._file)
        self._written = time.monotonic()

    def finish(self) -> None:
        """The recipe is there: move the findings to the cache."""
        if self._cached is not None:
            folder = self._cached.parent
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                self._write(self._cached)
                keep_newest(folder, _CACHED, KEPT)
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()

    def _write(self, file: Path) -> None:
        state = {"kind": _KIND, "key": self._key, "found": self._found}
        with suppress(OutputError):
            write_file_atomically(file, json.dumps(state).encode())

    def _read(self, file: Path) -> dict[str, Any] | None:
        """What a file holds of these findings; None for one that is not ours."""
        state = None
        if not file.is_symlink():
            with suppress(FormatError, ValueError, RecursionError):
                state = json.loads(read_small(file, _MAX_BYTES))
        if not isinstance(state, dict) or state.get("kind") != _KIND:
            return None
        found = state.get("found")
        if state.get("key") != self._key or not isinstance(found, dict):
            return {}
        return {k: v for k, v in found.items() if _is_finding(v, several=k.startswith("error "))}


def findings_key(
    checkpoint: Checkpoint, sample: object, stats: Stats | None, corpus: Corpus | None
) -> str:
    """Digest of all that decides findings. sample: whose repr says what is looked at."""
    sha = hashlib.sha256(own_code().encode())
    sha.update(repr((torch.__version__, checkpoint.digest(), sample)).encode())
    for name, tensors in _inputs(stats):
        sha.update(f"{name}\0".encode())
        for tensor in tensors:
            sha.update(tensor.contiguous().numpy().tobytes())
    for window in () if corpus is None else corpus.windows:
        sha.update(f"{len(window)}:".encode() + window.numpy().tobytes())
    return sha.hexdigest()


def _inputs(stats: Stats | None) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """What errors are weighed by."""
    if stats is None:
        return
    for name, stage in stats.stages.items():
        yield f"{name} floor {stats.floor}", (stage.tokens, *stage.sums.values())
    for module, seen in stats.dense.items():
        yield f"{module} rows {seen.rows}", (seen.sums,)


def _is_finding(value: object, several: bool) -> bool:
    if isinstance(value, dict) != several:
        return False
    numbers = value.values() if isinstance(value, dict) else (value,)
    return all(type(number) in (int, float) for number in numbers)
