"""System calls: the better and the portable way do the same."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from v4quant_formats import system
from v4quant_formats.errors import OutputError
from v4quant_formats.folder_lock import locked_folder

POSIX_ONLY = (
    "pread", "preadv", "pwrite", "pwritev", "posix_fadvise", "posix_fallocate", "O_NOFOLLOW",
    "O_NONBLOCK", "O_TMPFILE",
)  # fmt: skip


@pytest.fixture(params=["posix", "portable"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, and the module as it is where POSIX calls are missing."""
    if request.param == "posix":
        yield system
        return
    for name in POSIX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    spec = importlib.util.spec_from_file_location("portable_system", system.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def test_reads_and_writes_at_an_offset(calls: ModuleType, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    model = bytearray(5000)
    handle = calls.create_new(tmp_path / "f")
    os.truncate(handle, len(model))
    calls.reserve(handle, len(model))
    for _ in range(200):
        at, data = rng.randrange(4000), rng.randbytes(rng.randrange(1000))
        model[at : at + len(data)] = data
        calls.write_at(handle, data, at)
        where, count = rng.randrange(5000), rng.randrange(2000)
        assert calls.bytes_at(handle, count, where) == bytes(model[where : where + count])
    calls.begin_writing(handle, 0, 4096)
    calls.finish_writing(handle, 0, 4096)
    calls.forget_cached(handle, 0, 4096)
    os.close(handle)
    assert (tmp_path / "f").read_bytes() == bytes(model)


def test_threads_share_a_handle(calls: ModuleType, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    handle = calls.create_new(tmp_path / "f")
    pieces = [bytes([i]) * 700 for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: calls.write_at(handle, pieces[i], 700 * i), range(64)))
        found = list(pool.map(lambda i: calls.bytes_at(handle, 700, 700 * i), range(64)))
    os.close(handle)
    assert found == pieces


def test_new_files_are_new_and_own_files_have_one_name(calls: ModuleType, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for place in ("symbolic", "hard"):
        path = tmp_path / place
        (path.symlink_to if place == "symbolic" else path.hardlink_to)(victim)
        with pytest.raises(FileExistsError):
            calls.create_new(path)
        with pytest.raises(OSError, match=r"link|names"):
            calls.open_own(path)
    assert victim.read_bytes() == b"precious"
    (tmp_path / "hard").unlink()
    handle = calls.open_own(victim)
    assert calls.bytes_at(handle, 99, 0) == b"precious"
    os.close(handle)


def test_a_file_without_a_name_is_gone_unless_it_is_given_one(
    calls: ModuleType, tmp_path: Path
) -> None:
    for named in (False, True):
        handle = calls.create_nameless(tmp_path)
        if handle is None:
            assert not hasattr(os, "O_TMPFILE"), "this file system has none"
            return
        calls.write_at(handle, b"whole", 0)
        assert not list(tmp_path.iterdir())
        if named:
            calls.give_name(handle, tmp_path / "f")
            with pytest.raises(FileExistsError):
                calls.give_name(handle, tmp_path / "f")
        os.close(handle)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"whole"]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("call", ["link", "rename"])
def test_names_given_while_a_signal_comes(
    call: str, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems on the network may be interrupted, before or after the work is done."""
    name = "link" if call == "link" else "replace"
    real, calls = getattr(os, name), []

    def interrupted(*args: Any, **named: Any) -> None:
        calls.append(args)
        if done or len(calls) > 2:
            real(*args, **named)
        if len(calls) <= 2:
            raise InterruptedError

    monkeypatch.setattr(os, name, interrupted)
    if call == "link":
        handle = system.create_nameless(tmp_path)
        if handle is None:
            return
        system.write_at(handle, b"whole", 0)
        system.give_name(handle, tmp_path / "f")
        os.close(handle)
    else:
        (tmp_path / "part").write_bytes(b"whole")
        (tmp_path / "f").write_bytes(b"old")
        system.take_place(tmp_path / "part", tmp_path / "f")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"f": b"whole"}
    assert len(calls) == (1 if done else 3)


HOLDER = """
import sys, time
from pathlib import Path
{removed}
from v4quant_formats.system import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def _no_flock(number: int) -> str:
    return (
        "import fcntl, errno, os\n"
        f"def refuse(*_): raise OSError({number}, os.strerror({number}))\n"
        "fcntl.flock = refuse"
    )


@pytest.mark.parametrize(
    "removed",
    ["", _no_flock(errno.ENOLCK), _no_flock(errno.EOPNOTSUPP)],
    ids=["flock", "no locks left", "not supported"],
)
def test_locks_go_with_their_process(
    removed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file system knows no locks, and is told apart from a lock that is held."""
    import fcntl

    lock = tmp_path / "lock"
    code = [sys.executable, "-c", HOLDER.format(removed=removed), str(lock)]
    if removed:
        number = int(removed.split("OSError(")[1].split(",", maxsplit=1)[0])

        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
    with subprocess.Popen(code, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(system.LockHeld), system.hold_lock(lock):
            pass
        process.kill()
    with system.hold_lock(lock), pytest.raises(system.LockHeld), system.hold_lock(lock):
        pass


def test_memory_figures_are_those_of_the_system() -> None:
    rss = psutil.Process().memory_info().rss
    assert abs(system.current_rss_bytes() - rss) < 2**26
    assert system.peak_rss_bytes() >= rss - 2**20


def test_a_users_file_of_that_name_is_no_lock(tmp_path: Path) -> None:
    """It is neither emptied nor, by who removes his lock, deleted."""
    lock = tmp_path / "stats.lock"
    lock.write_text("a thesis about locks")
    with pytest.raises(OSError, match="no lock of v4quant"), system.hold_lock(lock):
        pass
    held = locked_folder(tmp_path, "taken", "stats.lock", stays=False)
    with pytest.raises(OutputError, match="no lock of v4quant"), held:
        pass
    assert lock.read_text() == "a thesis about locks"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="no lock of v4quant"), system.hold_lock(pipe):
        pass
