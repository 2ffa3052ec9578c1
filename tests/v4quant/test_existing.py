"""Files that are there already stay, unless `--overwrite` is given and v4quant wrote them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import v4quant
import v4quant.calibration.collect
from tests.support.conversion import TINY, folder_bytes
from v4quant.existing import (
    NewFile,
    NewFiles,
    is_signed,
    place_beside,
    refuse_existing,
    signed,
    statistics_file,
)
from v4quant_formats.errors import OutputError
from v4quant_formats.shards import write_file_atomically
from v4quant_kernels.user_cache import cache_folder

Make = Callable[[Path, Path, bool], object]


def _text(folder: Path) -> dict[str, Any]:
    numpy.save(folder / "text.npy", numpy.arange(64) % 200)
    return {"corpus": folder / "text.npy", "seq_len": 32}


def _statistics(folder: Path, out: Path, overwrite: bool) -> object:
    return v4quant.calibrate(TINY, out, min_tokens=1, overwrite=overwrite, **_text(folder))


def _imatrix(folder: Path, out: Path, overwrite: bool) -> object:
    stats = folder / "stats.v4q"
    stats.unlink(missing_ok=True)
    return v4quant.calibrate(
        TINY, stats, min_tokens=1, imatrix=out, overwrite=overwrite, **_text(folder)
    )


def _recipe(folder: Path, out: Path, overwrite: bool) -> object:
    return v4quant.allocate(
        TINY, out, budget=10**9, format="compressed-tensors", engine="vllm", experts=1,
        overwrite=overwrite,
    )  # fmt: skip


def _run_file(folder: Path, out: Path, overwrite: bool) -> object:
    return v4quant.plan(TINY, machine="2x3090", write=out, overwrite=overwrite)


def _report(folder: Path, out: Path, overwrite: bool) -> object:
    return v4quant.evaluate(TINY, report=out, overwrite=overwrite, **_text(folder))


def _logits(folder: Path, out: Path, overwrite: bool) -> object:
    return v4quant.evaluate(TINY, save_logits=out, overwrite=overwrite, **_text(folder))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (_statistics, "s.v4q"),
        (_imatrix, "i.gguf"),
        (_recipe, "r.toml"),
        (_run_file, "run.toml"),
        (_report, "r.html"),
        (_report, "r.json"),
        (_logits, "l.safetensors"),
    ],
)
def test_a_file_is_replaced_only_if_asked_and_ours(make: Make, name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    make(tmp_path, out, False)
    before, kept = out.read_bytes(), out.stat().st_ino
    shutil.rmtree(cache_folder(), ignore_errors=True)  # nobody knows which request made it
    if make is _run_file:  # written from headers alone, so the same request is known by its bytes
        make(tmp_path, out, False)
    else:
        with pytest.raises(OutputError, match=f"{name}: exists already .*--overwrite"):
            make(tmp_path, out, False)
    assert out.stat().st_ino == kept
    make(tmp_path, out, True)
    assert make is _run_file or out.stat().st_ino != kept
    if name.startswith("r."):  # a report's command is of this process, its bytes the same
        assert len(out.read_bytes()) == len(before)
    else:
        assert out.read_bytes() == before
    for other in (b"my notes\n", before[: len(before) // 2], before + b"\nmine" * 10):
        out.write_bytes(other)
        with pytest.raises(OutputError, match="move it away or choose another name"):
            make(tmp_path, out, True)
        assert out.read_bytes() == other
    assert not list(tmp_path.glob("*.v4quant-new*"))


def test_a_run_file_of_another_request_stays(tmp_path: Path) -> None:
    out = tmp_path / "run.toml"
    _run_file(tmp_path, out, False)
    before = out.read_bytes()
    with pytest.raises(OutputError, match=r"run\.toml: exists already"):
        v4quant.plan(shutil.copytree(TINY, tmp_path / "m"), machine="2x3090", write=out)
    assert out.read_bytes() == before


def test_a_base_file_of_llama_cpp_is_nobodys(tmp_path: Path) -> None:
    out = tmp_path / "base.kld"
    _logits(tmp_path, out, False)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="move it away"):
        _logits(tmp_path, out, True)
    assert out.read_bytes() == before


def test_other_things_of_that_name(tmp_path: Path) -> None:
    """Folders, links that lead nowhere; and nothing is asked of what is not there."""
    file = NewFile(tmp_path / "a", "a recipe", is_signed)
    NewFiles([None, file], overwrite=False)
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="move it away"):
        refuse_existing([file], overwrite=True)
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        refuse_existing([file], overwrite=True)


def test_places_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before hours of work; root may write to any folder, but to no read-only file system."""
    (tmp_path / "file").touch()
    below = NewFile(tmp_path / "file" / "x" / "a", "a recipe", is_signed)
    with pytest.raises(OutputError, match="file is not a folder"):
        refuse_existing([below], overwrite=False)
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != tmp_path and real(p, mode))
    for name in ("a", "new/folder/a"):
        with pytest.raises(
            OutputError, match=rf"{name}: cannot be written: {tmp_path} is read-only"
        ):
            refuse_existing([NewFile(tmp_path / name, "a recipe", is_signed)], overwrite=False)


@pytest.mark.parametrize("suffix", [".toml", ".md", ".html", ".htm", ""])
def test_a_signed_text_is_known_and_a_changed_one_not(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    text = signed("one\ntwo", suffix)
    file.write_bytes(text.encode())
    assert is_signed(file) and text.startswith("one\ntwo\n")
    for changed in (text.replace("two", "three"), text + "\n", text[:-2], text[1:], ""):
        file.write_bytes(changed.encode())
        assert not is_signed(file)


def test_killed_while_two_files_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on, another one is refused, and nothing is left in the end."""
    rows, page, text = tmp_path / "l.safetensors", tmp_path / "r.md", _text(tmp_path)

    def both(**more: Any) -> None:
        v4quant.evaluate(TINY, save_logits=rows, report=page, **text, **more)

    with monkeypatch.context() as patch:
        patch.setattr("v4quant.api.evaluation.put_in_place", _die)
        with pytest.raises(KeyboardInterrupt):
            both()
    assert page.is_file() and place_beside(rows).is_file() and not rows.exists()
    with pytest.raises(OutputError, match=r"r\.md: exists already"):
        both(floors=2)
    both()
    assert sorted(folder_bytes(tmp_path)) == ["l.safetensors", "r.md", "text.npy"]
    with pytest.raises(OutputError, match="exists already"):
        both(floors=2)


def test_killed_while_statistics_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _text(tmp_path)

    def both() -> None:
        out, matrix = tmp_path / "s.v4q", tmp_path / "i.gguf"
        v4quant.calibrate(TINY, out, imatrix=matrix, min_tokens=1, **text)

    with monkeypatch.context() as patch:
        patch.setattr("v4quant.api.calibration.put_in_place", _die)
        with pytest.raises(KeyboardInterrupt):
            both()
    assert (tmp_path / "s.v4q").is_file() and not (tmp_path / "i.gguf").exists()
    both()
    assert sorted(folder_bytes(tmp_path)) == ["i.gguf", "s.v4q", "text.npy"]


def test_a_note_of_the_same_request_lets_nobodys_file_be_replaced(tmp_path: Path) -> None:
    file = statistics_file(tmp_path / "s.v4q")
    with pytest.raises(KeyboardInterrupt), NewFiles([file], False, "request").finishing():
        raise KeyboardInterrupt
    file.path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="move it away"):
        NewFiles([file], True, "request")


def _die(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_solution_is_replaced_when_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "solved"
    header = {"version": 1, "source_digest": "x", "corpus_digest": "y", "finished": False}
    out.mkdir()
    (out / "solution.json").write_text(json.dumps(header))
    (out / "layers.0.attn.safetensors").write_bytes(b"of another run")
    earlier = folder_bytes(out)

    def solve(overwrite: bool) -> None:
        v4quant.calibrate(
            TINY, out, solve="int4-g64", propagate=False, min_tokens=1, overwrite=overwrite,
            **_text(tmp_path),
        )  # fmt: skip

    with pytest.raises(Exception, match="--overwrite"):
        solve(overwrite=False)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        solve(overwrite=True)
    (out / "notes.txt").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(v4quant.calibration.collect, "exchange", _die)
        with pytest.raises(KeyboardInterrupt):
            solve(overwrite=True)
    assert folder_bytes(out) == earlier
    with monkeypatch.context() as patch:  # nothing is solved again
        patch.setattr("v4quant_calibration.solve.layer_solver.StageWriter", _die)
        solve(overwrite=True)
    made = folder_bytes(out)
    assert json.loads(made["solution.json"])["finished"] and "layers.0.attn.safetensors" not in made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["solved", "text.npy"]
    shutil.rmtree(out)
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="mine"):
        solve(overwrite=True)


def test_what_a_kill_between_the_last_two_steps_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file takes the place of another by a name of its own, which outlives a kill there."""
    path = tmp_path / "stats.v4q"
    _statistics(tmp_path, path, False)
    first = path.read_bytes()

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", kill)
        patched.setattr(Path, "unlink", kill)  # nothing cleans up after a kill
        with pytest.raises(Killed):
            write_file_atomically(path, first)
    (left,) = (p for p in tmp_path.iterdir() if p.name.endswith(".part"))
    assert left.read_bytes() == first
    theirs = [tmp_path / "stats.v4q.0123abcd.part", tmp_path / "other.v4q.01234567.part"]
    for place, data in zip(theirs, (b"not ours", first), strict=True):
        place.write_bytes(data)
    with pytest.raises(OutputError, match="exists already"):
        refuse_existing([statistics_file(path)], False)
    assert not left.exists() and all(place.exists() for place in theirs)
    assert path.read_bytes() == first
