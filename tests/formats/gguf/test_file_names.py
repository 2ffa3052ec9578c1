"""What GGUF files are called, whatever the source is called."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert, folder_bytes
from tests.support.rewritten_gguf import rewrite
from v4quant.conversion.job import run_job
from v4quant.conversion.output_folder import as_begun
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant_formats.errors import OutputError
from v4quant_formats.gguf.file_names import clean_name, file_stem, model_name
from v4quant_formats.gguf.quants import choose, variants
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.shard_files import Origin

GGUF = Recipe("mxfp4", format="gguf")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("DeepSeek-V4-Flash", "DeepSeek-V4-Flash"),
        ("DeepSeek V4 Flash", "DeepSeek-V4-Flash"),
        ("My-Tune-GGUF", "My-Tune"),
        ("My-Tune-imatrix-i1-GGUF", "My-Tune-i1"),
        ("My-Tune-BF16", "My-Tune"),
        ("My.Tune_v2.1-UD-Q4_K_XL", "My.Tune_v2.1"),
        ("a/b\\c:d*e?f", "a-b-c-d-e-f"),
        ("..hidden..", "hidden"),
        ("-rf", "rf"),
        ("modèle\x1b[31m", "modele-31m"),
        ("模型", "model"),
        ("", "model"),
        ("x" * 300, "x" * 120),
    ],
)
def test_clean_names(said: str, name: str) -> None:
    assert clean_name(said) == clean_name(name) == name


def test_whose_name_it_is(tmp_path: Path) -> None:
    """A repository's, a GGUF's own, a folder's; never what only says DeepSeek-V4."""
    with open_checkpoint(TINY) as checkpoint:
        assert file_stem(checkpoint, "iq2_xxs") == "tiny-a-IQ2_XXS"
        remote = replace(checkpoint, origin=Origin("maker/My-Tune", "0" * 40))
        assert model_name(remote) == "My-Tune"
    snapshot = tmp_path / "models--maker--Cached-Tune" / "snapshots" / ("0" * 40)
    shutil.copytree(TINY, snapshot)
    with open_checkpoint(snapshot) as checkpoint:
        assert model_name(checkpoint) == "Cached-Tune"
    convert(TINY, tmp_path / "out", replace(GGUF, draft="drop"))
    file = tmp_path / "out" / "tiny-a-MXFP4.gguf"
    with open_checkpoint(file) as checkpoint:
        assert model_name(checkpoint) == "tiny-a"
    named = rewrite(file, tmp_path / "x.gguf", keys={"general.name": "Other Tune"})
    with open_checkpoint(named) as checkpoint:
        assert model_name(checkpoint) == "Other-Tune"


@pytest.mark.parametrize("name", ["tiny-DSpark", "draft", "tiny-imatrix", "v4-Q8_0", "tiny-mtp-x"])
def test_what_is_written_is_chosen_again(name: str, tmp_path: Path) -> None:
    """Words that mean something in file names are part of models' names, too."""
    shutil.copytree(TINY, tmp_path / name)
    for scheme in ("mxfp4", "q8_0"):
        convert(tmp_path / name, tmp_path / scheme, Recipe(scheme, format="gguf"))
    names = sorted(p.name for f in ("mxfp4", "q8_0") for p in (tmp_path / f).glob("*.gguf"))
    assert len(names) == 4
    drafts = [v for v in variants(names, "here") if v.is_draft]
    assert sorted(v.stem[:4] for v in drafts) == ["mtp-", "mtp-"]
    chosen = choose(names, "MXFP4", "here")
    assert [n.startswith("mtp-") for n in chosen] == [False, True]
    assert all("MXFP4" in n for n in chosen)


def test_another_folder_has_the_same_bytes_and_a_job_keeps_its_name(tmp_path: Path) -> None:
    moved, out = tmp_path / "moved", tmp_path / "out"
    convert(TINY, tmp_path / "whole", GGUF)
    convert(TINY, out, GGUF)
    shutil.copytree(TINY, moved)
    convert(moved, tmp_path / "again", GGUF)
    whole, again = folder_bytes(tmp_path / "whole"), folder_bytes(tmp_path / "again")
    for name, data in whole.items():
        if name.endswith(".gguf"):
            assert again[name.replace("tiny-a", "moved")] == data
    with open_checkpoint(moved) as checkpoint:
        plan = as_begun(make_plan(checkpoint, GGUF), out)
        assert [s.file for s in plan.shards] == ["tiny-a-MXFP4.gguf", "mtp-tiny-a-MXFP4.gguf"]
        assert run_job(plan, out).first_file == "tiny-a-MXFP4.gguf"


@pytest.mark.parametrize("stem", ["tiny-a-MXFP4", "model-mxfp4", "../x", 7])
def test_the_name_a_journal_began_with(stem: str | int, tmp_path: Path) -> None:
    """Also of versions whose names did not carry the model; a hostile one is refused."""
    shutil.copytree(TINY, tmp_path / "moved")
    inside = tmp_path / "out" / ".v4quant"
    inside.mkdir(parents=True)
    with open_checkpoint(tmp_path / "moved") as checkpoint:
        plan = make_plan(checkpoint, GGUF)
        line = {"plan": plan.digest} | ({} if stem == "model-mxfp4" else {"stem": stem})
        (inside / "journal-0.jsonl").write_text(json.dumps(line) + "\n")
        if stem not in ("tiny-a-MXFP4", "model-mxfp4"):
            with pytest.raises(OutputError, match="damaged"):
                as_begun(plan, tmp_path / "out")
            return
        run_job(as_begun(plan, tmp_path / "out"), tmp_path / "out")
    made = {p.name for p in (tmp_path / "out").glob("*.gguf")}
    assert made == {f"mtp-{stem}.gguf", f"{stem}.gguf"}
