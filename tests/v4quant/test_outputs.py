"""Outputs never replace what is being read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest

import v4quant
from tests.support.conversion import TINY, folder_bytes
from v4quant.outputs import refuse_inputs
from v4quant_formats.errors import OutputError
from v4quant_formats.folder_lock import locked_folder
from v4quant_formats.opening import open_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "source")
    return tmp_path / "source"


def test_every_name_of_an_input_is_refused(source: Path, tmp_path: Path) -> None:
    shard = min(source.glob("*.safetensors"))
    (tmp_path / "hard").hardlink_to(shard)
    (tmp_path / "soft").symlink_to(shard)
    (tmp_path / "corpus.txt").write_text("text")
    with open_checkpoint(source) as checkpoint:
        wrong = [shard, source / ".." / "source" / shard.name, tmp_path / "hard", tmp_path / "soft"]
        for out in [*wrong, source / "config.json", tmp_path / "corpus.txt"]:
            with pytest.raises(OutputError, match="which is read"):
                refuse_inputs([None, out], [None, checkpoint], [tmp_path / "corpus.txt", None])
        refuse_inputs([source / "stats.v4q", tmp_path / "new", None], [checkpoint], [None])


def test_every_command_asks(source: Path, tmp_path: Path) -> None:
    before = folder_bytes(source)
    shard = min(source.glob("*.safetensors"))
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    with pytest.raises(OutputError, match="which is read"):
        v4quant.calibrate(source, shard, corpus=text)
    for option in ("save_logits", "report"):
        with pytest.raises(OutputError, match="which is read"):
            v4quant.evaluate(source, corpus=text, **{option: shard})  # type: ignore[arg-type]
        with pytest.raises(OutputError, match="which is read"):
            v4quant.evaluate(source, corpus=text, **{option: text})  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="which is read"):
        v4quant.allocate(source, shard, budget=10**9)
    assert folder_bytes(source) == before


def test_two_calibrations_to_one_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.v4q"
    text = tmp_path / "ids.npy"
    numpy.save(text, numpy.arange(200) % 100)
    with (
        locked_folder(tmp_path, "", "stats.v4q.lock", stays=False),
        pytest.raises(OutputError, match="is calibrating to it"),
    ):
        v4quant.calibrate(source, out, corpus=text, min_tokens=1)
    assert not (tmp_path / "stats.v4q.lock").exists()
