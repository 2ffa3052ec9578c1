"""`--overwrite` replaces what v4quant made, when the new one is whole, and nothing else ever."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import v4quant
import v4quant.api.conversion
from tests.support.conversion import TINY, convert, folder_bytes
from v4quant.conversion.overwrite import replacing
from v4quant_formats.errors import OutputError
from v4quant_kernels.errors import OptionError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two conversions of the tiny model."""
    folder = tmp_path_factory.mktemp("made")
    for scheme in ("int8-g128", "mxfp4"):
        convert(TINY, folder / scheme, scheme)
    return folder / "int8-g128", folder / "mxfp4"


def overwrite(out: Path) -> None:
    v4quant.quantize(TINY, out, scheme="mxfp4", overwrite=True, workers=1)


def test_the_old_one_stays_until_the_new_one_is_whole(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    with pytest.raises(OutputError, match="--overwrite"):
        v4quant.quantize(TINY, out, scheme="mxfp4")

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(v4quant.api.conversion, "run_job", die)
        with pytest.raises(KeyboardInterrupt):
            overwrite(out)
    assert folder_bytes(out) == folder_bytes(made[0])
    overwrite(out)
    assert folder_bytes(out) == folder_bytes(made[1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["file", "gone", "in the way"])
def test_what_came_there_meanwhile_is_not_touched(
    change: str, made: tuple[Path, Path], tmp_path: Path
) -> None:
    out, old = tmp_path / "out", tmp_path / "out.v4quant-old"
    shutil.copytree(made[0], out)
    if change == "in the way":
        old.write_text("mine")
        with pytest.raises(OutputError, match="goes meanwhile"), replacing(out, True):
            raise AssertionError("no work begins")
        assert old.read_text() == "mine" and folder_bytes(out) == folder_bytes(made[0])
        return
    refused = pytest.raises(OutputError, match="not a folder")
    with refused if change == "file" else nullcontext(), replacing(out, True) as new:
        shutil.copytree(made[1], new, dirs_exist_ok=True)
        shutil.rmtree(out)
        if change == "file":
            out.write_text("mine")
    if change == "file":
        assert out.read_text() == "mine" and not old.exists()
        assert folder_bytes(tmp_path / "out.v4quant-new") == folder_bytes(made[1])
    else:
        assert folder_bytes(out) == folder_bytes(made[1])
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_same_conversion_is_not_made_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Finished it is confirmed, begun it is gone on with; nothing stays beside it."""
    out = tmp_path / "out"
    shutil.copytree(made[1], out)
    before = {p.name: p.stat().st_ino for p in out.iterdir()}
    overwrite(out)
    assert {p.name: p.stat().st_ino for p in out.iterdir()} == before
    shutil.rmtree(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("v4quant.conversion.job.finish_folder", _die)
        with pytest.raises(KeyboardInterrupt):
            v4quant.quantize(TINY, out, scheme="mxfp4", workers=1)
    shards = {p.name: p.stat().st_ino for p in out.glob("*.safetensors")}
    overwrite(out)
    assert {p.name: p.stat().st_ino for p in out.glob("*.safetensors")} == shards
    assert folder_bytes(out) == folder_bytes(made[1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_removed_now_is_removed_later(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, old = tmp_path / "out", tmp_path / "out.v4quant-old"
    shutil.copytree(made[0], out)
    real = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.name == "config.json" and path.parent == old:
            raise OSError(errno.EIO, "Input/output error")
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        overwrite(out)
    assert (old / "config.json").exists() and folder_bytes(out) == folder_bytes(made[1])
    overwrite(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_between_the_two_renames(made: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "out.v4quant-old")
    shutil.copytree(made[1], tmp_path / "out.v4quant-new")
    overwrite(tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(made[1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_while_the_old_one_is_removed(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The rest of it goes with the next call; a file of the user's in it is named at once."""
    out, old = tmp_path / "out", tmp_path / "out.v4quant-old"
    shutil.copytree(made[0], out)
    shutil.copytree(made[0], old)
    (old / "config.json").unlink()
    (old / "mine").write_text("mine")
    with pytest.raises(OutputError, match="mine"):
        overwrite(out)
    (old / "mine").unlink()
    overwrite(out)
    assert folder_bytes(out) == folder_bytes(made[1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_lists_the_files_is_removed_last(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, gone, unlink = tmp_path / "out", list[str](), Path.unlink
    shutil.copytree(made[0], out)

    def seen(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "out.v4quant-old":
            gone.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", seen)
    overwrite(out)
    assert gone[-1] == "v4quant.json" and len(gone) > 2


def _foreign(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def _changed(out: Path) -> None:
    (out / "config.json").write_text("{}")


def _edited(out: Path) -> None:
    """As many bytes as before."""
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace("1", "2", 1))


def _among_the_work(out: Path) -> None:
    (out / ".v4quant").mkdir()
    (out / ".v4quant" / "notes.txt").write_text("mine")


def _linked(out: Path) -> None:
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(TINY / "config.json")


def _not_ours(out: Path) -> None:
    (out / "v4quant.json").unlink()


@pytest.mark.parametrize(
    "spoil", [_foreign, _changed, _edited, _among_the_work, _linked, _not_ours]
)
def test_nothing_else_is_replaced(
    spoil: Callable[[Path], None], made: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    spoil(out)
    before = sorted(p.name for p in out.rglob("*"))
    with pytest.raises(OutputError, match="only what v4quant made"):
        overwrite(out)
    assert sorted(p.name for p in out.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_sources_and_repositories_are_not_replaced(made: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "source")
    with pytest.raises(OutputError, match="which is read"):
        v4quant.quantize(tmp_path / "source", tmp_path / "source", scheme="fp8", overwrite=True)
    with pytest.raises(OptionError, match="push --replace"):
        v4quant.quantize(TINY, "hf://a/b", scheme="fp8", overwrite=True)


def test_an_unfinished_one_of_another_recipe_goes(tmp_path: Path) -> None:
    """With files of its journal, and of whoever comes between it and the end nothing."""
    out = tmp_path / "out"
    (out / ".v4quant").mkdir(parents=True)
    (out / ".v4quant" / "journal-0.jsonl").write_text(
        '{"plan": "x"}\n{"file": {"name": "a.gguf"}}\n{"file": {"name": "../b"}}\n'
    )
    (out / "a.gguf").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with replacing(out, True) as place:
        place.mkdir(exist_ok=True)
        (place / "new").write_bytes(b"new")
    assert folder_bytes(out) == {"new": b"new"} and (tmp_path / "b").read_bytes() == b"b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "out"]
