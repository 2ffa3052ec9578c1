"""v4quant.json: readable JSON, whatever it holds; damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from v4quant_formats.manifest import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    ManifestError,
    index_json,
    read_manifest,
    to_json,
)

GOOD = {
    "manifest_version": MANIFEST_VERSION,
    "files": [{"name": "a", "bytes": 1, "sha256": "00"}],
    "tensors": [],
}


@pytest.mark.parametrize(
    "value",
    [
        {},
        GOOD,
        {"a": [], "b": [1, {"c": "\u00e9"}], "d": {"e": [1]}},
        {"lone": "\ud800", "x": ["\udc80"]},
    ],
    ids=ascii,
)
def test_json_round_trip(value: dict[str, object]) -> None:
    data = to_json(value)
    assert json.loads(data) == value
    assert data.endswith(b"}\n")


def test_one_line_per_item() -> None:
    lines = to_json({"tensors": [{"a": 1}, {"a": 2}], "n": 3}).decode().splitlines()
    assert len(lines) == 2 + 2 + 2 + 1


def write(folder: Path, value: object) -> None:
    (folder / MANIFEST_NAME).write_text(json.dumps(value))


def test_read(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="not written by v4quant"):
        read_manifest(tmp_path)
    write(tmp_path, GOOD)
    assert read_manifest(tmp_path) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"manifest_version": 2}, {"manifest_version": None}, {"files": None}, {"files": {}},
        {"files": ["a"]}, {"tensors": None}, {"tensors": [1]},
        {"files": [{"name": 1, "bytes": 1, "sha256": "0"}]},
        {"files": [{"name": "a", "bytes": "1", "sha256": "0"}]},
        {"files": [{"name": "a", "bytes": -1, "sha256": "0"}]},
        {"files": [{"name": "a", "bytes": True, "sha256": "0"}]},
        {"files": [{"name": "a", "bytes": 1}]},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_forms(change: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path, {**GOOD, **change})
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_index() -> None:
    index = json.loads(index_json({"b": "2", "a": "1"}, 5))
    assert index == {"metadata": {"total_size": 5}, "weight_map": {"a": "1", "b": "2"}}
    assert list(index["weight_map"]) == ["a", "b"]
