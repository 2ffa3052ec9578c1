"""Reading slices of a checkpoint, its identity, and noticing that a file changed."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.support.conversion import TINY
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor, honest_shard
from v4quant_formats import errors
from v4quant_formats.opening import open_checkpoint

FILE = "model-00001-of-00002.safetensors"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


def test_every_tensor_whole_in_rows_and_in_chunks() -> None:
    with open_checkpoint(TINY) as checkpoint:
        for spec in checkpoint:
            with safe_open(TINY / spec.file, "pt") as theirs:
                want = theirs.get_tensor(spec.name)
            got = checkpoint.read(spec.name)
            assert same(got, want)
            assert spec.name in checkpoint and checkpoint.spec(spec.name) is spec
            rows = spec.shape[0]
            cut = rows // 3
            parts = [checkpoint.read_rows(spec.name, *r) for r in ((0, cut), (cut, rows))]
            assert same(parts[0], want[:cut]) and same(parts[1], want[cut:])
            at = 0
            for first, piece in checkpoint.read_chunks(spec.name, limit=1001):
                assert first == at and 0 < piece.nbytes <= 1001
                flat = want.reshape(-1).view(torch.uint8)[at : at + piece.nbytes]
                assert torch.equal(piece.view(torch.uint8), flat)
                at += piece.nbytes
            assert at == spec.nbytes
        total = sum(spec.nbytes for spec in checkpoint)
        assert checkpoint.nbytes == total


def test_bad_rows_and_names() -> None:
    with open_checkpoint(TINY) as checkpoint:
        for rows in ((-1, 2), (2, 1), (0, 385)):
            with pytest.raises(IndexError, match=r"embed\.weight"):
                checkpoint.read_rows("embed.weight", *rows)
        with pytest.raises(errors.MissingTensor, match="'nothing'"):
            checkpoint.read("nothing")


def test_single_file_scalar_empty_and_unreadable_dtype(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {
        "scalar": StoredTensor("F32", (), b"\0\0\x80\x3f"),
        "empty": StoredTensor("BF16", (0, 4), b""),
        "half": StoredTensor("F6_E2M3", (4,), b"abc"),
    }
    (tmp_path / "model.safetensors").write_bytes(honest_shard(tensors))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("scalar").item() == 1.0
        assert checkpoint.read("empty").shape == (0, 4)
        assert list(checkpoint.read_chunks("empty")) == []
        with pytest.raises(errors.UnknownDtype, match=r"model\.safetensors.*'half F6_E2M3"):
            checkpoint.read("half")


def test_digest_says_which_checkpoint_it_is(copy: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        with open_checkpoint(folder) as checkpoint:
            return checkpoint.digest()

    first = digest(TINY)
    assert digest(copy) == first == digest(TINY), "neither place nor time matters"
    content = (copy / FILE).read_bytes()
    tuned = bytearray(content)
    tuned[content.index(b"}}") + 10 :: 2000] = bytes(len(tuned[content.index(b"}}") + 10 :: 2000]))
    (copy / FILE).write_bytes(tuned)
    seen = {first, digest(copy)}
    edited = EditableCheckpoint.read(TINY)
    edited.config["bos_token_id"] = 7
    seen.add(digest(edited.write(tmp_path / "b")))
    edited.rename("norm.weight", "other.weight")
    seen.add(digest(edited.write(tmp_path / "c")))
    assert len(seen) == 4


def touch_later(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize("open_first", [True, False])
@pytest.mark.parametrize("change", ["bytes", "touch", "shrink", "vanish", "replace"])
def test_source_that_changes_underneath(copy: Path, change: str, open_first: bool) -> None:
    with open_checkpoint(copy) as checkpoint:
        if open_first:
            checkpoint.read("embed.weight")
        path = copy / FILE
        if change == "bytes":
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.write(content[:-1] + b"!")
            touch_later(path)
        elif change == "touch":
            touch_later(path)
        elif change == "shrink":
            os.truncate(path, path.stat().st_size - 1)
        elif change == "vanish":
            path.unlink()
        else:
            (copy / "new").write_bytes(path.read_bytes())
            (copy / "new").rename(path)
        if open_first and change in ("vanish", "replace"):
            checkpoint.read("embed.weight")  # the file that was opened is still whole
            return
        with pytest.raises(errors.SourceChanged, match=FILE):
            checkpoint.read("embed.weight")


def test_shrinking_between_check_and_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that ends early is an error, never a short or stale tensor."""
    with open_checkpoint(copy) as checkpoint:
        monkeypatch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(errors.SourceChanged, match=r"embed\.weight"):
            checkpoint.read("embed.weight")


def test_failing_disk(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with open_checkpoint(copy) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(errors.FormatError, match=rf"{FILE}.*embed\.weight.*Input/output"):
            checkpoint.read("embed.weight")


def test_short_reads_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def little(handle: int, buffers: list[memoryview], offset: int) -> int:
        return real(handle, [buffers[0][:777]], offset)

    with open_checkpoint(TINY) as checkpoint:
        want = checkpoint.read("head.weight")
        monkeypatch.setattr(os, "preadv", little)
        assert same(checkpoint.read("head.weight"), want)


def test_threads_may_share_a_checkpoint_and_it_reopens_after_close() -> None:
    checkpoint = open_checkpoint(TINY)
    want = {spec.name: checkpoint.read(spec.name) for spec in checkpoint}
    checkpoint.close()
    wrong: list[str] = []

    def read_all() -> None:
        wrong.extend(n for n, tensor in want.items() if not same(checkpoint.read(n), tensor))

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checkpoint.close()
    assert not wrong
