"""The very same request after success is answered with what it found; any other one is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import v4quant
from tests.support.conversion import TINY, folder_bytes
from v4quant.finished import KEPT, Request, request_key
from v4quant_formats.errors import OutputError
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.user_cache import cache_folder

Do = Callable[..., Any]


def _text(folder: Path) -> dict[str, Any]:
    return {"corpus": folder / "text.npy", "seq_len": 32}


def _statistics(folder: Path, **more: Any) -> Any:
    options = {"min_tokens": 1, "imatrix": folder / "i.gguf", **_text(folder), **more}
    return v4quant.calibrate(TINY, folder / "out", **options)


def _solution(folder: Path, **more: Any) -> Any:
    options = {"solve": "int2-g128", "propagate": False, "min_tokens": 1, **_text(folder), **more}
    return v4quant.calibrate(TINY, folder / "out", **options)


def _recipe(folder: Path, **more: Any) -> Any:
    options = {"fits": "1x24GB", "engine": "vllm", "format": "compressed-tensors", **more}
    text = {"measure_kl": True, "tokens": 64, **_text(folder)}
    return v4quant.allocate(TINY, folder / "out", experts=1, **options, **text)


def _report(folder: Path, **more: Any) -> Any:
    rows = folder / "l.safetensors"
    return v4quant.evaluate(
        TINY, reference=TINY, report=folder / "out", save_logits=rows, **_text(folder), **more
    )


@pytest.mark.parametrize(
    ("do", "other"),
    [
        (_statistics, {"min_tokens": 2}),
        (_solution, {"solve": "int3-g128"}),
        (_recipe, {"fits": "1x48GB"}),
        (_report, {"floors": 2}),
    ],
)
def test_the_same_request_is_answered(
    do: Do,
    other: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the same result, nothing written and no work done; for other threads as well."""
    caplog.set_level(logging.INFO, "v4quant")
    numpy.save(tmp_path / "text.npy", numpy.arange(64) % 200)
    first, made = do(tmp_path), folder_bytes(tmp_path)
    when = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "done already" not in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("v4quant_calibration.corpus.corpus.load_corpus", _forbidden)
        more = {} if do is _recipe else {"threads": 1}
        again = do(tmp_path, **more)
    assert "done already, by the same request" in caplog.text
    assert json.dumps(again.as_dict()) == json.dumps(first.as_dict())
    assert when == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(V4QuantError, match="--overwrite"):
        do(tmp_path, **other)
    numpy.save(tmp_path / "text.npy", numpy.arange(64) % 50)
    with pytest.raises(V4QuantError, match="--overwrite"):
        do(tmp_path)
    numpy.save(tmp_path / "text.npy", numpy.arange(64) % 200)
    assert folder_bytes(tmp_path) == made


def test_a_changed_result_is_not_the_answer(tmp_path: Path) -> None:
    numpy.save(tmp_path / "text.npy", numpy.arange(64) % 200)
    v4quant.evaluate(TINY, report=tmp_path / "r.json", **_text(tmp_path))
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(OutputError, match="move it away"):
        v4quant.evaluate(TINY, report=tmp_path / "r.json", **_text(tmp_path))


def test_keys_know_what_is_asked_files_and_digests(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    first = request_key(("a",), [text], "d")
    assert request_key(("a",), [text], "d") == first
    others = {
        request_key(("b",), [text], "d"),
        request_key(("a",), [], "d"),
        request_key(("a",), [text], "e"),
        request_key(("a",), [text, None], "d"),
        request_key(("a",), [tmp_path / "absent"], "d"),
    }
    text.write_text("two")
    others.add(request_key(("a",), [text], "d"))
    assert len(others | {first}) == 7


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"files": [], "found": 3}', b"[" * 10**5])
def test_a_damaged_record_is_none(record: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    request = Request(request_key("x", []), (file,))
    request.remember({"a": 1})
    assert request.answer() == {"a": 1}
    for path in cache_folder().glob("finished-*.json"):
        path.write_bytes(record)
    assert request.answer() is None


def test_old_records_go(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for number in range(KEPT + 3):
        Request(request_key(number, []), (file,)).remember({})
    assert len(list(cache_folder().glob("finished-*.json"))) == KEPT
    Request("none", ()).remember({})
    assert Request("none", ()).answer() is None


def _forbidden(*_: object, **__: object) -> Any:
    raise AssertionError("work was begun")
