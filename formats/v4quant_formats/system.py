"""The system: what Linux, macOS and Windows do differently, each with a path that works anywhere.

Files at an offset, new files, locks, hints to the page cache and figures of memory. Where the
better call is missing (it is asked for, not guessed from the system's name) the portable one does
the same, slower. Nothing else of the project asks the system such things.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

_BINARY = getattr(os, "O_BINARY", 0)  # Windows would turn line ends over
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_START, _WAIT = 2, 1 | 2 | 4  # sync_file_range: begin to write; write, and wait for the end of it
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EPERM)
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_HANDLES = Path("/proc/self/fd")
_NO_NAMELESS = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EISDIR, errno.EINVAL, errno.ENOSYS}
# mallopt's number for "blocks from this size on are mapped, and unmapped when freed".
_M_MMAP_THRESHOLD = -3
_RETURNED_BYTES = 2**21


class LockHeld(Exception):
    """Another process, or another part of this one, has the lock."""


def open_for_reading(path: Path) -> int:
    """A handle on an existing file. Raises OSError, also for what is no regular file: a device has
    no end, and a pipe is waited for until somebody writes to it."""
    handle = os.open(path, os.O_RDONLY | _BINARY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return handle


def open_regular(path: Path) -> BufferedReader:
    """A regular file, to read from. Raises OSError as `open_for_reading` does."""
    return os.fdopen(open_for_reading(path), "rb")


def require_regular(path: Path) -> None:
    """For libraries that open files themselves, and would wait for a pipe. Raises OSError."""
    os.close(open_for_reading(path))


def real_path(path: Path) -> Path:
    """Where a path leads, whether or not anything is there; links in a circle lead nowhere, without
    an error of another kind."""
    return Path(os.path.realpath(path))


def create_new(path: Path, mode: int = 0o644) -> int:
    """A handle, to read and write, on a file that was not there. Raises OSError.

    Never opens what somebody else put there: FileExistsError, also for a symbolic link.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK | _BINARY, mode)


def create_nameless(folder: Path, mode: int = 0o644) -> int | None:
    """A handle, to read and write, on a new file in a folder that is gone with its last handle
    unless `give_name` is called; None where the system has none. Raises OSError.
    """
    kind = getattr(os, "O_TMPFILE", 0)
    if not kind or not _HANDLES.is_dir():
        return None
    try:
        return os.open(folder, os.O_RDWR | kind, mode)
    except OSError as error:
        if error.errno not in _NO_NAMELESS:
            raise
        return None


def give_name(handle: int, path: Path) -> None:
    """Give a file of `create_nameless` a name that nothing has yet. Raises OSError."""
    handles = os.open(_HANDLES, os.O_RDONLY)  # only with a folder's handle is the link followed
    try:
        while True:
            try:
                os.link(str(handle), path, src_dir_fd=handles, follow_symlinks=True)
            except InterruptedError:  # by a file system on the network, perhaps when it was done
                if not _is_named(handle, path):
                    continue
            return
    finally:
        os.close(handles)


def _is_named(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.lstat())
    return False


def take_place(path: Path, name: Path) -> None:
    """Give a file a name, in the place of the file that has it. Raises OSError."""
    while True:
        try:
            path.replace(name)
        except InterruptedError:  # as above
            if os.path.lexists(path):
                continue
        return


def open_uncached(handle: int) -> int | None:
    """Another handle on an open file, whose reads and writes pass the page cache by.

    They need memory, places and lengths that are multiples of 4096. None where the system, or the
    file system, has no such thing.
    """
    kind = getattr(os, "O_DIRECT", 0)
    if not kind:
        return None
    try:
        return os.open(_HANDLES / str(handle), os.O_RDWR | kind)
    except OSError:
        return None


def large_pages(size: int) -> mmap.mmap:
    """Memory that begins on a page, of as few and large pages as the system gives.

    For a transfer past the page cache the system must hold every one of them.
    """
    if sys.platform == "linux":  # what other systems share among processes is theirs alone, too
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):  # a kernel, or a Python, without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory
    else:  # noqa: RET505  (a type check for Linux does not read this branch)
        return mmap.mmap(-1, size)


def open_own(path: Path, mode: int = 0o600) -> int:
    """A handle, to read and write, on a file that an earlier run may have left, or a new one.

    Raises OSError, also for what no run leaves: a link, symbolic or hard, or no regular file.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link", str(path))
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK | _BINARY, mode)
    if os.fstat(handle).st_nlink > 1:
        os.close(handle)
        raise OSError(errno.EMLINK, "has other names too", str(path))
    return handle


if sys.platform != "win32" and hasattr(os, "preadv") and hasattr(os, "pwrite"):

    def read_at(handle: int, view: memoryview, offset: int) -> int:
        """Read at most `view` from `offset` on; bytes read, 0 at the end. Raises OSError."""
        return os.preadv(handle, [view], offset)

    def read_parts_at(handle: int, parts: Sequence[memoryview], offset: int) -> int:
        """Fill one part after the other from `offset` on; bytes read in all. Raises OSError."""
        return os.preadv(handle, parts, offset)

    def write_some_at(handle: int, view: memoryview, offset: int) -> int:
        """Write at most `view` at `offset`; bytes written. Raises OSError."""
        return os.pwrite(handle, view, offset)

else:
    # A handle has one position, so only one thread at a time may move it.
    _position = threading.Lock()

    def read_at(handle: int, view: memoryview, offset: int) -> int:
        """Read at most `view` from `offset` on; bytes read, 0 at the end. Raises OSError."""
        with _position:
            os.lseek(handle, offset, os.SEEK_SET)
            data = os.read(handle, len(view))
        view[: len(data)] = data
        return len(data)

    def read_parts_at(handle: int, parts: Sequence[memoryview], offset: int) -> int:
        """Fill one part after the other from `offset` on; bytes read in all. Raises OSError."""
        done = 0
        for part in parts:
            count = read_at(handle, part, offset + done)
            done += count
            if count < len(part):
                break
        return done

    def write_some_at(handle: int, view: memoryview, offset: int) -> int:
        """Write at most `view` at `offset`; bytes written. Raises OSError."""
        with _position:
            os.lseek(handle, offset, os.SEEK_SET)
            return os.write(handle, view)


def bytes_at(handle: int, count: int, offset: int) -> bytes:
    """`count` bytes from `offset` on, fewer at the end of the file. Raises OSError."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = read_at(handle, view[done:], offset + done)
        if not got:
            break
        done += got
    return bytes(view[:done])


def write_at(handle: int, data: Any, offset: int) -> None:
    """Write an object with the buffer interface (bytes, a numpy array) whole. Raises OSError."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += write_some_at(handle, view[done:], offset + done)


def reserve(handle: int, size: int) -> None:
    """Claim blocks now, where the system can, so that a full disk is told at once."""
    if sys.platform == "linux" and size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)


def begin_writing(handle: int, start: int, count: int) -> None:
    """Ask for a range to go to the disk, where the system can. Raises OSError for failed writes."""
    _sync_range(handle, start, count, _START)


def finish_writing(handle: int, start: int, count: int) -> None:
    """Wait until a range is on the disk, where the system can; no promise of durability.

    A failed write is told once, so it is raised here: OSError.
    """
    _sync_range(handle, start, count, _WAIT)


def forget_cached(handle: int, start: int, count: int) -> None:
    """Advise to take clean pages of a range out of the page cache."""
    if sys.platform == "linux" and count > 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, count, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut. Raises OSError."""
    if sys.platform != "win32":  # a folder cannot be opened there; NTFS journals its entries
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold a file as a lock, against other processes and other holders in this one.

    The lock goes with the process, however that ends. On a file system without locks the file names
    the process that holds it, and one of this machine that is gone no longer counts. Raises
    LockHeld, or OSError when the file cannot be made, or has bytes: then it is no lock of ours, and
    a library of locks may empty it.
    """
    if not issubclass(FileLock, SoftFileLock):  # whose files hold the owner, and replace no other
        _refuse_foreign(path)
    try:
        lock = _acquired(path)
    except Timeout:
        raise LockHeld from None
    try:
        yield
    finally:
        lock.release()


def _refuse_foreign(path: Path) -> None:
    with suppress(FileNotFoundError):
        found = path.lstat()
        plain = stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)  # told by who opens it
        if not plain or (stat.S_ISREG(found.st_mode) and found.st_size):
            raise OSError(errno.EEXIST, "exists and is no lock of v4quant; move it away", str(path))


def _acquired(path: Path) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        lock = SoftFileLock(path.with_name(f"{path.name}.holder"), timeout=0, thread_local=False)
        lock.acquire()
    return lock


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far (the present one where none is told)."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    else:  # noqa: RET505  (a type check for Windows does not read this branch)
        try:
            import resource
        except ImportError:
            return current_rss_bytes()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def current_rss_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def total_memory_bytes() -> int:
    """The memory this machine has."""
    return int(psutil.virtual_memory().total)


def available_memory_bytes() -> int:
    """Memory that programs could take now without the system running short."""
    return int(psutil.virtual_memory().available)


def return_freed_memory() -> None:
    """Ask the C library to give large freed blocks back at once, where it is glibc.

    It learns to keep them, and small blocks that live on between them then leave holes that count
    as this process's memory. A cap on memory needs them gone; it costs some speed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's call, if this is Linux."""
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
        if function is not None:
            function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
            found: Callable[[int, int, int, int], int] = function
            return found
    return None


def _sync_range(handle: int, start: int, count: int, how: int) -> None:
    call = _sync_file_range()
    if call is not None and call(handle, start, count, how):
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
