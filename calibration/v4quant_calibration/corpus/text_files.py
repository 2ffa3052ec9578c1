"""Text files as they are found: compressed, marked, with rows as lines, a list or columns.

A file's *kind* is its name's last suffix but one for compression: `.jsonl` and `.ndjson` (a row a
line), `.json` (a list of rows, or of texts), `.parquet` (a row a record), anything else plain text.
`.gz` is read by the standard library, `.zst` where Python or the package `zstandard` can,
`.parquet` where `pyarrow` is installed. Line ends are content of a plain text and stay as they are.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4quant_calibration.corpus.errors import CorpusError
from v4quant_formats.errors import FormatError
from v4quant_formats.small_files import read_small

MAX_CORPUS_BYTES = 4 * 2**30
LINE_SUFFIXES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst")
_BOM = "\ufeff"
_PIECE = 1024  # bytes decompressed at a time: a hostile one makes 32 MiB of them
# How files begin that are no text, whatever they are called; the tar's mark stands further in.
_FOREIGN = (
    (b"\x1f\x8b", "is compressed by gzip; call it .gz"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard; call it .zst"),
    (b"BZh", "is compressed by bzip2; unpack it"),
    (b"\xfd7zXZ\0", "is compressed by xz; unpack it"),
    (b"PK\x03\x04", "is a ZIP archive; unpack it"),
    (b"PAR1", "is a parquet file; call it .parquet"),
    (b"ARROW1", "is an Arrow file; save it as .parquet or .jsonl"),
    (b"%PDF-", "is a PDF; give its text"),
    (b"GGUF", "is a GGUF model"),
    (b"\xff\xfe\0\0", "is UTF-32; save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\0\0\xfe\xff", "is UTF-32; save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)
_TAR = (257, b"ustar")
_HEAD = 1 << 20


def kind_of(file: Path) -> str:
    """The suffix that says how a file is read, without its compression's."""
    suffixes = [s.lower() for s in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def stem_of(file: Path) -> str:
    """The name without suffixes that say how a file is read."""
    return Path(file.stem).stem if file.suffix.lower() in _COMPRESSED else file.stem


def holds_rows(file: Path) -> bool:
    """Whether a file is made of rows rather than of one text."""
    return kind_of(file) in (*LINE_SUFFIXES, ".json", ".parquet")


def read_text(file: Path) -> str:
    """A file's text, decompressed. Raises CorpusError naming the file and the remedy."""
    data = _bytes(file)
    try:
        text = data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file}: {_foreign(data) or _encoding(data, error)}") from None
    # A text may begin as an archive does, but it has no zero bytes.
    if b"\0" in data[:_HEAD] and (foreign := _foreign(data)) is not None:
        raise CorpusError(f"{file}: {foreign}")
    return text


def _foreign(data: bytes) -> str | None:
    """What a file is instead of a text in UTF-8, and the remedy."""
    for start, what in _FOREIGN:
        if data.startswith(start):
            return what
    if data[_TAR[0] :].startswith(_TAR[1]):
        return "is a tar archive; unpack it"
    # Text in UTF-16 without its mark is valid UTF-8 as long as it is English.
    sample = data[:_HEAD]
    nuls = sample.count(0)
    if nuls > len(sample) // 4:
        order = "BE" if sample[::2].count(0) > sample[1::2].count(0) else "LE"
        return f"is UTF-16 or no text; if it is, save it as UTF-8 (iconv -f UTF-16{order} -t UTF-8)"
    return None


def _encoding(data: bytes, error: UnicodeDecodeError) -> str:
    if error.end >= len(data) - 3 and error.reason == "unexpected end of data":
        return (
            f"ends inside a UTF-8 character (byte {error.start:,}); the download is incomplete, or "
            "the file is Latin-1: then save it as UTF-8 (iconv -f LATIN1 -t UTF-8)"
        )
    return (
        f"is not UTF-8 (byte {error.start:,} is {data[error.start]:#04x}); if it is Latin-1, save "
        "it as UTF-8 (iconv -f LATIN1 -t UTF-8)"
    )


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file of rows: JSON values, or a parquet file's records.

    A line that is not JSON comes as the CorpusError it is, so that the caller may count it.
    """
    kind = kind_of(file)
    if kind == ".parquet":
        for number, record in enumerate(_parquet(file), 1):
            yield f"{file}: row {number}", record
        return
    text = read_text(file)
    if kind == ".json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError):
            raise CorpusError(f"{file}: is not JSON (one value a line is .jsonl)") from None
        if not isinstance(rows, list):
            raise CorpusError(f"{file}: must be a JSON list of rows")
        for number, row in enumerate(rows, 1):
            yield f"{file}: row {number}", {"text": row} if isinstance(row, str) else row
        return
    # Not splitlines: JSON strings may hold U+2028 and other characters it would break lines at.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError):
            yield where, CorpusError(f"{where} is not JSON")


def _bytes(file: Path) -> bytes:
    try:
        data = read_small(file, MAX_CORPUS_BYTES)
    except FormatError as error:
        raise CorpusError(str(error)) from None
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return _inflate(file, data)
    return _unzstd(file, data) if suffix == ".zst" else data


def _inflate(file: Path, data: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(data), "rb") as opened:
            data = opened.read(MAX_CORPUS_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{file}: cannot be decompressed ({error})") from None
    _bounded(file, data)
    return data


def _unzstd(file: Path, data: bytes) -> bytes:
    """All frames of a file, as `cat` and parallel compressors write several; each must end."""
    module = _optional(file, "zstandard")
    found, rest = bytearray(), memoryview(data)
    try:
        while rest:
            frame = module.ZstdDecompressor().decompressobj()
            while rest and not frame.eof:
                piece, rest = rest[:_PIECE], rest[_PIECE:]
                found += frame.decompress(piece)
                _bounded(file, found)
            if not frame.eof:
                raise CorpusError(f"{file}: ends inside its compressed data; download it again")
            rest = memoryview(data)[len(data) - len(rest) - len(frame.unused_data) :]
    except module.ZstdError as error:
        raise CorpusError(f"{file}: cannot be decompressed ({error})") from None
    return bytes(found)


def _bounded(file: Path, data: bytes | bytearray) -> None:
    if len(data) > MAX_CORPUS_BYTES:
        raise CorpusError(f"{file}: more than {MAX_CORPUS_BYTES >> 30} GiB of text; split it")


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    module = _optional(file, "pyarrow.parquet")
    try:
        for batch in module.ParquetFile(file).iter_batches(256):
            yield from batch.to_pylist()
    except Exception as error:  # noqa: BLE001  (pyarrow raises its own kinds)
        raise CorpusError(f"{file}: cannot be read as parquet ({error})") from None


def _optional(file: Path, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise CorpusError(f"{file}: needs the package {package} (pip install {package})") from None
