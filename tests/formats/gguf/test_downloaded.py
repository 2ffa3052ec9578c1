"""GGUF files as they are downloaded: alone, written by other tools, of types not read here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from tokenizers import Tokenizer

from tests.support.conversion import convert
from tests.support.rewritten_gguf import rewrite
from v4quant.builtin import resolve_source
from v4quant.checks.soundness import require_sound
from v4quant.checks.verify import verify
from v4quant.recipe import Recipe
from v4quant_calibration.corpus.tokenizer import tokenizer_of
from v4quant_formats.errors import UnknownTokenizer, WrongDtype
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight
from v4quant_formats.structure import find_defects
from v4quant_kernels.progress import SilentProgress

TEXT = "The house was quiet; 12345 letters came in “the” morning.\n\tif x[0] == 'é': 中文<think>"


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model in GGUF, moved to a folder of its own without draft stage."""
    folder = tmp_path_factory.mktemp("lone")
    source = resolve_source("builtin:tiny-v4")
    convert(source, folder / "out", Recipe("mxfp4", format="gguf", draft="drop"))
    (folder / "alone").mkdir()
    (folder / "out" / "tiny-v4-MXFP4.gguf").rename(folder / "alone" / "model.gguf")
    return folder / "alone" / "model.gguf"


def pairs(path: Path, *starts: str) -> dict[str, object]:
    reader = GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items() if k.startswith(starts)}


def test_the_tokenizer_of_a_lone_file_is_the_releases(lone: Path) -> None:
    release = resolve_source("builtin:tiny-v4")
    wanted = Tokenizer.from_file(str(release / "tokenizer.json"))
    with open_checkpoint(lone) as opened:
        ids = tokenizer_of(opened)(TEXT).tolist()
        assert ids == wanted.encode(TEXT, add_special_tokens=False).ids
        made = {name: make() for name, make in opened.carried.items()}
    own = json.loads((release / "tokenizer.json").read_text())
    assert json.loads(made["tokenizer.json"])["added_tokens"] == own["added_tokens"]
    settings = json.loads(made["tokenizer_config.json"])
    theirs = json.loads((release / "tokenizer_config.json").read_text())
    for key in ("bos_token", "eos_token", "add_bos_token"):
        assert settings[key] == theirs[key]


def test_everything_travels_from_gguf_to_gguf(lone: Path, tmp_path: Path) -> None:
    source = rewrite(lone, tmp_path / "named.gguf", keys={"general.sampling.top_k": 20})
    convert(source, tmp_path / "out", Recipe("q8_0", format="gguf"))
    out = tmp_path / "out" / "named-Q8_0.gguf"
    own = ("general.file_type",)
    wanted = {k: v for k, v in pairs(source, "tokenizer.", "general.").items() if k not in own}
    got = pairs(out, "tokenizer.", "general.")
    assert {k: got[k] for k in wanted} == wanted
    assert not verify(tmp_path / "out", source, SilentProgress()).findings


def test_files_are_made_for_safetensors(lone: Path, tmp_path: Path) -> None:
    convert(lone, tmp_path / "out", "mxfp4")
    assert not verify(tmp_path / "out", lone, SilentProgress()).findings
    wanted = Tokenizer.from_file(str(resolve_source("builtin:tiny-v4") / "tokenizer.json"))
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert found.encode(TEXT).ids == wanted.encode(TEXT).ids
    assert (tmp_path / "out" / "chat_template.jinja").read_text()


def test_a_tokenizer_that_cannot_travel_is_told_first(lone: Path, tmp_path: Path) -> None:
    source = rewrite(lone, tmp_path / "a.gguf", without=("tokenizer.ggml.pre",))
    with pytest.raises(UnknownTokenizer, match=r"tokenizer\.json beside the file"):
        convert(source, tmp_path / "out", "mxfp4")
    assert not any(p.suffix == ".safetensors" for p in (tmp_path / "out").glob("*"))
    release = resolve_source("builtin:tiny-v4")
    (tmp_path / "tokenizer.json").write_bytes((release / "tokenizer.json").read_bytes())


@pytest.mark.parametrize(("blocks", "drafts"), [(7, 1), (6, 1), (6, 2)])
def test_tensors_decide_how_many_layers_there_are(
    blocks: int, drafts: int, lone: Path, tmp_path: Path
) -> None:
    """A count of drafts that are not there must not turn the last layer into one."""
    keys = {"deepseek4.block_count": blocks, "deepseek4.nextn_predict_layers": drafts}
    with open_checkpoint(rewrite(lone, tmp_path / "a.gguf", keys=keys)) as opened:
        require_sound(opened)
        assert opened.config["num_hidden_layers"] == 6
        assert not any(n.startswith("mtp.") for n in opened.tensors)


@pytest.mark.parametrize(("alignment", "types"), [(8, "q8 dense"), (64, "plain")])
def test_other_writers(alignment: int, types: str, lone: Path, tmp_path: Path) -> None:
    def chosen(name: str) -> Type | None:
        if types == "plain":
            return Type.F16 if "_exps" in name else Type.F32 if "attn_q" in name else None
        return (
            Type.Q8_0 if name.endswith(("attn_q_a.weight", "shexp.weight", "embd.weight")) else None
        )

    source = rewrite(lone, tmp_path / "a.gguf", chosen, alignment=alignment)
    out = tmp_path / "out"
    convert(source, out, Recipe("int8-g32") if alignment == 8 else Recipe("mxfp4", format="gguf"))
    assert not verify(out, source, SilentProgress()).findings
    with open_checkpoint(out) as opened:
        assert find_defects(opened).defects == ()


def test_a_type_not_read_here_is_not_called_damaged(lone: Path, tmp_path: Path) -> None:
    source = rewrite(lone, tmp_path / "a.gguf", lambda n: Type.TQ1_0 if "_exps" in n else None)
    with open_checkpoint(source) as opened:
        with pytest.raises(WrongDtype, match=r"TQ1_0, which is not readable here"):
            require_sound(opened)
        found = preflight(opened, "llama.cpp")
    assert found.loads and not any("damaged" in f.remedy for f in found.findings)
    assert any("not readable here" in f.problem for f in found.findings)
