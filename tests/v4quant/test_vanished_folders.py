"""Folders that vanish before or under a command: named, with what to do."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import v4quant
from tests.support.conversion import TINY
from tests.support.fake_hub import FakeHub
from v4quant.cli._folders import explained
from v4quant.hub.download import download, part_path
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import open_remote
from v4quant_formats.errors import OutputError
from v4quant_formats.shards import ShardWriter, plan_shard, temporary_path
from v4quant_formats.spec import TensorSpec

IN_A_GONE_FOLDER = """
import os, sys
os.chdir(sys.argv.pop(1))
os.rmdir(os.getcwd())
from v4quant.cli import main
main()
"""


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_working_folder_that_is_gone(command: str, tmp_path: Path) -> None:
    """As a process: libraries load their parts from where it was started."""
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", IN_A_GONE_FOLDER, gone, command, TINY],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "has been deleted; change into one that exists" in done.stderr


@pytest.mark.parametrize(
    ("where", "work"),
    [("conversion.job", lambda out: v4quant.quantize(TINY, out, scheme="int4-g32")),
     ("onnx_export.export",
      lambda out: v4quant.export_onnx(TINY, out, scheme="int4-g32", layers=["1"]))],
    ids=["quantize", "export-onnx"],
)  # fmt: skip
def test_an_output_folder_that_vanishes(
    where: str, work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "home" / "out"
    monkeypatch.setattr(f"v4quant.{where}._check_space", lambda *_: shutil.rmtree(out.parent))
    with pytest.raises((OutputError, OSError)) as caught:
        work(out)
    error = caught.value
    said = explained(error) if isinstance(error, OSError) else str(error)
    assert os.fspath(tmp_path / "home") in said and "was deleted or moved" in said
    assert "Errno" not in said


def test_what_vanished_is_the_highest_folder_that_did(tmp_path: Path) -> None:
    lost = FileNotFoundError(errno.ENOENT, "no such file", os.fspath(tmp_path / "a" / "b" / "c"))
    assert explained(lost).startswith(f"{tmp_path / 'a'}: was deleted or moved")
    assert "run it again" in explained(FileNotFoundError(errno.ENOENT, "no such file"))
    full = OSError(errno.ENOSPC, "no space", "x")
    assert explained(full) == str(full)


@pytest.mark.parametrize("moment", range(2))
def test_a_folder_that_took_the_place_of_the_output_gets_nothing(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    real, calls = ShardWriter.close, iter(range(100))

    def close(writer: ShardWriter) -> Any:
        written = real(writer)
        if next(calls) == moment:
            out.rename(tmp_path / "moved")
            out.symlink_to(other)
        return written

    monkeypatch.setattr(ShardWriter, "close", close)
    with pytest.raises(OutputError, match=r"taken its place|deleted or moved"):
        v4quant.quantize(TINY, out, scheme="int4-g32")
    # What was under way at that moment may come to its end, and no more.
    assert {p.name for p in other.iterdir()} <= {"mine.txt", ".v4quant"}
    assert not list(other.rglob("*.safetensors*"))
    out.unlink()
    (tmp_path / "moved").rename(out)
    monkeypatch.undo()
    v4quant.quantize(TINY, out, scheme="int4-g32")


def test_a_file_that_took_the_place_of_one_being_written_is_not_taken(tmp_path: Path) -> None:
    """What was hashed is what gets the name."""
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_bytes(b"precious")
    specs = [TensorSpec("a", "F32", (4,))]
    for swap in (lambda path: path.symlink_to(theirs), lambda path: path.write_bytes(b"other")):
        writer = ShardWriter(tmp_path / "out.safetensors", plan_shard(specs))
        writer.add("a", torch.ones(4))
        temporary = temporary_path(tmp_path / "out.safetensors")
        temporary.unlink()
        swap(temporary)
        with pytest.raises(OutputError, match="another file was put in its place"):
            writer.close()
    assert theirs.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_part_that_was_exchanged_while_it_arrived_is_not_taken(
    kind: str, plain_hub: FakeHub, tmp_path: Path
) -> None:
    data = bytes(2**20)
    plain_hub.add_repo("maker/m", {"model.safetensors": data, "config.json": b"{}"})
    remote = open_remote(HubRef("maker/m"))
    target, theirs = tmp_path / "model.safetensors", tmp_path / "theirs"
    theirs.write_bytes(bytes(2**19) + b"x" * 2**19)

    def exchange(count: int) -> None:
        part = part_path(target)
        if count and not part.is_symlink() and part.stat().st_size != theirs.stat().st_size:
            part.unlink()
            part.symlink_to(theirs) if kind == "link" else shutil.copy(theirs, part)

    with pytest.raises(OutputError, match="another file was put in its place"):
        download(remote, remote.files["model.safetensors"], target, advance=exchange)
    assert not target.exists() and theirs.stat().st_size == 2**20
