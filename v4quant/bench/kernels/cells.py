"""A bench as a row of cells, none of which can stop the others.

The one who measures has minutes on a borrowed machine. So what a cell raises (a kernel that does
not compile there, memory that does not suffice, a package of another version) becomes a row that
says so; every row is written the moment it exists; and when the time is up, the remaining cells are
named as not measured. Only when the GPU itself has failed (after an illegal access no call works
any more) is there no use in going on, and that is said as well.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from v4quant.bench.kernels.device import Machine
from v4quant_formats.errors import OutputError
from v4quant_formats.small_files import read_begin
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress

Row = TypeVar("Row")
_LONGEST = 300
_BEGIN = b'{"bench": "'  # of every row


@dataclass(frozen=True)
class Missing:
    """A cell that was not measured, and why."""

    cell: str
    reason: str


class Cells:
    """Runs cells one after the other and keeps what became of each."""

    def __init__(
        self,
        bench: str,
        machine: Machine,
        progress: Progress,
        append: Path | None = None,
        minutes: float | None = None,
    ) -> None:
        """append: a file that gets a line of JSON for each row; its folder is made, so that what
        cannot be written fails before anything is measured. minutes: from now on. Raises
        OutputError for a file that is there and holds anything else."""
        if append is not None:
            append.parent.mkdir(parents=True, exist_ok=True)
            append.touch()
            if not _BEGIN.startswith(read_begin(append, len(_BEGIN))):
                raise OutputError(f"{append}: holds no rows of `bench`; give --append another name")
        self.machine, self.missing = machine, list[Missing]()
        self._bench, self._progress, self._append = bench, progress, append
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._broken = ""

    def run(self, cell: str, kind: str, work: Callable[[], Row]) -> Row | None:
        """The row of `work`, recorded under `kind`, or None if there is none."""
        reason = self._broken
        if not reason and self._end is not None and time.monotonic() > self._end:
            reason = "the time was up"
        row = None
        if not reason:
            try:
                row = work()
            except Exception as error:  # noqa: BLE001  # see above
                reason = told(error)
        if reason:
            self.skip(cell, reason)
            self._recover()
        else:
            self._record(kind, row)
        self._progress.advance(1)
        return row

    def skip(self, cell: str, reason: str) -> None:
        """Note that a cell is not measured."""
        self.missing.append(Missing(cell, reason))
        self._record("missing", self.missing[-1])

    def _record(self, kind: str, row: Any) -> None:
        if self._append is None:
            return
        line = {"bench": self._bench, "machine": asdict(self.machine), kind: asdict(row)}
        with self._append.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _recover(self) -> None:
        """Free what the failure held; find out whether the GPU still works."""
        gc.collect()
        if self.machine.device != "cuda" or self._broken:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self._broken = f"the GPU failed before: {told(error)}"


class Once(Generic[Row]):
    """Something that several cells need, made when the first asks; a failure is not repeated."""

    def __init__(self, make: Callable[[], Row]) -> None:
        """make: called once."""
        self._make, self._made = make, list[Row]()
        self._failure = ""

    def __call__(self) -> Row:
        """The thing. Raises what making it raised, and V4QuantError with the same words later."""
        if self._failure:
            raise V4QuantError(f"as before: {self._failure}")
        if not self._made:
            try:
                self._made.append(self._make())
            except Exception as error:
                self._failure = told(error)
                raise
        return self._made[0]


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:_LONGEST]
