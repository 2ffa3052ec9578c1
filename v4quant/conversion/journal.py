"""Journal: which shards of an unfinished conversion are safely on disk.

Lives in `OUT/.v4quant/` until the checkpoint is whole, one file per rank. The first line is the
plan's digest; each further line is one finished shard with its hash and records, appended only
after the shard was flushed and renamed into place, or says that a shard which another run finished
was read again and has its hash. A line cut short by a crash is ignored: its shard is made again.

Every line names the run that wrote it. What another run finished counts only after its hash was
compared: its machine may have lost power, its disk may have lied, or the file came from elsewhere.
Journals are input like any other file: a name counts only if the plan has it, and a line only if
it has a record of every module that the plan puts there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v4quant.conversion.records import TensorRecord, record_from_dict
from v4quant.own_folders import FOLDER, forget_home, remove_own_folder
from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.file_hash import hash_file
from v4quant_formats.folder_lock import LOCK_NAME, locked_folder
from v4quant_formats.gguf.file_names import OLDER
from v4quant_formats.shards import WrittenFile, output_error, write_file_atomically
from v4quant_formats.small_files import read_small
from v4quant_formats.system import LockHeld, hold_lock, open_own, sync_folder, write_at

SOURCE_FOLDER = "source"
"""The own folder in which a conversion keeps source shards from the hub."""
MAX_JOURNAL_BYTES = 2**30
_NAME = re.compile(r"journal-\d{1,6}\.jsonl")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class ShardFacts:
    """What a plan says of a shard: its bytes, and the modules that its records are of."""

    nbytes: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class FinishedShard:
    """A shard that needs no more work."""

    file: WrittenFile
    records: tuple[TensorRecord, ...]


def journal_files(out: Path) -> list[Path]:
    """The journals of an unfinished conversion, one per rank that ever worked on it."""
    found = (out / FOLDER).glob("journal-*.jsonl")
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def remove_work(out: Path) -> None:
    """Remove what an unfinished conversion keeps in the output folder, and nothing else.

    The journals go last: as long as there is one, the conversion can go on.
    """
    remove_own_folder(out, SOURCE_FOLDER)
    for path in [*_lock_files(out), *journal_files(out)]:
        # Where files that are open cannot be removed, the lock goes when it is released.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
    forget_home(out)


class Journal:
    """Append-only record of finished shards for one plan."""

    def __init__(
        self,
        out: Path,
        plan_digest: str,
        shards: Mapping[str, ShardFacts],
        run: str,
        rank: int = 0,
        elsewhere: Callable[[WrittenFile], bool] = lambda file: False,
        stem: str = "",
    ) -> None:
        """Open or begin rank `rank`'s journal and read everybody's.

        shards: those of the plan, by name. run: the same for all ranks of this run.
        elsewhere: whether a shard that is not in the folder is safe at its destination. stem: of
        the shards' names, which `begun_stem` tells the next run. Raises OutputError when the folder
        holds another plan's, or a damaged one.
        """
        self._path = out / FOLDER / f"journal-{rank}.jsonl"
        self._out, self._plan_digest, self._shards, self._run = out, plan_digest, shards, run
        self._elsewhere = elsewhere
        self._writing = threading.Lock()
        self.finished: dict[str, FinishedShard] = {}
        self.unchecked: dict[str, FinishedShard] = {}
        self.named: set[str] = set()  # by any line, whether or not that counts
        self.refresh()
        if not _read_lines(self._path):
            self._append({"plan": plan_digest, "stem": stem}, fresh=True)

    def refresh(self) -> None:
        """Read what all ranks have finished so far, and what of other runs is to be checked."""
        checked: set[str] = set()
        for path in journal_files(self._out):
            self._read(path, checked)
        for name in checked & self.unchecked.keys():
            self.finished[name] = self.unchecked.pop(name)

    def _read(self, path: Path, checked: set[str]) -> None:
        lines = _read_lines(path)
        if not lines:
            return
        if lines[0].get("plan") != self._plan_digest:
            raise OutputError(
                f"{self._out}: holds an unfinished conversion of another source, recipe or "
                "version; choose another folder or delete this one (--overwrite does)"
            )
        for line in lines[1:]:
            mine = line.get("run") == self._run
            if isinstance(name := line.get("checked"), str):
                checked |= {name} if mine else set()
                continue
            shard = self._shard(path, line)
            self.named.add(shard.file.name)
            here = self._is_here(shard.file)
            if self._elsewhere(shard.file) or (here and mine):
                self.finished[shard.file.name] = shard
                self.unchecked.pop(shard.file.name, None)
            elif here and shard.file.name not in self.finished:
                self.unchecked[shard.file.name] = shard

    def _shard(self, path: Path, line: Mapping[str, Any]) -> FinishedShard:
        """A line's shard. Raises OutputError for what no run of this plan writes."""
        try:
            file = WrittenFile(**line["file"])
            planned = self._shards.get(file.name) if isinstance(file.name, str) else None
            right = planned is not None and planned.nbytes == file.nbytes
            right &= (
                isinstance(line["records"], list)
                and isinstance(file.sha256, str)
                and bool(_SHA256.fullmatch(file.sha256))
            )
            if right and planned is not None:
                records = tuple(map(record_from_dict, line["records"]))
                if sorted(r.module for r in records) == sorted(planned.modules):
                    return FinishedShard(file, records)
        except (KeyError, TypeError, FormatError):
            pass
        raise OutputError(f"{path}: damaged; delete the folder {self._out} and start again")

    def check(self, names: Iterable[str], threads: int, advance: Callable[[int], None]) -> None:
        """Compare the hashes of shards that another run finished; those that differ do not count.

        threads: shards read at a time. Raises OutputError when one cannot be read.
        """
        shards = [self.unchecked.pop(name) for name in names]
        with ThreadPoolExecutor(threads, "check") as pool:
            for shard, digest in zip(shards, pool.map(self._hash, shards), strict=True):
                advance(shard.file.nbytes)
                if digest == shard.file.sha256:
                    self._append({"checked": shard.file.name, "run": self._run})
                    self.finished[shard.file.name] = shard

    def _hash(self, shard: FinishedShard) -> str:
        path = self._out / shard.file.name
        try:
            return hash_file(path)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be read ({error.strerror}); delete it, and the same command makes "
                "it again"
            ) from None

    def add(self, shard: FinishedShard) -> None:
        """Record a shard that is already on disk under its final name."""
        records = [r.as_dict() for r in shard.records]
        self._append({"file": asdict(shard.file), "records": records, "run": self._run})
        self.finished[shard.file.name] = shard

    def remove(self) -> None:
        """The checkpoint is whole: the journal has done its work."""
        remove_work(self._out)
        sync_folder(self._out)

    def _is_here(self, file: WrittenFile) -> bool:
        path = self._out / file.name
        return path.is_file() and not path.is_symlink() and path.stat().st_size == file.nbytes

    def _append(self, line: dict[str, object], fresh: bool = False) -> None:
        data = json.dumps(line).encode() + b"\n"
        with self._writing:
            try:
                handle = open_own(self._path, 0o644)
                try:
                    # A torn last line must not swallow this one.
                    whole = 0 if fresh else self._path.read_bytes().rfind(b"\n") + 1
                    os.truncate(handle, whole)
                    write_at(handle, data, whole)
                    os.fsync(handle)
                finally:
                    os.close(handle)
                if fresh:
                    sync_folder(self._path.parent)
            except OSError as error:
                raise output_error(self._path, error) from None


def begin_journal(out: Path, plan_digest: str, names: Iterable[str]) -> None:
    """Say that a folder is this plan's, and these files in it, for work that finds by itself how
    far it is. Raises OutputError."""
    lines = [{"plan": plan_digest, "stem": ""}, *({"file": {"name": name}} for name in names)]
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    write_file_atomically(out / FOLDER / "journal-0.jsonl", data)


def begun_plan(out: Path) -> str | None:
    """The digest of the plan that an unfinished conversion in `out` began with."""
    for path in journal_files(out):
        if lines := _read_lines(path):
            return str(lines[0].get("plan"))
    return None


def begun_stem(out: Path, scheme: str) -> str | None:
    """The stem of the names that an unfinished conversion in `out` began with; None without one.

    Raises OutputError for a journal with a stem that no run gives.
    """
    for path in journal_files(out):
        if lines := _read_lines(path):
            stem = lines[0].get("stem", f"{OLDER}-{scheme}")
            if isinstance(stem, str) and (not stem or _STEM.fullmatch(stem)):
                return stem
            raise OutputError(f"{path}: damaged; delete the folder {out} and start again")
    return None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        text = read_small(path, MAX_JOURNAL_BYTES)
    except FormatError as error:
        raise OutputError(str(error)) from None
    lines: list[dict[str, Any]] = []
    for raw in text.split(b"\n")[:-1]:  # what follows the last newline was cut short
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            if not lines and any(raw):  # no process of ours writes such a line
                lines.append({})
            break
        lines.append(line if isinstance(line, dict) else {})
    return lines


def locked_output(
    out: Path, rank: int = 0, look: Callable[[], None] = lambda: None
) -> AbstractContextManager[None]:
    """Hold the output folder for this process; each rank has a lock of its own.

    look: see `locked_folder`. Raises OutputError when another process has it.
    """
    name = f"{LOCK_NAME}-{rank}" if rank else LOCK_NAME
    return locked_folder(out / FOLDER, _taken(out), name, look=look)


def refuse_survivors(out: Path) -> None:
    """Raise OutputError when a rank of an earlier run is still writing, its first rank being gone.

    To be called by who holds the folder, before ranks of this run take their locks.
    """
    for path in _lock_files(out):
        if path.name != LOCK_NAME:
            try:
                with hold_lock(path):
                    pass
            except LockHeld:
                raise OutputError(_taken(out)) from None
            except OSError as error:
                raise output_error(path, error) from None


def refuse_writers(out: Path, *more: Path) -> None:
    """Raise OutputError when some process holds the folder, or one of `more` lock files."""
    for path in [*_lock_files(out), *more]:
        if path.is_file() and path.suffix != ".holder":
            try:
                with hold_lock(path):
                    pass
            except LockHeld:
                raise OutputError(_taken(out)) from None
            except OSError:  # somebody else's file of that name
                continue


def _taken(out: Path) -> str:
    return f"{out}: another v4quant process is writing here; wait for it or choose another folder"


def _lock_files(out: Path) -> list[Path]:
    names = re.compile(rf"{LOCK_NAME}(-\d+)?(\.holder)?")
    inside = out / FOLDER
    return sorted(p for p in inside.iterdir() if names.fullmatch(p.name)) if inside.is_dir() else []
