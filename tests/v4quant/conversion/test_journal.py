"""The journal: what it vouches for, and what it ignores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from v4quant.conversion.journal import FOLDER, FinishedShard, Journal, locked_output
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
    return FinishedShard(WrittenFile(name, size, "ab"), records)


def journal_file(out: Path) -> Path:
    (path,) = (out / FOLDER).glob("journal*")
    return path


def test_remembers_what_was_added(out: Path) -> None:
    journal = Journal(out, "plan")
    shards = {n: finished(out, n) for n in ("a", "b")}
    for shard in shards.values():
        journal.add(shard)
    assert Journal(out, "plan").finished == shards
    journal.remove()
    assert not (out / FOLDER).exists()


def test_every_way_a_crash_can_cut_it(out: Path) -> None:
    journal = Journal(out, "plan")
    for name in ("a", "b", "c"):
        journal.add(finished(out, name))
    content = journal_file(out).read_bytes()
    ends = [i for i in range(len(content)) if content[i : i + 1] == b"\n"]
    near = {e + d for e in ends for d in (-9, -1, 0, 1, 2, 30)} | {0, len(content)}
    for length in sorted(x for x in near if x <= len(content)):
        for tail in (b"", b"\0" * 9):
            journal_file(out).write_bytes(content[:length] + tail)
            known = Journal(out, "plan")
            whole = sum(length > end for end in ends)
            assert len(known.finished) == max(whole - 1, 0), length
            known.add(finished(out, "d"))
            assert "d" in Journal(out, "plan").finished, "a torn line swallows nothing"


def test_only_files_of_the_right_size_count(out: Path) -> None:
    journal = Journal(out, "plan")
    for name in ("a", "b", "c"):
        journal.add(finished(out, name))
    (out / "a").unlink()
    (out / "b").write_bytes(b"xx")
    assert set(Journal(out, "plan").finished) == {"c"}


def test_another_plan_is_refused(out: Path) -> None:
    Journal(out, "plan")
    with pytest.raises(OutputError, match=f"{out}.*another source, recipe or version"):
        Journal(out, "other")


FILE = {"name": "a", "nbytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    "line",
    [
        {},
        [],
        1,
        {"file": 3, "records": []},
        {"file": {}, "records": []},
        {"file": FILE, "records": 3},
        {"file": FILE, "records": [{"module": 3}]},
    ],
    ids=str,
)
def test_a_damaged_line_is_an_error(line: object, out: Path) -> None:
    Journal(out, "plan")
    path = journal_file(out)
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    with pytest.raises(OutputError, match="damaged; delete the folder"):
        Journal(out, "plan")


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
