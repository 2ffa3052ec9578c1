"""Only listed files travel with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from v4quant_formats import sidecars
from v4quant_formats.sidecars import find_sidecars


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_allowed_files_only(tmp_path: Path) -> None:
    allowed = ["LICENSE", "encoding/a.py", "encoding/deep/b.json", "generation_config.json",
               "merges.txt", "tokenizer.json"]  # fmt: skip
    touch(tmp_path, *allowed)
    touch(tmp_path, ".env", "token", "modeling.py", "model.safetensors", "README.md", "config.json",
          "pytorch_model.bin", "encoding/x.so", "encoding/.netrc", "inference/model.py",
          "tokenizer.json.part", "sub/tokenizer.json")  # fmt: skip
    assert find_sidecars(tmp_path) == sorted(allowed)


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = tmp_path / "model"
    touch(folder, "merges.txt", "encoding/a.py")
    (folder / "tokenizer.json").symlink_to(secret)
    (folder / "encoding" / "b.py").symlink_to(secret)
    (folder / "vocab.json").symlink_to("merges.txt")
    (folder / "LICENSE").symlink_to("nowhere")
    (folder / "encoding" / "more").symlink_to(tmp_path)
    assert find_sidecars(folder) == ["encoding/a.py", "merges.txt", "vocab.json"]
    (folder / "encoding" / "a.py").unlink()
    other = tmp_path / "other"
    touch(other / "encoding", "a.py")
    touch(other, "merges.txt")
    (other / "encoding" / "a.py").unlink()
    (other / "encoding").rmdir()
    (other / "encoding").symlink_to(tmp_path)
    assert find_sidecars(other) == ["merges.txt"]


def test_hub_cache_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    touch(tmp_path / "models--a--b", "blobs/1")
    touch(tmp_path, "outside")
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    (snapshot / "LICENSE").symlink_to("../../../outside")
    assert find_sidecars(snapshot) == ["tokenizer.json"]


def test_giants_and_folders_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "tokenizer.json", "LICENSE")
    (tmp_path / "vocab.json").mkdir()
    monkeypatch.setattr(sidecars, "MAX_SIDECAR_BYTES", 10)
    assert find_sidecars(tmp_path) == ["LICENSE"]
