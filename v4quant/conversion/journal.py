"""Journal: which shards of an unfinished conversion are safely on disk.

Lives in `OUT/.v4quant/` until the checkpoint is whole, one file per rank. The first line is the
plan's digest; each further line is one finished shard with its hash and records, appended only
after the shard was flushed and renamed into place. A line cut short by a crash is ignored: its
shard is made again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v4quant.conversion.records import TensorRecord, record_from_dict
from v4quant.own_folders import FOLDER, forget_home, remove_own_folder
from v4quant_formats.errors import OutputError
from v4quant_formats.manifest import ManifestError
from v4quant_formats.shards import WrittenFile, output_error, sync_folder


@dataclass(frozen=True)
class FinishedShard:
    """A shard that needs no more work."""

    file: WrittenFile
    records: tuple[TensorRecord, ...]


SOURCE_FOLDER = "source"
"""The own folder in which a conversion keeps source shards from the hub."""


def journal_files(out: Path) -> list[Path]:
    """The journals of an unfinished conversion, one per rank that ever worked on it."""
    return sorted((out / FOLDER).glob("journal-*.jsonl"))


def remove_work(out: Path) -> None:
    """Remove what an unfinished conversion keeps in the output folder, and nothing else.

    The journals go last: as long as there is one, the conversion can go on.
    """
    remove_own_folder(out, SOURCE_FOLDER)
    for path in [out / FOLDER / "lock", *journal_files(out)]:
        path.unlink(missing_ok=True)
    forget_home(out)


class Journal:
    """Append-only record of finished shards for one plan."""

    def __init__(
        self,
        out: Path,
        plan_digest: str,
        rank: int = 0,
        elsewhere: Callable[[WrittenFile], bool] = lambda file: False,
    ) -> None:
        """Open or begin rank `rank`'s journal and read everybody's.

        elsewhere: whether a shard that is not in the folder is safe at its destination. Raises
        OutputError when the folder holds another plan's, or a damaged one.
        """
        self._path = out / FOLDER / f"journal-{rank}.jsonl"
        self._out = out
        self._plan_digest = plan_digest
        self._elsewhere = elsewhere
        self.finished: dict[str, FinishedShard] = {}
        self.refresh()
        if not self._read_lines(self._path):
            self._append({"plan": plan_digest}, fresh=True)

    def refresh(self) -> None:
        """Read what all ranks have finished so far."""
        for path in journal_files(self._out):
            self._read(path)

    def _read(self, path: Path) -> None:
        lines = self._read_lines(path)
        if not lines:
            return
        if lines[0].get("plan") != self._plan_digest:
            raise OutputError(
                f"{self._out}: holds an unfinished conversion of another source, recipe or "
                "version; "
                "choose another folder or delete this one"
            )
        for line in lines[1:]:
            try:
                shard = FinishedShard(
                    WrittenFile(**line["file"]), tuple(map(record_from_dict, line["records"]))
                )
            except (KeyError, TypeError, ManifestError):
                raise OutputError(
                    f"{path}: damaged; delete the folder {self._out} and start again"
                ) from None
            if self._is_in_place(shard.file):
                self.finished[shard.file.name] = shard

    def add(self, shard: FinishedShard) -> None:
        """Record a shard that is already on disk under its final name."""
        records = [r.as_dict() for r in shard.records]
        self._append({"file": asdict(shard.file), "records": records})
        self.finished[shard.file.name] = shard

    def remove(self) -> None:
        """The checkpoint is whole: the journal has done its work."""
        remove_work(self._out)
        sync_folder(self._out)

    def _is_in_place(self, file: WrittenFile) -> bool:
        path = self._out / file.name
        here = path.is_file() and path.stat().st_size == file.nbytes
        return here or self._elsewhere(file)

    @staticmethod
    def _read_lines(path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        lines = []
        text = path.read_bytes()
        for raw in text.split(b"\n")[:-1]:  # what follows the last newline was cut short
            try:
                line = json.loads(raw)
            except ValueError:
                break
            lines.append(line if isinstance(line, dict) else {})
        return lines

    def _append(self, line: dict[str, object], fresh: bool = False) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            with self._path.open("wb" if fresh else "r+b") as file:
                if not fresh:
                    # A torn last line must not swallow this one.
                    whole = self._path.read_bytes().rfind(b"\n") + 1
                    file.truncate(whole)
                    file.seek(whole)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                sync_folder(self._path.parent)
        except OSError as error:
            raise output_error(self._path, error) from None


@contextmanager
def locked_output(out: Path) -> Iterator[None]:
    """Hold the output folder for this process. Raises OutputError when another one has it."""
    lock = out / FOLDER / "lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise output_error(lock, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise OutputError(
            f"{out}: another v4quant process is writing here; wait for it or choose another folder"
        ) from None
    try:
        yield
    finally:
        os.close(handle)
