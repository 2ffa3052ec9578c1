"""Streams in files: the same rows, the same numbers, and a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.conversion import TINY
from v4quant.evaluation.evaluate import Resources, evaluate_checkpoint
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.evaluation.evaluate import Measures
from v4quant_calibration.forward.scratch import PREFIX, FileStreams, Scratch
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.streams import StreamShape
from v4quant_formats.errors import OutputError
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

SHAPE = StreamShape((3, 70, 1), (4, 6), torch.float32, torch.device("cpu"))


class DyingProgress(SilentProgress):
    """Kills its own process after so many steps of the forward pass; counts steps and stretches."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seen = steps, 0
        self.labels: list[str] = []

    def start(self, label: str, total: int, unit: str) -> None:
        self.labels.append(label)

    def advance(self, amount: int) -> None:
        self.seen += 1
        if self.seen == self.steps:
            os.kill(os.getpid(), signal.SIGKILL)


def some_corpus() -> Corpus:
    ids = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    return Corpus([CorpusPart("a", list(ids[:96].split(48))), CorpusPart("b", [ids[96:161]])])


def run(candidate: Path, scratch: Path | None, steps: int = 0) -> tuple[dict[str, Any], list[str]]:
    progress = DyingProgress(steps)
    with open_checkpoint(candidate) as mine, open_checkpoint(TINY) as reference:
        found = evaluate_checkpoint(
            mine,
            reference,
            some_corpus(),
            ForwardOptions(),
            progress,
            weights=False,
            measures=Measures(draft=True),
            resources=Resources(scratch=scratch),
        )
    return json.loads(json.dumps(found)), progress.labels


def test_rows_come_back(tmp_path: Path, generator: torch.Generator) -> None:
    file = FileStreams(tmp_path / "rows", SHAPE)
    rows = torch.randn(74, 4, 6, generator=generator)
    for start, stop in ((50, 74), (0, 1), (1, 50)):
        file.write(start, rows[start:stop])
    assert torch.equal(file.read(0, 74), rows)
    assert [part.shape[0] for part in file] == [3, 70, 1]
    assert torch.equal(file[1], rows[3:73])
    file.close()
    assert (tmp_path / "rows").stat().st_size == SHAPE.nbytes == 74 * 4 * 6 * 4
    os.truncate(tmp_path / "rows", 100)
    shrunk = FileStreams(tmp_path / "rows", SHAPE)
    os.truncate(tmp_path / "rows", 100)
    with pytest.raises(OutputError, match="became shorter"):
        shrunk.read(0, 74)
    shrunk.close()


def test_a_scratch_folder_remembers_only_what_is_whole(tmp_path: Path) -> None:
    with Scratch(tmp_path, "ab" * 32) as scratch:
        assert (scratch.finished, scratch.notes) == (0, {})
        before = scratch.open("0.0", SHAPE)
        after = scratch.behind(0, 1, before, keep=False)
        assert after is not before
        assert scratch.behind(0, 2, after, keep=True) is before
        scratch.notes["x"] = 1.25
        scratch.commit(1)
        with pytest.raises(OutputError, match="another process"):
            Scratch(tmp_path, "ab" * 32)
    state = tmp_path / f"{PREFIX}{'ab' * 12}" / "state.json"
    with Scratch(tmp_path, "ab" * 32) as again:
        assert (again.finished, again.notes) == (1, {"x": 1.25})
    with Scratch(tmp_path, "ab" * 12 + "cd" * 20) as other:  # the same folder, another run
        assert other.finished == 0
    whole = state.read_bytes()
    edited = whole.replace(b"1.25", b"1.26")
    assert edited != whole
    for damaged in (b"", b"[]", b'{"key": 3}', whole[:-9], whole.replace(b"{", b"[", 2), edited):
        state.write_bytes(damaged)
        with Scratch(tmp_path, "ab" * 32) as lost:
            assert (lost.finished, lost.notes) == (0, {})
    state.write_bytes(whole)
    (state.parent / "0.1.rows").write_bytes(b"short")
    with Scratch(tmp_path, "ab" * 32) as lost:
        assert lost.finished == 0
        (state.parent / "my.rows").write_text("mine")
        lost.remove()
        assert [path.name for path in state.parent.iterdir()] == ["my.rows"]
        (state.parent / "my.rows").unlink()
        lost.remove()
    assert not state.parent.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        Scratch(tmp_path / "file", "ab" * 32)


# Four layers of three models, one of them also on the reference's input: four steps per layer.
@pytest.mark.parametrize(("steps", "finished"), [(2, 0), (6, 1), (13, 3)])
def test_a_killed_run_goes_on_and_gives_the_same(
    converted: Any, tmp_path: Path, steps: int, finished: int
) -> None:
    candidate = converted("int4-g32")
    whole, _ = run(candidate, None)
    code = (
        "import sys; from pathlib import Path; "
        "from tests.calibration.forward.test_scratch import run; "
        "run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(candidate), str(tmp_path), str(steps)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(PREFIX)
    found, labels = run(candidate, tmp_path)
    first = f"Forward pass from layer {finished}" if finished else "Forward pass"
    assert labels[0] == first
    assert found == whole
    assert list(tmp_path.iterdir()) == []
