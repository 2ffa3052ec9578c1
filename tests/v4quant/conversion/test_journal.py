"""The journal: what it vouches for, and what it ignores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from v4quant.conversion.journal import (
    FOLDER,
    FinishedShard,
    Journal,
    ShardFacts,
    locked_output,
    refuse_survivors,
    remove_work,
)
from v4quant.conversion.records import TensorRecord, record_from_dict
from v4quant_formats.errors import OutputError
from v4quant_formats.manifest import ManifestError
from v4quant_formats.shards import WrittenFile


@pytest.fixture
def out(tmp_path: Path) -> Path:
    with locked_output(tmp_path):
        return tmp_path


def finished(out: Path, name: str, size: int = 3) -> FinishedShard:
    (out / name).write_bytes(b"x" * size)
    records = (
        TensorRecord("m", "cast", "mxfp4", "fp8", 32, 2, 0.5, 0.25),
        TensorRecord("n", "copied", "bf16", "bf16", 4),
    )
    return FinishedShard(WrittenFile(name, size, hashlib.sha256(b"x" * size).hexdigest()), records)


SHARDS = dict.fromkeys(("a", "b", "c", "d"), ShardFacts(3, ("n", "m")))
RUN = "this run"


def journal_of(out: Path, run: str = RUN, plan: str = "plan") -> Journal:
    return Journal(out, plan, SHARDS, run)


def journal_file(out: Path) -> Path:
    (path,) = (out / FOLDER).glob("journal*")
    return path


def test_remembers_what_was_added(out: Path) -> None:
    journal = journal_of(out)
    shards = {n: finished(out, n) for n in ("a", "b")}
    for shard in shards.values():
        journal.add(shard)
    assert journal_of(out).finished == shards
    journal.remove()
    assert not (out / FOLDER).exists()


def test_every_way_a_crash_can_cut_it(out: Path) -> None:
    journal = journal_of(out)
    for name in ("a", "b", "c"):
        journal.add(finished(out, name))
    content = journal_file(out).read_bytes()
    ends = [i for i in range(len(content)) if content[i : i + 1] == b"\n"]
    near = {e + d for e in ends for d in (-9, -1, 0, 1, 2, 30)} | {0, len(content)}
    for length in sorted(x for x in near if x <= len(content)):
        for tail in (b"", b"\0" * 9):
            journal_file(out).write_bytes(content[:length] + tail)
            known = journal_of(out)
            whole = sum(length > end for end in ends)
            assert len(known.finished) == max(whole - 1, 0), length
            known.add(finished(out, "d"))
            assert "d" in journal_of(out).finished, "a torn line swallows nothing"


def test_only_files_of_the_right_size_count(out: Path) -> None:
    journal = journal_of(out)
    for name in ("a", "b", "c"):
        journal.add(finished(out, name))
    (out / "a").unlink()
    (out / "b").write_bytes(b"xx")
    assert set(journal_of(out).finished) == {"c"}


def test_what_another_run_finished_is_read_again(out: Path) -> None:
    """A shard of zeros has the right size; a finished one is checked once a run."""
    journal = journal_of(out)
    for name in ("a", "b", "c"):
        journal.add(finished(out, name))
    (out / "b").write_bytes(bytes(3))
    later = journal_of(out, "another")
    assert not later.finished and set(later.unchecked) == {"a", "b", "c"}
    told: list[int] = []
    later.check(sorted(later.unchecked), 2, told.append)
    assert set(later.finished) == {"a", "c"} and sum(told) == 9
    rank = Journal(out, "plan", SHARDS, "another", 1)
    assert set(rank.finished) == {"a", "c"} and set(rank.unchecked) == {"b"}
    later.add(finished(out, "b"))
    rank.refresh()
    assert set(rank.finished) == {"a", "b", "c"} and not rank.unchecked
    # What was sent away needs no reading: the repository lists it with its digest.
    sent = Journal(out, "plan", SHARDS, "third", 0, lambda file: file.name == "a")
    assert set(sent.finished) == {"a"} and set(sent.unchecked) == {"b", "c"}


@pytest.mark.parametrize("made", [lambda p: p.symlink_to("/dev/zero"), os.mkfifo, Path.mkdir])
def test_a_journal_that_is_no_file(made: Callable[[Path], None], out: Path) -> None:
    made(out / FOLDER / "journal-3.jsonl")
    with pytest.raises(OutputError, match=r"journal-3"):
        journal_of(out)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_journal_is_never_written_through_a_link(link: str, out: Path) -> None:
    victim = out / "victim"
    victim.write_bytes(b"")
    journal_of(out, "first")
    path = journal_file(out)
    path.unlink()
    getattr(path, link)(victim)
    with pytest.raises(OutputError, match="journal-0"):
        journal_of(out)
    assert victim.read_bytes() == b""


def test_survivors_of_an_earlier_run_keep_others_out(out: Path) -> None:
    # The first rank of the earlier run is gone.
    with (
        locked_output(out, 3),
        locked_output(out),
        pytest.raises(OutputError, match="another v4quant process"),
    ):
        refuse_survivors(out)
    with locked_output(out):
        refuse_survivors(out)
    remove_work(out)
    assert not (out / FOLDER).exists()


def test_another_plan_is_refused(out: Path) -> None:
    journal_of(out)
    with pytest.raises(OutputError, match=f"{out}.*another source, recipe or version"):
        journal_of(out, plan="other")


_ROW = {"disposition": "copied", "source": "bf16", "target": "bf16"}
RECORDS = [{"module": "m", **_ROW}, {"module": "n", **_ROW}]
FILE = {"name": "a", "nbytes": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "line",
    [
        {},
        [],
        1,
        {"file": 3, "records": RECORDS},
        {"file": {}, "records": RECORDS},
        {"file": FILE, "records": 3},
        {"file": {**FILE, "name": "z"}, "records": RECORDS},
        {"file": {**FILE, "name": "/etc/passwd"}, "records": RECORDS},
        {"file": {**FILE, "name": "../a"}, "records": RECORDS},
        {"file": {**FILE, "name": ["a"]}, "records": RECORDS},
        {"file": {**FILE, "nbytes": 4}, "records": RECORDS},
        {"file": {**FILE, "sha256": "00"}, "records": RECORDS},
        {"file": {**FILE, "sha256": None}, "records": RECORDS},
        {"file": FILE, "records": []},
        {"file": FILE, "records": RECORDS[:1]},
        {"file": FILE, "records": [*RECORDS, RECORDS[0]]},
        {"file": FILE, "records": [RECORDS[0], RECORDS[0]]},
        {"file": FILE, "records": [{"module": 3}]},
        {"file": FILE, "records": [3]},
        {"file": FILE, "records": "abc"},
        {"file": FILE, "records": ""},
        {"file": FILE, "records": {}},
    ],
    ids=str,
)
def test_a_damaged_line_is_an_error(line: object, out: Path) -> None:
    journal_of(out)
    path = journal_file(out)
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    with pytest.raises(OutputError, match="damaged; delete the folder"):
        journal_of(out)


def test_other_files_of_such_names_are_not_removed(out: Path) -> None:
    inside = out / FOLDER
    for name in ("journal-mine.jsonl", "journal-0.jsonl.bak"):
        (inside / name).write_text("mine\n")
    Journal(out, "p", {}, "r").remove()
    assert sorted(p.name for p in inside.iterdir()) == ["journal-0.jsonl.bak", "journal-mine.jsonl"]
    (inside / "journal-2024.jsonl").write_text("Dear diary\n")
    with pytest.raises(OutputError, match="another source"):
        Journal(out, "p", {}, "r")
    assert (inside / "journal-2024.jsonl").read_text() == "Dear diary\n"


def test_lock(tmp_path: Path) -> None:
    with (
        locked_output(tmp_path),
        pytest.raises(OutputError, match="another v4quant process"),
        locked_output(tmp_path),
    ):
        pass
    with locked_output(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"), locked_output(tmp_path / "file"):
        pass


def test_records_round_trip() -> None:
    for record in (
        TensorRecord("m", "cast", "mxfp4", "fp8", 32, 2, 0.5, 0.25),
        TensorRecord("m", "copied", "bf16", "bf16", 4),
    ):
        table = json.loads(json.dumps(record.as_dict()))
        assert record_from_dict({"target": "", **table}) == record
    lossy = TensorRecord("m", "quantized", "mxfp4", "int4-g32", 32, relative_rms=0.1)
    assert (lossy.exact, lossy.as_dict()["exact"]) == (False, False)


@pytest.mark.parametrize(
    "change",
    [{"module": None}, {"elements": "32"}, {"elements": True}, {"altered": 1.5}, {"reason": "why"},
     {"relative_rms": "0"}, {"surprise": 1}],
    ids=str,
)  # fmt: skip
def test_records_of_another_form(change: dict[str, object]) -> None:
    table = TensorRecord("m", "copied", "bf16", "bf16", 4).as_dict()
    with pytest.raises(ManifestError, match=next(iter(change))):
        record_from_dict({**table, **change})
    for key in ("module", "disposition", "source", "target"):
        with pytest.raises(ManifestError, match=key):
            record_from_dict({k: v for k, v in table.items() if k != key})
