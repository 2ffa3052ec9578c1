"""Outputs never replace what is being read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

import v4quant
from tests.support.conversion import TINY, folder_bytes
from v4quant.outputs import refuse_inputs
from v4quant_calibration.solve.solution import SolutionError
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


def test_nothing_new_becomes_part_of_a_source(source: Path, tmp_path: Path) -> None:
    """Through links, `..` and names: no shard beside its shards, no folder within its folder."""
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    ways = [source, tmp_path / "link", tmp_path / "nowhere" / ".." / "source"]
    with open_checkpoint(source) as checkpoint:
        for way in ways:
            for name in ("new.safetensors", "NEW.GGUF", "Tokenizer.json"):
                with pytest.raises(OutputError, match="become part"):
                    refuse_inputs([way / name], [checkpoint])
            for folder in (way, way / "out", way / "deep" / "er"):
                with pytest.raises(OutputError, match="stays as it is"):
                    refuse_inputs((), [checkpoint], (), [folder])
        beside = [tmp_path, tmp_path / "source-2", source / ".." / "out"]
        refuse_inputs((), [checkpoint], (), beside)
    before = folder_bytes(source)
    inside = source / "out"
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    made: list[Callable[[], object]] = [
        lambda: v4quant.quantize(source, inside, scheme="mxfp4"),
        lambda: v4quant.calibrate(source, inside, corpus=text, solve="int4-g64"),
        lambda: v4quant.export_onnx(source, inside, scheme="int4-g32"),
    ]
    (tmp_path / "run.toml").write_text(f'source = "{source}"\n[quantize]\nscheme = "mxfp4"\n')
    made.append(lambda: v4quant.run(str(tmp_path / "run.toml"), out=inside))
    for make in made:
        with pytest.raises(OutputError, match="stays as it is"):
            make()
    assert folder_bytes(source) == before and not inside.exists()
    # A lone file's folder holds anything.
    (tmp_path / "models").mkdir()
    with open_checkpoint(source) as checkpoint:
        lone = replace(checkpoint, path=tmp_path / "models")
        refuse_inputs([tmp_path / "models" / "r.html"], [lone], (), [tmp_path / "models" / "out"])


def test_results_without_a_name_of_their_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.`, `..` and what ends in them are folders by other words; `/` is nobody's name."""
    made = tmp_path / "made"
    v4quant.quantize(source, made, scheme="mxfp4", workers=1)
    (tmp_path / "x").mkdir()
    ways = ("x/../made", "made/sub/..", "made/../made", "made/.")
    for number, spelled in enumerate(ways):
        (made / "sub").mkdir()
        scheme = ("int8-g32", "mxfp4")[number % 2]
        v4quant.quantize(source, f"{tmp_path}/{spelled}", scheme=scheme, overwrite=True, workers=1)
        assert {p.name for p in tmp_path.iterdir()} == {"made", "source", "x"}
    text = {"corpus": tmp_path / "ids.npy"}
    numpy.save(tmp_path / "ids.npy", numpy.arange(64) % 100)
    before = folder_bytes(tmp_path)
    monkeypatch.chdir(made)
    for spelled, overwrite in ((".", True), ("..", True), (".", False), ("/", False), ("/", True)):
        for make in (
            lambda out, **named: v4quant.quantize(source, out, scheme="fp8", **named),
            lambda out, **named: v4quant.export_onnx(source, out, scheme="mxfp4", **named),
            lambda out, **named: v4quant.calibrate(source, out, solve="int4-g32", **text, **named),
            lambda out, **named: v4quant.calibrate(source, out, **text, **named),
            lambda out, **named: v4quant.evaluate(source, report=out, **text, **named),
            lambda out, **named: v4quant.evaluate(source, save_logits=out, **text, **named),
            lambda out, **named: v4quant.allocate(source, out, budget="1GB", **named),
            lambda out, **named: v4quant.plan(source, cards="2x24GB", write=out, **named),
        ):
            with pytest.raises((OutputError, SolutionError)):
                make(spelled, overwrite=overwrite)
    assert folder_bytes(tmp_path) == before


def test_two_calibrations_to_one_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.v4q"
    text = tmp_path / "ids.npy"
    numpy.save(text, numpy.arange(200) % 100)
    with (
        locked_folder(tmp_path, "", "stats.v4q.v4quant-lock", stays=False),
        pytest.raises(OutputError, match="is calibrating to it"),
    ):
        v4quant.calibrate(source, out, corpus=text, min_tokens=1)
    assert not (tmp_path / "stats.v4q.v4quant-lock").exists()
    (tmp_path / "stats.v4q.lock").touch()  # another program's, which is empty while it is held
    v4quant.calibrate(source, out, corpus=text, min_tokens=1)
    assert {p.name for p in tmp_path.glob("stats*")} == {"stats.v4q", "stats.v4q.lock"}
