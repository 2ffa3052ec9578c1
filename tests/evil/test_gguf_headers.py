"""Hostile GGUF headers: each is refused by its own rule, quickly, in one line, in little memory;
beside each stands a benign twin that opens, so that the attack is what is refused."""

from __future__ import annotations

import random
import secrets
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert
from tests.support.gguf_bytes import Line, array, gguf_bytes, string, text, u32
from v4quant.recipe import Recipe
from v4quant_formats import errors
from v4quant_formats.gguf.header import read_gguf_header
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.system import peak_rss_bytes
from v4quant_kernels.errors import V4QuantError

GOOD = gguf_bytes()
PAIR = gguf_bytes(pairs=[("k", u32(7))])
TWO = (Line("a"), Line("b", offset=32))
BIG = 2**63

# (name, evil bytes, error, benign twin)
HEADERS: list[tuple[str, bytes, type[V4QuantError], bytes]] = [
    ("empty file", b"", errors.NotGguf, GOOD),
    ("three bytes", GOOD[:3], errors.NotGguf, GOOD),
    ("other magic", b"GGML" + GOOD[4:], errors.NotGguf, GOOD),
    ("version 1", gguf_bytes(version=1), errors.NotGguf, gguf_bytes(version=2)),
    ("version 4", gguf_bytes(version=4), errors.NotGguf, GOOD),
    ("big-endian", gguf_bytes(version=3 << 24), errors.NotGguf, GOOD),
    ("ends in the counts", GOOD[:12], errors.HeaderTruncated, GOOD),
    ("ends in the table", GOOD[:40], errors.HeaderTruncated, GOOD),
    ("ends in the data", GOOD[:-1], errors.InvalidOffsets, GOOD),
    ("2^64 - 1 tensors", gguf_bytes(tensors=2**64 - 1), errors.HeaderTooLarge, GOOD),
    ("2^63 keys", gguf_bytes(keys=BIG), errors.HeaderTooLarge, GOOD),
    ("more tensors than lines", gguf_bytes(tensors=2, data=0), errors.HeaderTruncated,
     gguf_bytes(TWO, data=64)),
    ("more keys than pairs", gguf_bytes(keys=1), V4QuantError, PAIR),
    ("key of 2^64 - 1 bytes", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1) + bytes(99),
     errors.HeaderTooLarge, PAIR),
    ("key that is no UTF-8", gguf_bytes(pairs=[(b"\xff\xfe", u32(1))]), errors.WrongMetadata, PAIR),
    ("key twice", gguf_bytes(pairs=[("k", u32(1)), ("k", u32(1))]), errors.WrongMetadata,
     gguf_bytes(pairs=[("k", u32(1)), ("l", u32(1))])),
    ("unknown value type", gguf_bytes(pairs=[("k", struct.pack("<II", 13, 0))]),
     errors.WrongMetadata, PAIR),
    ("string beyond the file", gguf_bytes(pairs=[("k", string("v", 10_000))]),
     errors.HeaderTruncated, gguf_bytes(pairs=[("k", string("v"))])),
    ("string of 2^64 - 1", gguf_bytes(pairs=[("k", string("v", 2**64 - 1))]),
     errors.HeaderTooLarge, gguf_bytes(pairs=[("k", string("v"))])),
    ("array beyond the file", gguf_bytes(pairs=[("k", array(4, 1000, bytes(8)))]),
     errors.HeaderTruncated, gguf_bytes(pairs=[("k", array(4, 2, bytes(8)))])),
    ("array of 2^62", gguf_bytes(pairs=[("k", array(4, 2**62, bytes(8)))]),
     errors.HeaderTooLarge, gguf_bytes(pairs=[("k", array(4, 2, bytes(8)))])),
    ("array of 2^31 empty strings", gguf_bytes(pairs=[("k", array(8, 2**31, text("")))]),
     errors.HeaderTooLarge, gguf_bytes(pairs=[("k", array(8, 1, text("")))])),
    ("many arrays", gguf_bytes(pairs=[(f"k{i}", array(0, 2**20, bytes(2**20))) for i in range(5)]),
     errors.HeaderTooLarge, gguf_bytes(pairs=[("k", array(0, 2**20, bytes(2**20)))])),
    ("array of arrays", gguf_bytes(pairs=[("k", array(9, 1, array(4, 1, bytes(4))[4:]))]),
     errors.WrongMetadata, gguf_bytes(pairs=[("k", array(4, 1, bytes(4)))])),
    ("no dimensions", gguf_bytes([Line(dimensions=())]), errors.InvalidShape, GOOD),
    ("five dimensions", gguf_bytes([Line(dimensions=(8, 1, 1, 1, 1))]), errors.InvalidShape,
     gguf_bytes([Line(dimensions=(8, 1, 1, 1))])),
    ("2^31 dimensions", gguf_bytes([Line(count=2**31)]), errors.InvalidShape, GOOD),
    ("a dimension of zero", gguf_bytes([Line(dimensions=(8, 0))]), errors.InvalidShape,
     gguf_bytes([Line(dimensions=(8, 1))])),
    ("product beyond 2^64", gguf_bytes([Line(dimensions=(2**32, 2**32, 8))]), errors.InvalidShape,
     gguf_bytes([Line(dimensions=(2, 2, 2))])),
    ("type 99", gguf_bytes([Line(type_id=99)]), errors.UnknownDtype, GOOD),
    ("removed type 4", gguf_bytes([Line(type_id=4)]), errors.UnknownDtype, GOOD),
    ("half a Q8_0 block", gguf_bytes([Line(dimensions=(16,), type_id=8)], data=64),
     errors.InvalidShape, gguf_bytes([Line(dimensions=(32,), type_id=8)], data=64)),
    ("rows of 128 in Q4_K", gguf_bytes([Line(dimensions=(128, 2), type_id=12)], data=160),
     errors.InvalidShape, gguf_bytes([Line(dimensions=(256, 1), type_id=12)], data=160)),
    ("offset beyond the file", gguf_bytes([Line(offset=64)]), errors.InvalidOffsets, GOOD),
    ("offset 2^64 - 32", gguf_bytes([Line(offset=2**64 - 32)]), errors.InvalidOffsets, GOOD),
    ("offset not aligned", gguf_bytes([Line(offset=16)], data=64), errors.InvalidOffsets,
     gguf_bytes([Line(offset=32)], data=64)),
    ("overlap", gguf_bytes([Line("a", (16,)), Line("b", offset=32)], data=96),
     errors.InvalidOffsets, gguf_bytes([Line("a", (16,)), Line("b", offset=64)], data=96)),
    ("the same place twice", gguf_bytes([Line("a"), Line("b")]), errors.InvalidOffsets,
     gguf_bytes(TWO, data=64)),
    ("a tensor twice", gguf_bytes([Line("a"), Line("a", offset=32)], data=64),
     errors.DuplicateTensor, gguf_bytes(TWO, data=64)),
    ("alignment 0", gguf_bytes(pairs=[("general.alignment", u32(0))]), errors.WrongMetadata,
     gguf_bytes(pairs=[("general.alignment", u32(64))], alignment=64)),
    ("alignment 48", gguf_bytes(pairs=[("general.alignment", u32(48))]), errors.WrongMetadata,
     gguf_bytes(pairs=[("general.alignment", u32(8))], alignment=8)),
    ("alignment 2^31", gguf_bytes(pairs=[("general.alignment", u32(2**31))]),
     errors.WrongMetadata, gguf_bytes(pairs=[("general.alignment", u32(16))], alignment=16)),
    ("alignment is text", gguf_bytes(pairs=[("general.alignment", string("32"))]),
     errors.WrongMetadata, gguf_bytes(pairs=[("general.alignment", u32(32))])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "evil", "error", "good"), HEADERS, ids=[h[0] for h in HEADERS])
def test_hostile_header(
    name: str, evil: bytes, error: type[V4QuantError], good: bytes, tmp_path: Path
) -> None:
    del name
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    read_gguf_header(path)
    path.write_bytes(evil)
    before, started = peak_rss_bytes(), time.monotonic()
    with pytest.raises(error) as caught:
        read_gguf_header(path)
    assert time.monotonic() - started < 1
    assert peak_rss_bytes() - before < 50 * 2**20
    message = str(caught.value)
    assert str(path) in message and "\n" not in message


def test_not_files(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingShard, match="missing"):
        read_gguf_header(tmp_path / "no.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(errors.FormatError, match="not a regular file"):
        read_gguf_header(tmp_path / "folder.gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in several files, not to be changed."""
    out = tmp_path_factory.mktemp("gguf") / "out"
    convert(TINY, out, Recipe("mxfp4", "gguf", split_size="1MB"))
    return out


def _copy(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.glob("*.gguf"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _edit(folder: Path, pattern: str, old: bytes, new: bytes) -> None:
    (path,) = folder.glob(pattern)
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def _number(key: str, value: int) -> bytes:
    return key.encode() + u32(value)


def _rename(folder: Path) -> None:
    parts = sorted(folder.glob("tiny-*.gguf"))
    first, second = parts[0].read_bytes(), parts[1].read_bytes()
    parts[0].write_bytes(second)
    parts[1].write_bytes(first)


def _other_model(folder: Path) -> None:
    (first,) = folder.glob("mtp-*.gguf")
    (folder / "another.gguf").write_bytes(first.read_bytes())


ATTACKS: list[tuple[str, Callable[[Path], object], type[V4QuantError], str]] = [
    ("a part is missing", lambda f: next(f.glob("*-00002-of-*")).unlink(), errors.MissingShard,
     "parts are needed"),
    ("parts change places", _rename, errors.WrongMetadata, "its name says"),
    ("two models", _other_model, errors.FormatError, "holds several"),
    ("another architecture", lambda f: _edit(f, "tiny-*-00001-*", b"\x09\0\0\0\0\0\0\0deepseek4",
     b"\x09\0\0\0\0\0\0\0deepseek9"), errors.WrongMetadata, "only 'deepseek4'"),
    ("a key is missing", lambda f: _edit(f, "tiny-*-00001-*", b"attention.q_lora_rank",
     b"attention.q_lora_rang"), errors.WrongMetadata, "q_lora_rank"),
    ("a key of the wrong type", lambda f: _edit(f, "tiny-*-00001-*",
     _number("deepseek4.block_count", 4), b"deepseek4.block_count" + struct.pack("<If", 6, 4.0)),
     errors.WrongMetadata, "block_count"),
    ("blocks that cannot be", lambda f: _edit(f, "tiny-*-00001-*",
     _number("deepseek4.block_count", 4), _number("deepseek4.block_count", 0)),
     errors.WrongMetadata, "blocks"),
    ("an unknown tensor", lambda f: _edit(f, "tiny-*-00001-*", b"blk.0.attn_norm.weight",
     b"blk.0.attn_gnom.weight"), errors.UnexpectedTensor, "attn_gnom"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "attack", "error", "why"), ATTACKS, ids=[a[0] for a in ATTACKS])
def test_hostile_models(
    name: str,
    attack: Callable[[Path], object],
    error: type[V4QuantError],
    why: str,
    model: Path,
    tmp_path: Path,
) -> None:
    del name
    folder = _copy(model, tmp_path / "model")
    open_checkpoint(folder).close()
    attack(folder)
    with pytest.raises(error, match=why):
        open_checkpoint(folder)


def test_a_part_may_not_lead_out_of_the_folder(model: Path, tmp_path: Path) -> None:
    folder = _copy(model, tmp_path / "model")
    (part,) = folder.glob("tiny-*-00002-*")
    part.rename(tmp_path / "elsewhere.gguf")
    part.symlink_to(tmp_path / "elsewhere.gguf")
    with pytest.raises(errors.UnsafePath, match="leaves the folder"):
        open_checkpoint(folder)


def test_random_damage_is_an_error_of_ours_or_harmless(model: Path, tmp_path: Path) -> None:
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    rng = random.Random(seed)
    (first,) = model.glob("tiny-*-00001-*")
    whole = first.read_bytes()
    path = tmp_path / "m.gguf"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(6000)
            data[at] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            read_gguf_header(path)
        except V4QuantError:
            refused += 1
    assert refused > 30
