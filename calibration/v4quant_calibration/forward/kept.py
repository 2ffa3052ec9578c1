"""Kept layers: what a run in memory leaves on disk now and then, so that killing it loses minutes.

`scratch.py` is for streams that do not fit in memory: every layer goes through its files. Here they
stay where they are, and behind a finished layer they are copied to a folder with all that the run
has found so far, whenever the work since the last copy took twenty times as long as copying does.
A copy has names of its own until `state.json`, which names them, is replaced, so whatever moment a
process is killed in, one whole copy is there. The same run started again finds it by a digest of
everything that decides its numbers, and goes on with the same bits.

Keeping is a service and never a reason to fail: where the folder is another process's, or the disk
has no room, the run goes on without.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from v4quant_calibration.forward.scratch import FileStreams
from v4quant_calibration.forward.state_file import STATE_NAME, RunState, read_state, write_state
from v4quant_calibration.forward.stream import StreamStore
from v4quant_calibration.model.streams import PIECE, Streams, StreamShape, spans
from v4quant_formats.errors import OutputError
from v4quant_formats.folder_lock import locked_folder
from v4quant_formats.shards import write_tensors
from v4quant_formats.system import require_regular

UNFINISHED = ".unfinished"
"""What the name of a folder for kept layers ends in."""
_TENSORS = "tensors.safetensors"
_OURS = re.compile(
    r"(\d+\.(\d+|tap\..+|shared\..+|tensors)\.(rows|safetensors)|state\.json)"
    r"(\.[0-9a-f]{8}\.part)?"
)
_NOTHING = "none"  # a file holds at least one tensor
_WORK_PER_COPY = 20
_BYTES_PER_SECOND = 0.5e9  # of a copy, until one was timed
_ROOM = 2  # times a copy, the old one being there until the new one is whole
_LOG = logging.getLogger(__name__)


class KeptStore:
    """A StreamStore that keeps copies of another's streams. Use it in a `with`."""

    def __init__(self, base: StreamStore, folder: Path, key: str) -> None:
        """base: where streams live. folder: for the copies, of this run alone. key: what decides
        the run's numbers."""
        self._base, self._folder, self._key = base, folder, key
        self._held = contextlib.ExitStack()
        self._live: dict[str, Streams] = {}
        self._found: dict[str, int] = {}
        self._get: Callable[[], Mapping[str, Tensor]] = dict
        self._since, self._copying, self._copied = time.monotonic(), 0.0, 0
        self._keeps = self._take_folder()
        self.finished, self.notes = 0, dict[str, Any]()
        self._tensors: Mapping[str, Tensor] = {}
        if self._keeps:
            self._find_earlier()

    def __enter__(self) -> KeptStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._copied:
            _LOG.info(
                "Kept in %s: %d finished layers; the same command goes on behind them.",
                self._folder, self._copied,
            )  # fmt: skip
        self._held.close()
        if self._keeps and not self._copied:
            remove_kept(self._folder)

    def open(self, name: str, shape: StreamShape) -> Streams:
        """See StreamStore; filled with what an earlier process kept."""
        streams = self._base.open(name, shape)
        if (kept := _kept_name(name)) is None:
            return streams
        self._live[kept] = streams
        if self._found.pop(kept, None) is not None:
            with contextlib.closing(self._file(self.finished, kept, shape)) as file:
                _copy(file, streams)
        return streams

    def behind(self, model: int, done: int, before: Streams, keep: bool) -> Streams:
        """See StreamStore."""
        self._live[str(model)] = self._base.behind(model, done, before, keep)
        return self._live[str(model)]

    def keep(self, get: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """See StreamStore."""
        self._get = get
        found, self._tensors = self._tensors, {}
        return found

    def commit(self, done: int) -> None:
        """Copy the streams, if that costs little beside the work since they were last copied."""
        self._base.commit(done)
        nbytes = sum(streams.shape.nbytes for streams in self._live.values())
        cost = self._copying or nbytes / _BYTES_PER_SECOND
        began = time.monotonic()
        if not self._keeps or began - self._since < _WORK_PER_COPY * cost:
            return
        try:
            if shutil.disk_usage(self._folder).free < _ROOM * nbytes:
                raise OutputError(f"{self._folder}: too little free disk to keep finished layers")
            self._copy_all(done)
        except (OSError, OutputError) as error:
            _LOG.warning("finished layers are not kept: %s", error)
            self._keeps = False
        self._since = time.monotonic()
        self._copying = self._since - began

    def forget(self) -> None:
        """The run is complete: leaving the store removes what was kept."""
        self._copied = 0

    def _take_folder(self) -> bool:
        if self._folder.is_symlink():
            return False
        try:
            self._held.enter_context(locked_folder(self._folder, "taken", stays=False))
        except OutputError:
            return False
        return True

    def _find_earlier(self) -> None:
        """Take an earlier process's copy, if it is of this run and whole."""
        state = read_state(self._folder, self._key)
        if state is None:
            return
        done, tensors = state.finished, self._folder / f"{state.finished}.{_TENSORS}"
        try:
            sizes = {n: (self._folder / f"{done}.{n}").stat().st_size for n in state.files}
            require_regular(tensors)
            found = load_file(tensors)
        except (OSError, SafetensorError):
            return
        if sizes == dict(state.files):
            self.finished, self.notes, self._copied = done, state.notes, done
            self._found = {n.removesuffix(".rows"): s for n, s in sizes.items()}
            self._tensors = {k: v for k, v in found.items() if k != _NOTHING}

    def _copy_all(self, done: int) -> None:
        """A copy of everything behind `done` layers, which replaces the last one."""
        sizes = {}
        for name, streams in self._live.items():
            with contextlib.closing(self._file(done, name, streams.shape)) as file:
                _copy(streams, file)
                file.flush()
            sizes[f"{name}.rows"] = streams.shape.nbytes
        _write_tensors(self._folder / f"{done}.{_TENSORS}", self._get())
        write_state(self._folder, RunState(self._key, done, sizes, self.notes))
        self._copied = done
        for path in self._folder.iterdir():
            if _OURS.fullmatch(path.name) and not path.name.startswith((f"{done}.", STATE_NAME)):
                path.unlink(missing_ok=True)

    def _file(self, done: int, name: str, shape: StreamShape) -> FileStreams:
        return FileStreams(self._folder / f"{done}.{name}.rows", shape)


def remove_kept(folder: Path) -> None:
    """Remove what such a store made there, and the folder if nothing else is in it."""
    if folder.is_symlink():
        return
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and not path.is_dir():
                path.unlink()
        folder.rmdir()


def _kept_name(name: str) -> str | None:
    """Under which name streams are kept: a model's, whatever layer they are behind, taps and
    caches; None for what a layer only works with."""
    model, _, _ = name.partition(".")
    if model.isdigit():
        return model
    return name if name.startswith(("tap.", "shared.")) else None


def _copy(given: Streams, taken: Streams) -> None:
    for start, stop in spans(0, given.shape.tokens, PIECE):
        taken.write(start, given.read(start, stop))
        if given.shape.pre:
            taken.write_pre(start, given.read_pre(start, stop))


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_tensors(path, tensors or {_NOTHING: torch.zeros(1)})
