"""ShardWriter: files other libraries read, in any order and from any thread, or no file at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.page_cache import pass_page_cache_by
from v4quant_formats.errors import OutputError
from v4quant_formats.file_hash import hash_file
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shards import (
    ShardWriter,
    plan_shard,
    shard_header,
    shard_order,
    write_file_atomically,
    write_pieces_atomically,
)
from v4quant_formats.spec import DTYPE_BITS, TensorSpec, stored_dtype


def tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = {
        "b": torch.randn(3, 5, generator=generator).bfloat16(),
        "a": torch.randn(7, generator=generator),
        "codes": torch.randint(256, (11, 3), generator=generator, dtype=torch.uint8),
        "scale": torch.randint(255, (5, 2), generator=generator).byte().view(torch.float8_e8m0fnu),
        "table": torch.randint(9, (4, 2), generator=generator),
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
    }
    return made | {"e4m3": torch.randn(9, generator=generator).to(torch.float8_e4m3fn)}


def specs(made: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(n, stored_dtype(t.dtype), tuple(t.shape)) for n, t in made.items()]


def test_the_library_reads_what_we_write(tmp_path: Path, generator: torch.Generator) -> None:
    made = tensors(generator)
    path = tmp_path / "m.safetensors"
    writer = ShardWriter(path, plan_shard(specs(made)))
    for name in reversed(list(made)):
        assert not path.exists(), "nothing counts before it is whole"
        writer.add(name, made[name])
    written = writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    content = path.read_bytes()
    facts = (written.name, written.nbytes, written.sha256)
    assert facts == ("m.safetensors", len(content), hashlib.sha256(content).hexdigest())
    assert hash_file(path) == written.sha256 and writer.nbytes == len(content)
    got = load_file(path)
    assert got.keys() == made.keys()
    for name, tensor in made.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        raw = [t.reshape(-1).view(torch.uint8) for t in (got[name], tensor)]
        assert torch.equal(*raw)


def test_every_tensor_is_aligned(tmp_path: Path, generator: torch.Generator) -> None:
    names = list(made := tensors(generator))
    shuffled = torch.randperm(len(names), generator=generator).tolist()
    made = {names[i]: made[names[i]] for i in shuffled}
    header = shard_header(specs(made))
    assert len(header) % 8 == 0 and struct.unpack("<Q", header[:8])[0] == len(header) - 8
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(sum(s.nbytes for s in specs(made))))
    for spec in read_header(path).values():
        assert spec.offset % (DTYPE_BITS[spec.dtype] // 8) == 0, spec
    ordered = shard_order(specs(made))
    assert shard_order(ordered) == ordered
    assert sorted(s.name for s in ordered) == sorted(names)


@pytest.mark.parametrize("past_the_page_cache", [False, True])
def test_pieces_from_threads(
    tmp_path: Path,
    generator: torch.Generator,
    past_the_page_cache: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if past_the_page_cache:
        pass_page_cache_by(monkeypatch, tmp_path)
    big = torch.randint(256, (1000, 64), generator=generator, dtype=torch.uint8)
    path = tmp_path / "m.safetensors"
    writer = ShardWriter(path, plan_shard([TensorSpec("big", "U8", (1000, 64))]))
    threads = [
        threading.Thread(target=writer.add_piece, args=("big", i * 6400, big[i * 100 :][:100]))
        for i in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.close().sha256 == hash_file(path)
    assert torch.equal(load_file(path)["big"], big)


def test_views_and_transposes_are_written_by_value(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4)
    writer = ShardWriter(tmp_path / "m.safetensors", plan_shard([TensorSpec("x", "F32", (4, 3))]))
    writer.add("x", x.T)
    writer.close()
    assert torch.equal(load_file(tmp_path / "m.safetensors")["x"], x.T)


def test_our_own_guarantees_are_asserted(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "m.safetensors", plan_shard([TensorSpec("x", "F32", (2,))]))
    with pytest.raises(AssertionError, match="never written"):
        writer.close()
    for wrong in (torch.zeros(3), torch.zeros(2).half()):
        with pytest.raises(AssertionError, match="F32"):
            writer.add("x", wrong)
    writer.add("x", torch.zeros(2))
    with pytest.raises(AssertionError, match="twice"):
        writer.add("x", torch.zeros(2))
    writer.abort()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission"),
     (errno.EIO, "Input/output error")],
)  # fmt: skip
def test_failing_writes(
    number: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "m.safetensors"
    writer = ShardWriter(path, plan_shard([TensorSpec("x", "F32", (2,))]))
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError, match=rf"m\.safetensors\.\w+\.part.*{text}"):
        writer.add("x", torch.zeros(2))
    writer.abort()
    with pytest.raises(OutputError, match=text):
        ShardWriter(path, plan_shard([TensorSpec("x", "F32", (2,))]))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=text):
        write_file_atomically(tmp_path / "config.json", b"{}")
    assert not path.exists() and not (tmp_path / "config.json").exists()


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="a system without files without names")
def test_a_file_among_others_leaves_nothing_when_its_writer_is_killed(tmp_path: Path) -> None:
    path, seen = tmp_path / "stats.v4q", []

    def pieces() -> Iterator[bytes]:
        yield b"half "
        seen.append([p.name for p in tmp_path.iterdir()])
        yield b"whole"

    for _ in range(2):  # the second one takes the place of the first
        writer = ShardWriter(path, plan_shard([TensorSpec("x", "F32", (2,))]), nameless=True)
        writer.add("x", torch.ones(2))
        seen.append([p.name for p in tmp_path.iterdir()])
        assert writer.close().sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        write_pieces_atomically(path, pieces())
        assert path.read_bytes() == b"half whole"
    assert seen == [[], [path.name], [path.name], [path.name]]
    writer = ShardWriter(path, plan_shard([TensorSpec("x", "F32", (2,))]), nameless=True)
    writer.abort()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_short_writes_are_continued(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda h, data, at: real(h, data[:13], at))
    made = tensors(generator)
    writer = ShardWriter(tmp_path / "m.safetensors", plan_shard(specs(made)))
    for name, tensor in made.items():
        writer.add(name, tensor)
    writer.close()
    assert torch.equal(load_file(tmp_path / "m.safetensors")["codes"], made["codes"])


def test_small_files_are_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "config.json"
    first = write_file_atomically(path, b"old")
    second = write_file_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert (first.nbytes, second.nbytes) == (3, 5)
    assert second.sha256 == hashlib.sha256(b"newer").hexdigest()
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_unicode_names(tmp_path: Path) -> None:
    header = shard_header([TensorSpec("layer\u00e9", "F32", (1,))])
    assert json.loads(header[8:].decode())["layer\u00e9"]["shape"] == [1]
