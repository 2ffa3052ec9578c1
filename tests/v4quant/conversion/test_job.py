"""Jobs: the same bytes whatever happens, one process a folder, and full disks survived."""

from __future__ import annotations

import errno
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

import v4quant.conversion.job
import v4quant.conversion.journal
from tests.support.conversion import TINY, convert, folder_bytes, recipe_of
from tests.support.page_cache import pass_page_cache_by
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.checks.verify import verify
from v4quant.conversion.journal import FOLDER, locked_output
from v4quant.recipe import Recipe
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.errors import FormatError, OutputError, SourceChanged
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress

ROOT = Path(__file__).parents[3]

# Conversions slow enough to be killed: every piece written takes a while. The process that imports
# torch stays single-threaded and forks one child for each line it reads.
NURSERY = """
import os, signal, sys, time
from pathlib import Path
from tests.support.conversion import convert
real = os.pwrite
# Shells start background jobs, perhaps this test run, with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    source, out, delay = line.rstrip().split("|")
    child = os.fork()
    if not child:
        os.pwrite = lambda *a: (time.sleep(float(delay)), real(*a))[1]
        try:
            convert(Path(source), Path(out), "int4-g64")
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts conversions in processes of their own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], cwd=ROOT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, source: Path, out: Path, delay: float) -> int:
        """Begin converting to int4-g64; the child's process id."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{source}|{out}|{delay}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Exit code of the child (negative: the signal), and what it said."""
        assert self.process.stdout is not None
        said = ""
        while not (line := self.process.stdout.readline()).startswith("status"):
            said += line
        return int(line.split()[1]), said


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    with nursery.process:
        yield nursery


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.003)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as released: a shard per layer, and sidecars."""
    edited = EditableCheckpoint.read(TINY)
    by_stage: dict[str, dict[str, object]] = {}
    for shard in edited.shards.values():
        for name, tensor in shard.items():
            stage = ".".join(name.split(".")[:2]) if name.startswith(("layers", "mtp")) else "top"
            by_stage.setdefault(f"model-{stage}.safetensors", {})[name] = tensor
    edited.shards = by_stage  # type: ignore[assignment]
    folder = edited.write(tmp_path_factory.mktemp("source") / "tiny")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "encoding").mkdir()
    (folder / "encoding" / "chat.py").write_text("# chat\n")
    (folder / "secrets.env").write_text("no")
    return folder


@pytest.fixture(scope="module")
def expected(many_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder an undisturbed int4-g64 conversion gives."""
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(many_shards, out, "int4-g64")
    assert not verify(out, many_shards, SilentProgress()).findings
    return folder_bytes(out)


def test_the_folder_holds_what_it_should(expected: dict[str, bytes]) -> None:
    shards = {n for n in expected if n.endswith(".safetensors")}
    assert len(shards) == 6
    assert expected.keys() - shards == {
        "config.json", "v4quant.json", INDEX_NAME, "tokenizer.json", "encoding/chat.py",
    }  # fmt: skip
    manifest = json.loads(expected["v4quant.json"])
    assert {f["name"] for f in manifest["files"]} == expected.keys() - {"v4quant.json"}
    assert str(TINY.parent) not in expected["v4quant.json"].decode(), "no path of this machine"


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_workers_do_not_change_a_byte(
    workers: int, many_shards: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    convert(many_shards, tmp_path / "out", "int4-g64", workers=workers)
    assert folder_bytes(tmp_path / "out") == expected


@pytest.mark.parametrize("case", ["int4-g64", "q8_0/gguf"])
def test_the_disk_does_not_change_a_byte(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the page cache as through it; a GGUF file's experts come from all over the source, and
    between its tensors there is padding."""
    convert(TINY, tmp_path / "a", recipe_of(case))
    pass_page_cache_by(monkeypatch, tmp_path)
    convert(TINY, tmp_path / "b", recipe_of(case))
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_killed_at_any_moment(
    nursery: Nursery, many_shards: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL again and again; each run goes on where the last one died."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    out = tmp_path / "out"
    leftovers = 0
    for shards_before in (0, 1, 2, 3, 5):
        child = nursery.start(many_shards, out, 0.004)
        wait_for(lambda n=shards_before: len(list(out.glob("*.safetensors"))) >= n)  # type: ignore[misc]
        time.sleep(rng.random() * 0.1)
        with suppress(ProcessLookupError):  # it was faster than we
            os.kill(child, signal.SIGKILL)
        code, _ = nursery.wait()
        leftovers += len(list(out.glob("*.part")))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if not (out / INDEX_NAME).exists():
            with pytest.raises(V4QuantError):
                open_checkpoint(out)
    assert leftovers, "the kills hit running conversions"
    convert(many_shards, out, "int4-g64")
    assert folder_bytes(out) == expected


def test_interrupted_by_the_user(
    nursery: Nursery, many_shards: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child = nursery.start(many_shards, out, 0.02)
    wait_for(lambda: list(out.glob("*.part")))
    os.kill(child, signal.SIGINT)
    code, said = nursery.wait()
    assert (code, said.split()) == (1, ["KeyboardInterrupt"])
    assert not list(out.glob("*.part")), "an orderly end leaves nothing half written"
    convert(many_shards, out, "int4-g64")
    assert folder_bytes(out) == expected


def test_leftovers_are_never_taken_for_shards(
    many_shards: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Half a shard, half a config, a journal line cut short and a shard nobody vouched for."""
    out = tmp_path / "out"
    stop_after(2, many_shards, out)
    done = sorted(p.name for p in out.glob("*.safetensors"))
    todo = sorted(n for n in expected if n.endswith(".safetensors") and n not in done)
    assert done and len(todo) >= 2
    temporary_of_a_dead_process(out / todo[0]).write_bytes(b"half")
    (out / todo[1]).write_bytes(expected[todo[1]][:1000])
    temporary_of_a_dead_process(out / "config.json").write_bytes(b"{")
    (journal,) = (out / FOLDER).glob("journal*")
    torn = json.dumps({"file": {"name": todo[1]}})[:-3].encode()
    journal.write_bytes(journal.read_bytes() + torn)
    convert(many_shards, out, "int4-g64")
    assert folder_bytes(out) == expected


def temporary_of_a_dead_process(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


class Stop(Exception):
    """Raised inside a conversion by these tests."""


def stop_after(units: int, source: Path, out: Path, scheme: str = "int4-g64") -> None:
    """Run a conversion that fails after so many shards were written."""

    class Stopper(SilentProgress):
        def advance(self, amount: int) -> None:
            if len(list(out.glob("*.safetensors"))) >= units:
                raise Stop

    with pytest.raises(Stop):
        convert(source, out, scheme, progress=Stopper())


def test_finished_shards_are_not_made_again(many_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(3, many_shards, out)
    (journal,) = (out / FOLDER).glob("journal*")
    vouched = [json.loads(line)["file"]["name"] for line in journal.read_text().splitlines()[1:]]
    before = {name: (out / name).stat().st_ino for name in vouched}
    assert len(before) >= 2
    convert(many_shards, out, "int4-g64")
    assert {name: (out / name).stat().st_ino for name in before} == before


def test_a_finished_shard_that_vanished_is_made_again(
    many_shards: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop_after(3, many_shards, out)
    shards = sorted(out.glob("*.safetensors"))
    shards[0].unlink()
    os.truncate(shards[1], 100)
    convert(many_shards, out, "int4-g64")
    assert folder_bytes(out) == expected


def test_a_shard_of_zeros_is_made_again(
    many_shards: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """What another process finished counts by its hash, not by its size."""
    out = tmp_path / "out"
    stop_after(3, many_shards, out)
    shard = min(out.glob("*.safetensors"))
    shard.write_bytes(bytes(shard.stat().st_size))
    convert(many_shards, out, "int4-g64")
    assert folder_bytes(out) == expected


def test_the_folder_is_looked_at_under_its_lock(
    many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes its own conversion between our first look and our lock."""
    out = tmp_path / "out"
    real = v4quant.conversion.job.locked_output

    def late(out: Path, *rest: int, **named: Callable[[], None]) -> AbstractContextManager[None]:
        monkeypatch.setattr(v4quant.conversion.job, "locked_output", real)
        convert(many_shards, out, "mxfp4")
        return real(out, *rest, **named)

    monkeypatch.setattr(v4quant.conversion.job, "locked_output", late)
    with pytest.raises(OutputError, match="not empty"):
        convert(many_shards, out, "int4-g64")
    convert(many_shards, tmp_path / "alone", "mxfp4")
    assert folder_bytes(out) == folder_bytes(tmp_path / "alone")  # and no lock of ours


@pytest.mark.parametrize("link", [True, False])
def test_a_folder_swapped_before_its_lock_stays_as_it_is(
    link: bool, many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, users = tmp_path / "out", tmp_path / "users"
    users.mkdir()
    (users / "thesis.txt").write_text("mine")
    real = v4quant.conversion.job.locked_output

    def late(out: Path, *rest: int, **named: Callable[[], None]) -> AbstractContextManager[None]:
        out.rename(tmp_path / "ours")
        out.symlink_to(users) if link else users.rename(out)
        return real(out, *rest, **named)

    monkeypatch.setattr(v4quant.conversion.job, "locked_output", late)
    with pytest.raises(OutputError, match="not empty"):
        convert(many_shards, out, "int4-g64")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("change", ["vanishes", "changes"])
def test_a_tokenizer_that_does_not_stay(change: str, many_shards: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(many_shards, source)
    tokenizer = source / "tokenizer.json"
    tokenizer.write_text('{"a": 1}')

    class Meddler(SilentProgress):
        def advance(self, amount: int) -> None:
            if change == "vanishes":
                tokenizer.unlink(missing_ok=True)
            else:
                tokenizer.write_text('{"b": 1}')

    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        convert(source, out, "int4-g64", progress=Meddler())
    assert not (out / INDEX_NAME).exists()
    tokenizer.write_text('{"a": 1}')
    convert(source, out, "int4-g64")
    assert (out / "tokenizer.json").read_text() == '{"a": 1}'


def test_nothing_is_written_through_a_link(many_shards: Path, tmp_path: Path) -> None:
    """A folder to resume that somebody prepared."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    stop_after(1, many_shards, out)
    for name in ("encoding", "config.json"):
        (out / name).symlink_to(victim)
        with pytest.raises(OutputError, match="symbolic link"):
            convert(many_shards, out, "int4-g64")
        (out / name).unlink()
    assert not list(victim.iterdir())


@pytest.mark.parametrize("killed", ["journal gone", "all but the lock gone", "before removal"])
def test_killed_between_the_last_steps(
    killed: str, many_shards: Path, expected: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The index is there; the journal is not, or only partly, removed."""
    out = tmp_path / "out"

    def die(out: Path) -> None:
        for file in (out / FOLDER).iterdir():
            if killed != "before removal" and (killed == "journal gone") == (
                "journal" in file.name
            ):
                file.unlink()
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(v4quant.conversion.journal, "remove_work", die)
        with pytest.raises(Stop):
            convert(many_shards, out, "int4-g64")
    assert (out / FOLDER).exists()
    convert(many_shards, out, "int4-g64")
    assert folder_bytes(out) == expected and not (out / FOLDER).exists()


def test_running_again_confirms(converted: Callable[[str], Path]) -> None:
    before = {p: p.stat().st_mtime_ns for p in converted("int4-g32").rglob("*")}
    result = convert(TINY, converted("int4-g32"), "int4-g32")
    assert {p: p.stat().st_mtime_ns for p in converted("int4-g32").rglob("*")} == before
    assert result.lossy_tensors == 60 and result.dropped_tensors == 0
    assert result.mean_relative_rms <= result.worst_relative_rms


def test_result_counts_are_true(converted: Callable[[str], Path], tmp_path: Path) -> None:
    result = convert(TINY, tmp_path / "out", "int8-g32")
    rows = json.loads((tmp_path / "out" / "v4quant.json").read_text())["tensors"]
    with open_checkpoint(tmp_path / "out") as output:
        assert result.tensors == len(output.tensors)
        assert result.bytes_out == sum(f.size for f in output.files.values())
    copied = sum(r["disposition"] == "copied" for r in rows)
    assert (result.copied_tensors, result.exact_tensors) == (copied, len(rows) - copied)
    assert (result.lossy_tensors, result.altered_elements, result.worst_relative_rms) == (0, 0, 0)
    assert result.peak_rss_bytes > 2**20 and result.seconds > 0


def refused(source: Path, out: Path, recipe: Recipe | str, text: str) -> None:
    before = folder_bytes(out) if out.is_dir() else None
    with pytest.raises(OutputError, match=text) as caught:
        convert(source, out, recipe)
    assert str(out) in str(caught.value) and "\n" not in str(caught.value)
    if before is not None:
        assert {k: v for k, v in folder_bytes(out).items() if not k.endswith("/lock")} == {
            k: v for k, v in before.items() if not k.endswith("/lock")
        }, "what was there is untouched"


def test_folders_that_are_not_ours(
    many_shards: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("do not touch")
    refused(many_shards, out, "int4-g64", "not empty.*thesis.tex")
    refused(many_shards, many_shards, "int4-g64", "not empty")
    refused(TINY, converted("int4-g32"), "int4-g64", "not empty")
    refused(TINY, converted("int4-g32"), Recipe("int4-g32", draft="drop"), "not empty")
    (tmp_path / "file").write_text("x")
    refused(many_shards, tmp_path / "file", "int4-g64", "not a folder")
    refused(many_shards, tmp_path / "file" / "deeper", "int4-g64", "cannot be created")


def test_unfinished_folder_of_another_recipe_or_source(many_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(1, many_shards, out)
    for source, recipe in (
        (many_shards, "int4-g32"),
        (many_shards, Recipe("int4-g64", draft="drop")),
        (TINY, "int4-g64"),
    ):
        refused(source, out, recipe, "unfinished conversion of another")


def test_two_processes_on_one_folder(
    nursery: Nursery, many_shards: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with locked_output(out):
        nursery.start(many_shards, out, 0)
        code, said = nursery.wait()
    assert code == 1
    assert said.startswith("OutputError") and "another v4quant process" in said
    convert(many_shards, out, "int4-g64")  # the lock went with its holder
    assert folder_bytes(out) == expected


@pytest.mark.parametrize(
    ("number", "text"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")]
)
@pytest.mark.parametrize("after", [0, 40, 150])
def test_disk_that_fails_is_reported_and_resumed(
    number: int, text: str, after: int, many_shards: Path, expected: dict[str, bytes],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    real, calls = os.pwrite, 0

    def fail(handle: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return real(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match=text) as caught:
            convert(many_shards, out, "int4-g64")
    assert str(out) in str(caught.value)
    assert not (out / INDEX_NAME).exists() and not list(out.glob("*.part"))
    convert(many_shards, out, "int4-g64")
    assert folder_bytes(out) == expected


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_other_failing_calls(
    call: str, many_shards: Path, expected: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """fsync fails from the third time on; opening a file to write fails after the lock."""
    out = tmp_path / "out"
    real, calls = getattr(os, call), 0

    def fail(target: object, *rest: object, **named: object) -> object:
        nonlocal calls
        calls += call == "fsync" or ".part" in str(target)
        if calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(target, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OutputError, match="disk is full"):
            convert(many_shards, out, "int4-g64")
    convert(many_shards, out, "int4-g64")
    assert folder_bytes(out) == expected


def test_too_little_space_is_known_at_once(
    many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OutputError, match=r"needs \d\.\d MB, but only 1\.0 MB are free"):
        convert(many_shards, tmp_path / "out", "int4-g64")
    assert not list((tmp_path / "out").glob("*.safetensors*"))


@pytest.mark.parametrize("change", ["rewrite", "truncate", "restore the time"])
def test_source_that_changes_underneath(change: str, many_shards: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(many_shards, source)
    victim = source / "model-mtp.0.safetensors"

    class Meddler(SilentProgress):
        done = False

        def advance(self, amount: int) -> None:
            if not self.done:
                self.done = True
                content, before = victim.read_bytes(), victim.stat()
                victim.write_bytes(content[:-1] if change == "truncate" else content)
                if change == "restore the time":
                    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(SourceChanged, match=r"model-mtp\.0\.safetensors"):
        convert(source, out, "int4-g64", progress=Meddler())
    assert not (out / INDEX_NAME).exists()


def test_many_files_stay_closed(tmp_path: Path, many_shards: Path) -> None:
    """Neither success nor failure leaks a descriptor."""

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    convert(many_shards, tmp_path / "a", "mxfp4")
    stop_after(2, many_shards, tmp_path / "b", "mxfp4")
    assert open_files() <= before
