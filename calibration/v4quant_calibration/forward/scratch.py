"""Scratch: streams in files, so that neither their size nor a killed process matters.

Every model has two files, and layers write them in turn: the layer that is running reads one and
writes the other, so what it began with stays whole. When all models have a layer behind them, the
files are flushed and `state.json` is replaced, which says how many layers are finished and keeps
the run's notes of them. A process that is killed loses the layer it was in; the same run started
again finds its folder, named by a digest of everything that decides its numbers, and goes on behind
the last finished layer, with the same bits. Another run has another folder.

Rows are read and written by position, not mapped, so that they count as nobody's memory.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4quant_calibration.forward.state_file import RunState, read_state, write_state
from v4quant_calibration.model.streams import Streams, StreamShape
from v4quant_formats.errors import OutputError
from v4quant_formats.folder_lock import LOCK_NAME, locked_folder
from v4quant_formats.shards import output_error
from v4quant_formats.system import (
    open_own,
    read_at,
    reserve,
    sync_folder,
    write_at,
)

PREFIX = "v4quant-evaluate-"
_OURS = re.compile(
    r"(\d+\.[01]|draft\.(trunk\.)?\d+|tap\..+|local|shared\..+)\.rows"
    rf"|state\.json(\.[0-9a-f]{{8}}\.part)?|{LOCK_NAME}(\.holder)?"
)


class FileStreams(Streams):
    """Rows in a file of their own."""

    def __init__(self, path: Path, shape: StreamShape) -> None:
        """Open the file, made as large as the rows. Raises OutputError, also for a full disk."""
        super().__init__(shape)
        self._path = path
        try:
            self._handle = open_own(path)
            if os.fstat(self._handle).st_size != shape.nbytes:
                os.truncate(self._handle, shape.nbytes)
                reserve(self._handle, shape.nbytes)
        except OSError as error:
            raise output_error(path, error) from None

    def read(self, start: int, stop: int) -> Tensor:
        """A copy of the rows. Raises OutputError."""
        rows = torch.empty((stop - start, *self.shape.row), dtype=self.shape.dtype)
        self._fill(rows, start * self.shape.row_bytes)
        return rows.to(self.shape.device)

    def write(self, start: int, rows: Tensor) -> None:
        """Write the rows. Raises OutputError."""
        self._put(rows, start * self.shape.row_bytes)

    def read_pre(self, start: int, stop: int) -> Tensor:
        """As `read`: reading weights lie behind all rows."""
        weights = torch.empty((stop - start, self.shape.pre), dtype=self.shape.dtype)
        self._fill(weights, self._pre_offset(start))
        return weights.to(self.shape.device)

    def write_pre(self, start: int, weights: Tensor) -> None:
        """As `write`."""
        self._put(weights, self._pre_offset(start))

    def _pre_offset(self, row: int) -> int:
        return self.shape.tokens * self.shape.row_bytes + row * self.shape.pre_bytes

    def _fill(self, target: Tensor, offset: int) -> None:
        view, done = _bytes(target), 0
        while done < len(view):
            try:
                count = read_at(self._handle, view[done:], offset + done)
            except OSError as error:
                raise output_error(self._path, error) from None
            if not count:
                raise OutputError(f"{self._path}: became shorter while it was used")
            done += count

    def _put(self, values: Tensor, offset: int) -> None:
        data = values.to("cpu", self.shape.dtype).contiguous()
        try:
            write_at(self._handle, _bytes(data), offset)
        except OSError as error:
            raise output_error(self._path, error) from None

    def flush(self) -> None:
        """Wait until the rows are on disk. Raises OutputError."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise output_error(self._path, error) from None

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._handle)


class Scratch:
    """A StreamStore in a folder of files. Use it in a `with`, and `remove` it when all is done."""

    def __init__(self, folder: Path, key: str, resumes: bool = True) -> None:
        """Take the folder of the run called `key` (hex) below `folder`, and what it finished.

        Without `resumes` the files are room and nothing else: nothing of an earlier process is
        taken, and no layer waits for the disk. Raises OutputError when it cannot be written or
        another process uses it.
        """
        self.folder = folder / f"{PREFIX}{key[:24]}"
        self._key, self._resumes = key, resumes
        self._held = contextlib.ExitStack()
        self._files: dict[str, FileStreams] = {}
        self._held.enter_context(
            locked_folder(
                self.folder,
                f"{self.folder}: the same evaluation is running in another process; wait for it",
            )
        )
        self.finished, self.notes = self._earlier() if resumes else (0, {})

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._held.close()

    def open(self, name: str, shape: StreamShape) -> Streams:
        """The file of streams called `name`; see StreamStore."""
        model, _, done = name.partition(".")
        # Only numbers of layers alternate; "draft.0", "local", "tap.0.42" and the like are names.
        file = f"{model}.{int(done) % 2}" if model.isdigit() else name
        if file not in self._files:
            self._files[file] = FileStreams(self.folder / f"{file}.rows", shape)
        return self._files[file]

    def behind(self, model: int, done: int, before: Streams, keep: bool) -> Streams:
        """The model's other file."""
        return self.open(f"{model}.{done}", before.shape)

    def keep(self, get: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Nothing: runs that find tensors are kept by `KeptStore`."""
        return {}

    def commit(self, done: int) -> None:
        """Flush, then say so. Raises OutputError."""
        if not self._resumes:
            return
        for name, file in self._files.items():
            if name.endswith(f".{done - 1}") if _is_tap(name) else _is_needed(name, done):
                file.flush()
        self.finished = done
        sizes = {name: file.shape.nbytes for name, file in self._files.items()}
        write_state(self.folder, RunState(self._key, done, sizes, self.notes))

    def remove(self) -> None:
        """Delete the folder, unless somebody else's files are in it: the run is complete."""
        with contextlib.suppress(OSError):
            ours = [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name)]
            for path in sorted(ours, key=lambda path: path.name == LOCK_NAME):
                path.unlink()
            self.folder.rmdir()
            sync_folder(self.folder.parent)

    def _earlier(self) -> tuple[int, dict[str, Any]]:
        """Finished layers and notes of an earlier process; nothing if any of it is not in order."""
        state = read_state(self.folder, self._key)
        if state is None:
            return 0, {}
        try:
            for name, size in state.files.items():
                rows = self.folder / f"{name}.rows"
                if _is_needed(name, state.finished) and rows.stat().st_size != size:
                    return 0, {}
        except OSError:
            return 0, {}
        return state.finished, state.notes


def _is_needed(name: str, finished: int) -> bool:
    """Whether a run that goes on behind so many layers reads the file."""
    return _is_tap(name) or name.startswith("shared.") or name.endswith(f".{finished % 2}")


def _is_tap(name: str) -> bool:
    """Whether a file keeps what a layer left for drafts; its name ends in the layer's index."""
    return name.startswith("tap.")


def _bytes(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(rows.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
