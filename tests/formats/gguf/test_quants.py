"""Several quants side by side: a name chooses one, with its draft, or what is there is told."""

from __future__ import annotations

import random
import secrets
from pathlib import Path

import pytest

import v4quant
from tests.support.conversion import TINY, convert
from tests.support.gguf_bytes import gguf_bytes, string
from v4quant.recipe import Recipe
from v4quant_formats.errors import FormatError, MissingShard, NotGguf
from v4quant_formats.gguf.quants import choose, split_quant
from v4quant_formats.opening import open_checkpoint

FLAT = ["V4-Q4_K_M.gguf", "V4-Q4_K_S.gguf", "V4-IQ2_XXS.gguf", "V4-Q8_0.gguf", "V4-BF16.gguf"]
BESIDE = ["mmproj-F16.gguf", "imatrix.gguf", "V4.imatrix.gguf", "README.md"]
PARTS = [f"UD-Q4_K_XL/V4-UD-Q4_K_XL-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("quant", "chosen"),
    [
        ("Q4_K_M", ["V4-Q4_K_M.gguf"]),
        ("iq2_xxs", ["V4-IQ2_XXS.gguf"]),
        ("IQ2", ["V4-IQ2_XXS.gguf"]),
        ("bf16", ["V4-BF16.gguf"]),
        ("V4-Q8_0", ["V4-Q8_0.gguf"]),
        ("V4-Q8_0.gguf", ["V4-Q8_0.gguf"]),
        ("UD-Q4_K_XL", PARTS),
        ("Q4_K_XL", PARTS),
    ],
)
def test_a_name_chooses(quant: str, chosen: list[str]) -> None:
    names = [*FLAT, *BESIDE, *PARTS]
    random.Random(seed := secrets.randbits(32)).shuffle(names)
    assert choose(names, quant, "here") == chosen, seed


def test_a_folder_chooses() -> None:
    names = ["a/model.gguf", "b/model.gguf", "deep/c/model.gguf"]
    assert choose(names, "b", "here") == ["b/model.gguf"]
    assert choose(names, "deep/c", "here") == choose(names, "c", "here") == ["deep/c/model.gguf"]
    with pytest.raises(FormatError, match=r"choose one: :a, :b, :deep/c"):
        choose(names, "", "here")


@pytest.mark.parametrize(
    ("quant", "told"),
    [
        ("", r"holds several quants; choose one: :BF16, :IQ2_XXS, :Q4_K_M, :Q4_K_S, :Q8_0"),
        ("Q4_K", r"'Q4_K' means several of its quants; choose one: :Q4_K_M, :Q4_K_S$"),
        ("Q5_K_M", r"'Q5_K_M' is none of its quants; choose one: :BF16, "),
        ("Q", r"'Q' is none of its quants"),
        ("imatrix", r"'imatrix' is none of its quants"),
    ],
)
def test_what_is_there_is_told(quant: str, told: str) -> None:
    with pytest.raises(FormatError, match=told):
        choose([*FLAT, *BESIDE], quant, "here")


def test_one_model_needs_no_name() -> None:
    assert choose(["V4-Q4_K_M.gguf", *BESIDE], "", "here") == ["V4-Q4_K_M.gguf"]
    with pytest.raises(FormatError, match=r"has no \.gguf files"):
        choose(["README.md"], "Q8_0", "here")


def test_parts_of_the_chosen_one_must_be_there() -> None:
    names = [*FLAT, *PARTS[:2]]
    assert choose(names, "Q8_0", "here") == ["V4-Q8_0.gguf"]
    with pytest.raises(MissingShard, match="00003-of-00003"):
        choose(names, "UD-Q4_K_XL", "here")


def test_draft_stages_go_with_their_quant() -> None:
    own = ["model-q4_k.gguf", "mtp-model-q4_k.gguf", "model-q8_0.gguf", "mtp-model-q8_0.gguf"]
    assert choose(own, "q8_0", "here") == ["model-q8_0.gguf", "mtp-model-q8_0.gguf"]
    shared = [*own[::2], "V4-draft-BF16.gguf"]
    assert choose(shared, "q4_k", "here") == ["model-q4_k.gguf", "V4-draft-BF16.gguf"]
    folders = ["q4/m.gguf", "q4/dspark-m.gguf", "q8/m.gguf", "q8/dspark-m.gguf"]
    assert choose(folders, "q4", "here") == folders[:2]
    two = [*own[::2], "draft-BF16.gguf", "draft-F16.gguf"]
    with pytest.raises(FormatError, match=r"several files of draft stages.*model-q4_k\.gguf"):
        choose(two, "q4_k", "here")
    assert choose(two, "model-q4_k.gguf", "here") == ["model-q4_k.gguf"]


@pytest.fixture(scope="module")
def quants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two quants, each with its draft stage, and a third one in a folder."""
    folder = tmp_path_factory.mktemp("quants")
    for scheme in ("q8_0", "mxfp4"):
        convert(TINY, folder / "work", Recipe(scheme, format="gguf"))
        for file in (folder / "work").glob("*.gguf"):
            file.rename(folder / file.name)
        for file in (folder / "work").rglob("*"):
            if file.is_file():
                file.unlink()
    (folder / "small").mkdir()
    convert(TINY, folder / "small" / "work", Recipe("iq4_nl", format="gguf", draft="drop"))
    (folder / "small" / "work" / "tiny-a-IQ4_NL.gguf").rename(folder / "small" / "model.gguf")
    return folder


def test_local_folders(quants: Path) -> None:
    assert split_quant(Path(f"{quants}:mxfp4")) == (quants, "mxfp4")
    for word, dtype in (("mxfp4", "MXFP4"), ("Q8", "Q8_0")):
        with open_checkpoint(f"{quants}:{word}") as opened:
            assert opened.tensors["layers.3.ffn.experts.0.w1.weight"].dtype == dtype
            assert "mtp.0.ffn.experts.0.w1.weight" in opened.tensors
            assert len(opened.files) == 2
    with open_checkpoint(f"{quants}:small") as opened:
        assert opened.tensors["layers.3.ffn.experts.0.w1.weight"].dtype == "IQ4_NL"
        assert opened.path == quants / "small"
    with pytest.raises(FormatError, match=r"choose one: :MXFP4, :Q8_0"):
        open_checkpoint(quants)
    with pytest.raises(FormatError, match=r"'q2_k' is none.*:MXFP4, :Q8_0, :small"):
        open_checkpoint(f"{quants}:q2_k")
    with pytest.raises(FormatError, match="no such folder"):
        open_checkpoint(f"{quants}x:q2_k")
    with open_checkpoint(f"{quants}:tiny-a-Q8_0.gguf") as opened:
        assert not any(name.startswith("mtp.") for name in opened.tensors)


def test_commands_take_a_folder_near_by(quants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name of two parts, which could also be a repository's."""
    monkeypatch.chdir(quants.parent.parent)
    near = quants.relative_to(quants.parent.parent)
    for word in ("mxfp4", "Q8_0", "small"):
        assert not v4quant.inspect(f"{near}:{word}").defects


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("m.Q4_K_M.gguf.part1of2", "m.Q4_K_M.gguf.part2of2"), r"part1of2 is a piece .*join"),
        (("m.gguf-split-a", "m.gguf-split-b"), "split-a is a piece"),
        (("m.gguf.crdownload",), "is not whole yet"),
        (("m.gguf.0a1b2c3d.part",), "is not whole yet"),
        (("M.GGUF",), r"must end in \.gguf, in small letters"),
        (("m-1-of-2.gguf", "m-2-of-2.gguf"), r"m-1-of-2\.gguf looks like one of several parts"),
        (("m.00001of00002.gguf", "m.00002of00002.gguf"), "looks like one of several parts"),
    ],
)
def test_what_is_nearly_a_model_is_told(names: tuple[str, ...], text: str, tmp_path: Path) -> None:
    for name in names:
        pairs = [("general.architecture", string("deepseek4"))]
        (tmp_path / name).write_bytes(gguf_bytes(pairs=pairs))
    with pytest.raises(FormatError, match=text):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"tjgg" + bytes(60), "before GGUF"),
        (b"", "begins with b''"),
    ],
)
def test_what_is_no_model_is_told(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(NotGguf, match=text):
        open_checkpoint(tmp_path)
