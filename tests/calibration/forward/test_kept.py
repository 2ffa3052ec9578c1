"""Kept layers: a run killed in memory goes on with the same bits, and keeping is never a reason to
fail or to remove what others made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.calibration.forward.test_scratch import DyingProgress, some_corpus
from tests.support.conversion import TINY
from v4quant.calibration.collect import DrawnCorpus, calibrate_to
from v4quant.evaluation.evaluate import Resources, evaluate_checkpoint
from v4quant_calibration.evaluation.evaluate import Measures
from v4quant_calibration.forward import kept
from v4quant_calibration.forward.checkpoint_params import model_config
from v4quant_calibration.forward.kept import KeptStore, remove_kept
from v4quant_calibration.forward.stream import MemoryStore
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.streams import StreamShape
from v4quant_formats.opening import open_checkpoint

SHAPE = StreamShape((3, 70, 1), (4, 6), torch.float32, torch.device("cpu"), 4)


@pytest.fixture(autouse=True)
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made behind every layer, however little work it was."""
    monkeypatch.setattr(kept, "_WORK_PER_COPY", 0)


def evaluated(folder: Path | None, steps: int = 0) -> tuple[dict[str, Any], list[str]]:
    progress = DyingProgress(steps)
    with open_checkpoint(TINY) as mine, open_checkpoint(TINY) as reference:
        found = evaluate_checkpoint(
            mine, reference, some_corpus(), ForwardOptions(), progress, weights=False,
            measures=Measures(draft=True), resources=Resources(kept=folder),
        )  # fmt: skip
    return json.loads(json.dumps(found)), progress.labels


def calibrated(folder: Path, steps: int = 0) -> tuple[bytes, list[str]]:
    """Statistics of two rounds: the second is drawn for experts the first starves."""
    progress = DyingProgress(steps)
    windows = some_corpus().windows
    with open_checkpoint(TINY) as source:
        calibrate_to(
            source, model_config(source), DrawnCorpus(windows[:1], windows[1:]), ForwardOptions(),
            40, None, folder / "stats.v4q", progress,
        )  # fmt: skip
    return (folder / "stats.v4q").read_bytes(), progress.labels


@pytest.mark.parametrize(
    ("what", "steps"), [("evaluated", 7), ("calibrated", 5), ("calibrated", 9)]
)
def test_a_killed_run_goes_on_and_gives_the_same(what: str, steps: int, tmp_path: Path) -> None:
    run: Callable[..., Any] = globals()[what]
    (tmp_path / "whole").mkdir()
    whole, labels = run(tmp_path / "whole")
    assert not [label for label in labels if "from layer" in label]
    code = (
        "from pathlib import Path\n"
        "from tests.calibration.forward import test_kept\n"
        "test_kept.kept._WORK_PER_COPY = 0\n"
        f"test_kept.{what}(Path({str(tmp_path)!r}), {steps})\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert killed.returncode == -9
    left = list(tmp_path.glob("*.unfinished"))
    assert len(left) == 1
    found, labels = run(tmp_path)
    assert found == whole
    assert [label for label in labels if "from layer" in label], labels
    assert not list(tmp_path.glob("*.unfinished"))


def begun(folder: Path, key: str, layers: int, value: float) -> None:
    """What a killed process leaves: streams behind so many layers."""
    with KeptStore(MemoryStore(), folder, key) as store:
        store.keep(lambda: {"sum": torch.full((2,), value)})
        streams = store.open("0.0", SHAPE)
        tap = store.open("tap.0.1", SHAPE)
        for done in range(1, layers + 1):
            streams = store.behind(0, done, streams, keep=False)
            for rows in (streams, tap):
                rows.write(0, torch.full((74, 4, 6), value + done))
                rows.write_pre(0, torch.full((74, 4), value - done))
            store.notes["done"] = done
            store.commit(done)


def rows_of(store: KeptStore, name: str) -> Tensor:
    return store.open(name, SHAPE).read(0, 74)


def test_one_whole_copy_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    begun(folder, "ab", 3, 0.5)
    with KeptStore(MemoryStore(), folder, "ab") as store:
        assert (store.finished, store.notes) == (3, {"done": 3})
        assert torch.equal(store.keep(dict)["sum"], torch.full((2,), 0.5))
        for name in ("0.3", "tap.0.1"):
            assert rows_of(store, name).unique().tolist() == [3.5]
            assert store.open(name, SHAPE).shape == SHAPE
        store.forget()
    assert not folder.exists()


def test_what_is_not_whole_or_of_another_run_is_not_taken(tmp_path: Path) -> None:
    for number, damage in enumerate(("key", "size", "state", "tensors")):
        folder = tmp_path / str(number)
        begun(folder, "ab", 2, 0.0)
        if damage == "size":
            (folder / "2.0.rows").write_bytes(b"short")
        if damage == "state":
            (folder / "state.json").write_text('{"key": "ab", "finished": "2"}')
        if damage == "tensors":
            (folder / "2.tensors.safetensors").write_bytes(b"\xff" * 20)
        with KeptStore(MemoryStore(), folder, "cd" if damage == "key" else "ab") as store:
            assert store.finished == 0 and store.notes == {} and not store.keep(dict)


def test_a_copy_that_was_torn_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "kept"
    begun(folder, "ab", 2, 0.0)
    with KeptStore(MemoryStore(), folder, "ab") as store:
        streams = store.open("0.2", SHAPE)
        streams.write(0, torch.full((74, 4, 6), 9.0))
        monkeypatch.setattr(kept, "write_state", fail)
        store.commit(3)  # told as a warning
        store.commit(4)
    monkeypatch.undo()
    with KeptStore(MemoryStore(), folder, "ab") as store:
        assert store.finished == 2 and rows_of(store, "0.2").unique().tolist() == [2.0]


def test_a_second_process_keeps_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with KeptStore(MemoryStore(), folder, "ab"):
        begun(folder, "ab", 2, 0.0)
        assert {p.name for p in folder.iterdir()} == {"lock"}


def test_nothing_of_others_is_removed(tmp_path: Path) -> None:
    folder, other = tmp_path / "kept", tmp_path / "other"
    begun(folder, "ab", 1, 0.0)
    (folder / "thesis.txt").write_text("mine")
    (folder / "9.x").mkdir()
    mine = {"thesis.txt", "9.x", "my.rows", "3.my.rows", "my.tensors.safetensors", "state.json.bak"}
    for name in mine - {"9.x"}:
        (folder / name).write_text("mine")
    begun(folder, "ab", 3, 0.0)
    with KeptStore(MemoryStore(), folder, "ab") as store:
        store.forget()
    assert {p.name for p in folder.iterdir()} == mine
    other.symlink_to(folder)
    with KeptStore(MemoryStore(), other, "ab"):
        pass
    remove_kept(other)
    assert (folder / "thesis.txt").read_text() == "mine" and other.is_symlink()


def test_copies_cost_little_beside_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(kept.time, "monotonic", lambda: now)
    monkeypatch.setattr(kept, "_WORK_PER_COPY", 20)
    with KeptStore(MemoryStore(), tmp_path / "kept", "ab") as store:
        store.open("0.0", SHAPE)
        copied = []
        monkeypatch.setattr(store, "_copy_all", copied.append)
        store._copying = 3.0
        for done in range(1, 41):  # 5 s a layer
            now += 5.0
            store.commit(done)
            store._copying = 3.0
    assert copied == [12, 24, 36]
