"""What is no file to read: pipes that nobody writes to, devices without end, links in a circle."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import v4quant
from tests.support.conversion import TINY
from v4quant.evaluation.kld_file import KldFile, is_kld
from v4quant.evaluation.saved_logits import SavedLogits
from v4quant.finished import request_key
from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus
from v4quant_calibration.statistics.stats import is_stats, load_stats
from v4quant_formats.gguf.header import read_gguf_header
from v4quant_formats.gguf.imatrix import is_own_imatrix, looks_like_imatrix, read_imatrix
from v4quant_formats.gguf.imatrix_dat import read_dat
from v4quant_formats.json_object import read_json_object
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.small_files import UnreadableFile, read_begin, read_small
from v4quant_kernels.errors import V4QuantError


def _corpus(path: Path) -> object:
    return load_corpus([path], path.with_name("tokenizer.json"), CorpusRequest(16, None, 0, 100))


READERS: dict[str, Callable[[Path], object]] = {
    ".txt": _corpus, ".jsonl": _corpus, ".json": _corpus, ".npy": _corpus, ".safetensors": _corpus,
    ".jsonl.gz": _corpus, ".parquet": _corpus, ".json.zst": _corpus,
    ".v4q": lambda p: load_stats(p, "d"), ".gguf": read_gguf_header,
    "-imatrix.gguf": lambda p: list(read_imatrix(p)), ".dat": lambda p: list(read_dat(p)),
    ".kld": KldFile, "-logits.safetensors": SavedLogits, "-shard.safetensors": read_header,
    "-config.json": read_json_object, ".toml": lambda p: v4quant.quantize(TINY, "out", recipe=p),
    "": v4quant.inspect, "-adapter": lambda p: v4quant.quantize(
        TINY, "out", scheme="fp8", adapter=p),
}  # fmt: skip


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**43)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "zero": lambda p: p.symlink_to("/dev/zero"),
    "circle": lambda p: p.symlink_to(p),
    "nowhere": lambda p: p.symlink_to("/nowhere"),
    "folder": Path.mkdir,
    "empty": Path.touch,
    "huge": _huge,
}


@pytest.mark.parametrize("odd", ODD)
def test_every_reader_refuses_at_once(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix, read in READERS.items():
        path = tmp_path / f"x{suffix}"
        ODD[odd](path)
        if (suffix, odd) != (".dat", "huge"):  # zeros: no entries, which is a whole file
            with pytest.raises(V4QuantError):
                read(path)
        for guess in (is_stats, is_kld, looks_like_imatrix, is_own_imatrix):
            assert odd == "huge" or not guess(path)
        key = request_key("x", [path])
        assert (key == request_key("x", [None])) == (odd not in ("empty", "huge"))
    assert not (tmp_path / "out").exists()


def test_small_files_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345" and read_begin(path, 3) == b"123"
    with pytest.raises(UnreadableFile, match="more than 4 bytes"):
        read_small(path, 4)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(UnreadableFile, match="not a regular file"):
            read_small(tmp_path, 4)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
