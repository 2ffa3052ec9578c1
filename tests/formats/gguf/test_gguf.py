"""GGUF files: read by the gguf package, equal to the source where that is claimed, read back."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from tests.calibration.oracle_loader import OracleParams
from tests.support.conversion import TINY, convert, folder_bytes
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor
from tests.support.synthetic import RELEASES, make_small
from v4quant.builtin import resolve_source
from v4quant.checks.inspection import inspect_checkpoint
from v4quant.checks.verify import verify
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe, RecipeError
from v4quant.sizes import SizeError
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.errors import UnknownTokenizer, UnsupportedPair
from v4quant_formats.layouts.gguf import GGUF
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense
from v4quant_formats.weights import find_weight
from v4quant_kernels.progress import SilentProgress

Convert = Callable[..., Path]
SPEAKING = Path(resolve_source("builtin:tiny-v4"))  # has a tokenizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Folder of a conversion of the tiny model; made once, not to be changed."""
    made: dict[str, Path] = {}

    def get(scheme: str, source: Path = TINY, **recipe: str) -> Path:
        key = f"{source}{scheme}{recipe}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gguf") / "out"
            convert(source, made[key], Recipe(scheme, "gguf", **recipe))
        return made[key]

    return get


def read(folder: Path, pattern: str = "*.gguf") -> gguf.GGUFReader:
    (path,) = folder.glob(pattern)
    return gguf.GGUFReader(path)


def values(tensor: Any) -> np.ndarray[Any, Any]:
    """A tensor's numbers as the gguf package decodes them, rows first."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if tensor.tensor_type in (gguf.GGMLQuantizationType.I32, gguf.GGMLQuantizationType.F32):
        return tensor.data.reshape(shape)
    return dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    assert found is not None, key
    return found.contents()


# llama.cpp's name -> official names, spelled out once more, independent of the table under test.
ATTENTION = {
    "attn_q_a": "wq_a", "attn_q_b": "wq_b", "attn_kv": "wkv", "attn_output_a": "wo_a",
    "attn_output_b": "wo_b", "attn_q_a_norm": "q_norm", "attn_kv_a_norm": "kv_norm",
    "attn_sinks": "attn_sink", "attn_compressor_ape": "compressor.ape",
    "attn_compressor_kv": "compressor.wkv", "attn_compressor_gate": "compressor.wgate",
    "attn_compressor_norm": "compressor.norm", "indexer.attn_q_b": "indexer.wq_b",
    "indexer.proj": "indexer.weights_proj", "indexer_compressor_ape": "indexer.compressor.ape",
    "indexer_compressor_kv": "indexer.compressor.wkv",
    "indexer_compressor_gate": "indexer.compressor.wgate",
    "indexer_compressor_norm": "indexer.compressor.norm",
}  # fmt: skip
OTHERS = {
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "ffn_gate_inp": "ffn.gate",
    "ffn_gate_tid2eid": "ffn.gate.tid2eid", "ffn_gate_shexp": "ffn.shared_experts.w1",
    "ffn_up_shexp": "ffn.shared_experts.w3", "ffn_down_shexp": "ffn.shared_experts.w2",
}  # fmt: skip
EXPERTS = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
TOP = {"token_embd": "embed", "output": "head", "output_norm": "norm"}


def expected(name: str, stage: Callable[[int], str], oracle: OracleParams) -> torch.Tensor:
    """What the source holds for a tensor of llama.cpp's."""
    stem, _, suffix = name.rpartition(".")
    assert suffix == ("bias" if "exp_probs" in name else "weight")
    if not stem.startswith("blk."):
        return oracle(TOP.get(stem, stem.replace("output_hc", "hc_head")))
    _, block, below = stem.split(".", 2)
    base = stage(int(block))
    if below in EXPERTS:
        experts = [f"{base}.ffn.experts.{e}.{EXPERTS[below]}" for e in range(4)]
        return torch.stack([oracle(m) for m in experts])
    if below in ATTENTION:
        return oracle(f"{base}.attn.{ATTENTION[below]}")
    if below == "exp_probs_b":
        return oracle(f"{base}.ffn.gate.bias")
    return oracle(f"{base}.{OTHERS.get(below, below)}")


def test_every_tensor_holds_exactly_the_source(converted: Convert) -> None:
    reader, oracle = read(converted("mxfp4"), "tiny-*.gguf"), OracleParams(TINY)
    for tensor in reader.tensors:
        wanted = expected(tensor.name, lambda n: f"layers.{n}", oracle).numpy()
        assert np.array_equal(values(tensor), wanted), tensor.name
        if tensor.name.endswith(("_exps.weight",)):
            assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
    names = {t.name for t in reader.tensors}
    trunk = [n for n in oracle.tensors if not n.startswith("mtp.") and not n.endswith(".scale")]
    experts = [n for n in trunk if ".experts." in n]
    assert len(names) == len(trunk) - len(experts) + len(experts) // 4
    assert {"blk.0.ffn_gate_tid2eid.weight", "blk.3.exp_probs_b.bias"} <= names


def test_the_draft_stage_is_a_file_of_its_own(converted: Convert) -> None:
    """With the stage's hc_head and final norm, e_proj and h_proj side by side, and copies."""
    reader, oracle = read(converted("mxfp4"), "mtp-*.gguf"), OracleParams(TINY)
    nextn = {"nextn.enorm": "enorm", "nextn.hnorm": "hnorm", "nextn.shared_head_norm": "norm"}
    for tensor in reader.tensors:
        below = tensor.name.removeprefix("blk.4.").removesuffix(".weight")
        if below == "nextn.eh_proj":
            wanted = torch.cat([oracle("mtp.0.e_proj"), oracle("mtp.0.h_proj")], 1)
        elif below in nextn:
            wanted = oracle(f"mtp.0.{nextn[below]}")
        elif below.startswith("output_hc_"):
            wanted = oracle(f"mtp.0.{below.replace('output_hc', 'hc_head')}")
        else:
            wanted = expected(tensor.name, lambda n: f"mtp.{n - 4}", oracle)
        assert np.array_equal(values(tensor), wanted.numpy()), tensor.name
    assert field(reader, "deepseek4.block_count") == 5
    assert field(reader, "deepseek4.nextn_predict_layers") == 1
    main = read(converted("mxfp4"), "tiny-*.gguf")
    assert field(main, "deepseek4.block_count") == 4
    assert main.get_field("deepseek4.nextn_predict_layers") is None


def test_metadata_says_what_the_config_says(converted: Convert) -> None:
    folder = converted("mxfp4")
    reader = read(folder, "tiny-*.gguf")
    said = {key: field(reader, key) for key in reader.fields if not key.startswith("GGUF.")}
    assert said["general.architecture"] == "deepseek4"
    assert said["deepseek4.expert_gating_func"] == 4
    assert said["deepseek4.attention.compress_ratios"] == [0, 4, 128, 4, 0]
    assert said["deepseek4.swiglu_clamp_exp"] == [10.0] * 4
    assert said["deepseek4.attention.head_count_kv"] == 1
    assert said["deepseek4.hyper_connection.count"] == 4
    assert said["deepseek4.expert_weights_norm"] is True
    assert said["tokenizer.ggml.model"] == "none", "a folder without tokenizer.json"
    with open_checkpoint(TINY) as source, open_checkpoint(folder) as output:
        wanted = parse_model_config(dict(source.config))
        assert parse_model_config(dict(output.config)) == wanted
        assert output.config["n_shared_experts"] == source.config["n_shared_experts"]


def test_tokenizer(converted: Convert) -> None:
    reader = read(converted("mxfp4", SPEAKING), "tiny-*.gguf")
    tokens = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    from tokenizers import Tokenizer

    ours = Tokenizer.from_file(str(SPEAKING / "tokenizer.json"))
    assert tokens == [ours.id_to_token(i) for i in range(ours.get_vocab_size())]
    assert field(reader, "tokenizer.ggml.pre") == "deepseek-v3"
    assert kinds[tokens.index("<｜User｜>")] == gguf.TokenType.CONTROL
    assert kinds[tokens.index("a")] == gguf.TokenType.NORMAL
    assert (field(reader, "tokenizer.ggml.bos_token_id"), tokens[0][:5]) == (0, "<｜beg")
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "general.sampling.temp") == field(reader, "general.sampling.top_p") == 1
    merges = field(reader, "tokenizer.ggml.merges")
    assert len(merges) == 1785 and all(len(m.split(" ")) == 2 for m in merges)
    assert "messages" in field(reader, "tokenizer.chat_template")


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (r'"Regex": "\\p{N}{1,3}"', r'"Regex": "\\p{N}{1,2}"', "none of llama.cpp's"),
        ('"type": "BPE"', '"type": "WordPiece"', "not byte-level BPE"),
        ('"id": 0,', '"id": 4096,', "beyond config.json's vocab_size 2048"),
    ],
)
def test_tokenizers_llama_cpp_cannot_carry_out_are_refused(
    before: str, after: str, why: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(SPEAKING, source)
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    assert before in text
    (source / "tokenizer.json").write_text(text.replace(before, after, 1), encoding="utf-8")
    with open_checkpoint(source) as checkpoint:
        with pytest.raises(UnknownTokenizer, match=why):
            make_plan(checkpoint, Recipe("mxfp4", "gguf"))
        make_plan(checkpoint, Recipe("mxfp4", "deepseek"))


@pytest.mark.parametrize(
    ("scheme", "source"),
    [*((s, TINY) for s in GGUF.schemes), ("mxfp4", SPEAKING), ("q3_k", SPEAKING)],
)
def test_what_is_written_is_read_back_and_verified(
    scheme: str, source: Path, converted: Convert
) -> None:
    """K-types cannot hold rows of 128, which take llama.cpp's substitutes."""
    folder = converted(scheme, source)
    result = verify(folder, source, SilentProgress())
    assert result.findings == ()
    with open_checkpoint(source) as original, open_checkpoint(folder) as output:
        found = inspect_checkpoint(output, SilentProgress(), deep=True)
        assert found.defects == []
        module = "layers.3.ffn.experts.2.w2"
        stored = find_weight(output, module)
        assert stored.scheme is not None
        wanted = SUBSTITUTES.get(scheme, scheme) if source == TINY else scheme
        assert stored.scheme.name == wanted
        error = (read_dense(output, module) - read_dense(original, module)).norm()
        relative = float(error / read_dense(original, module).norm())
        worst = {"mxfp4": 0, "q8_0": 0.01, "q6_k": 0.03, "q5_k": 0.06, "q4_k": 0.1, "q3_k": 0.22}
        assert relative <= worst.get(scheme, 0.45)
    modules = {r.module for r in _records(folder)}
    assert result.compared == len(modules)
    # FP4 values also fit some of the other types exactly, which the records say where they do.
    assert result.exact == sum(r.exact for r in _records(folder))
    if scheme == "mxfp4":
        assert result.exact == result.compared


def _records(folder: Path) -> list[Any]:
    from v4quant.conversion.records import record_from_dict
    from v4quant_formats.manifest import read_manifest

    return [record_from_dict(row) for row in read_manifest(folder)["tensors"]]


# Rows of 128, which the query's second matrix has, cannot be K-types.
SUBSTITUTES = {
    "q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "q4_0", "q2_k": "q4_0",
    **dict.fromkeys(
        ("iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"), "iq4_nl"
    ),
}  # fmt: skip


@pytest.mark.parametrize("dense", GGUF.dense_types)
def test_dense_matrices_in_block_types_as_planned(dense: str) -> None:
    with open_checkpoint(SPEAKING) as source:
        plan = make_plan(source, Recipe("mxfp4", "gguf", dense=dense))
    kinds = {s.name: s.dtype for shard in plan.shards for s in shard.outputs}
    assert kinds["layers.3.attn.wkv.weight"] == kinds["mtp.0.h_proj.weight"] == dense.upper()
    assert kinds["layers.3.attn.wq_b.weight"] == SUBSTITUTES.get(dense, dense).upper()
    assert kinds["embed.weight"] == kinds["layers.2.attn.compressor.wkv.weight"] == "BF16"
    assert kinds["layers.3.ffn.gate.weight"] == kinds["layers.3.attn_norm.weight"] == "F32"


def test_dense_matrices_in_block_types(converted: Convert) -> None:
    folder = converted("mxfp4", dense="q8_0")
    assert verify(folder, TINY, SilentProgress()).findings == ()
    main, draft = (read(folder, f"{name}-*.gguf").tensors for name in ("tiny", "mtp"))
    kinds = {t.name: t.tensor_type.name for t in [*main, *draft]}
    assert kinds["blk.3.attn_kv.weight"] == kinds["blk.4.nextn.eh_proj.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == "BF16"


def test_choices_that_make_no_sense() -> None:
    for wrong in ({"dense": "q9"}, {"split_size": "10"}, {"split_size": "many"}):
        told = r"'q9'|is below|is not a size|has no unit"
        with pytest.raises((RecipeError, SizeError), match=told):
            Recipe("mxfp4", "gguf", **wrong)
    with pytest.raises(UnsupportedPair, match=r"cannot be written for vllm: GGUF files are"):
        Recipe("q4_k", engine="vllm")
    with pytest.raises(RecipeError, match="dense = 'q8_0' in deepseek has no effect"):
        Recipe("mxfp4", "deepseek", dense="q8_0")
    with pytest.raises(RecipeError, match="split_size has no effect in compressed-tensors"):
        Recipe("int4-g32", split_size="1GB")


def test_importance_weighs_the_error(tmp_path: Path, generator: torch.Generator) -> None:
    """With statistics the error falls where it matters."""

    class Uneven(Stats):
        """Every expert's first channels matter most."""

        def importance(self, module: str) -> torch.Tensor:
            return torch.cat([torch.full((32,), 100.0), torch.ones(96)]).double()

    plain, weighted = tmp_path / "plain", tmp_path / "weighted"
    convert(TINY, plain, Recipe("q2_k", "gguf"))
    convert(TINY, weighted, Recipe("q2_k", "gguf"), stats=Uneven("", 1, {}))
    assert verify(weighted, TINY, SilentProgress()).findings == ()
    oracle, errors = OracleParams(TINY), torch.zeros(2, 2)
    for which, folder in enumerate((plain, weighted)):
        with open_checkpoint(folder) as output:
            for expert in range(4):
                module = f"layers.1.ffn.experts.{expert}.w3"
                squared = (read_dense(output, module) - oracle(module)).square()
                errors[which] += torch.stack([squared[:, ::16].sum(), squared.sum()])
    assert errors[1, 0] < 0.95 * errors[0, 0], errors


def test_split_files(converted: Convert, tmp_path: Path) -> None:
    """Named and numbered as llama.cpp wants, whole layers, and the same model when read back."""
    folder = converted("mxfp4", SPEAKING, split_size="8MB")
    parts = sorted(p.name for p in folder.glob("tiny-*.gguf"))
    count = len(parts)
    assert count == 3 and parts == [f"tiny-v4-MXFP4-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    readers = [gguf.GGUFReader(folder / p) for p in parts]
    tensors = [t for r in readers for t in r.tensors]
    for number, reader in enumerate(readers):
        facts = [field(reader, f"split.{k}") for k in ("no", "count", "tensors.count")]
        assert facts == [number, 3, len(tensors)]
        assert (reader.get_field("general.architecture") is None) == (number > 0)
        assert (folder / parts[number]).stat().st_size <= 8_000_000
    whole = {t.name: t for t in read(converted("mxfp4", SPEAKING), "tiny-*.gguf").tensors}
    assert [t.name for t in tensors] == list(whole)
    for tensor in tensors:
        assert np.array_equal(tensor.data, whole[tensor.name].data), tensor.name
    assert verify(folder, SPEAKING, SilentProgress()).findings == ()
    with open_checkpoint(folder / parts[0]) as one, open_checkpoint(folder) as all_of_it:
        assert set(one.tensors) == {n for n in all_of_it.tensors if not n.startswith("mtp.")}


def test_rows_that_lie_apart_are_read_right(converted: Convert) -> None:
    oracle = OracleParams(TINY)
    with open_checkpoint(converted("mxfp4")) as output:
        for half in ("e_proj", "h_proj"):
            name, wanted = f"mtp.0.{half}.weight", oracle(f"mtp.0.{half}")
            assert output.spec(name).stride == 2 * output.spec(name).row_bytes
            assert torch.equal(output.read(name).float(), wanted)
            assert torch.equal(output.read_rows(name, 3, 90).float(), wanted[3:90])
            for limit in (2, 34, 256, 1000, 10**6):
                pieces = list(output.read_chunks(name, limit))
                assert [at for at, _ in pieces] == list(
                    range(0, wanted.numel() * 2, limit // 2 * 2)
                )
                assert torch.equal(torch.cat([p for _, p in pieces]).float(), wanted.view(-1))


def test_same_bytes_for_any_workers_and_after_a_failure(
    converted: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("q4_k", "gguf", dense="q8_0", split_size="1MB")
    convert(TINY, tmp_path / "one", recipe, workers=1)
    wanted = folder_bytes(tmp_path / "one")
    convert(TINY, tmp_path / "many", recipe, workers=5)
    assert folder_bytes(tmp_path / "many") == wanted
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    real, left = os.pwrite, 100 + seed % 300

    def fail(*args: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(Exception, match="the disk is full"):
            convert(TINY, tmp_path / "broken", recipe)
    assert not (tmp_path / "broken" / "v4quant.json").exists()
    convert(TINY, tmp_path / "broken", recipe)
    assert folder_bytes(tmp_path / "broken") == wanted


SLOW = """
import os, sys, time
from pathlib import Path
from tests.support.conversion import TINY, convert
from v4quant.recipe import Recipe
real = os.pwrite
os.pwrite = lambda *a: (time.sleep(0.01), real(*a))[1]
convert(TINY, Path(sys.argv[1]), Recipe("mxfp4", "gguf", split_size="1MB"))
"""


def test_a_killed_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    recipe, out = Recipe("mxfp4", "gguf", split_size="1MB"), tmp_path / "killed"
    convert(TINY, tmp_path / "whole", recipe)
    wanted = folder_bytes(tmp_path / "whole")
    with subprocess.Popen([sys.executable, "-c", SLOW, str(out)]) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.gguf"))) < 2:  # the first one's line is in the journal
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    finished = min(out.glob("*.gguf"))
    before = finished.stat()
    assert not (out / "v4quant.json").exists()
    convert(TINY, out, recipe)
    assert finished.stat().st_mtime_ns == before.st_mtime_ns, "made again"
    assert folder_bytes(out) == wanted


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_converts(release: str, tmp_path: Path) -> None:
    seed = secrets.randbits(31)
    sys.stdout.write(f"{release} seed {seed}\n")
    source, out = make_small(tmp_path / "source", release, seed=seed), tmp_path / "out"
    convert(source, out, Recipe("mxfp4", "gguf"))
    assert verify(out, source, SilentProgress()).findings == ()
    with open_checkpoint(out) as output:
        assert inspect_checkpoint(output, SilentProgress()).defects == []
        if release == "vision":
            assert not any(n.startswith(("vision.", "aligner.", "image_")) for n in output.tensors)
            assert "layers.0.ffn.gate.bias_vl" in output
            assert "layers.0.ffn.gate.bias" not in output
        if "dspark" in release or release == "vision":
            (path,) = out.glob("dspark-*.gguf")
            reader = gguf.GGUFReader(path)
            assert field(reader, "general.architecture") == "dflash"
            assert field(reader, "dflash.block_count") == 3
            with open_checkpoint(source) as checkpoint:
                config = parse_model_config(dict(checkpoint.config))
                ids = list(config.dspark.target_layer_ids) if config.dspark else []
                assert field(reader, "dflash.target_layers") == [i + 1 for i in ids]
            assert parse_model_config(dict(output.config)).dspark == config.dspark
        if release.endswith("-base"):
            assert "mtp.0.emb.tok_emb.weight" in output


def test_an_unknown_tensor_has_no_place(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    shard = edited.shard_of("layers.0.attn_norm.weight")
    shard["layers.0.attn.extra.weight"] = StoredTensor("F32", (2, 2), bytes(16))
    edited.write(tmp_path / "source")
    with open_checkpoint(tmp_path / "source") as checkpoint:
        with pytest.raises(UnsupportedPair, match=r"'layers.0.attn.extra.weight' has no place"):
            make_plan(checkpoint, Recipe("mxfp4", "gguf", unknown="copy"))
        make_plan(checkpoint, Recipe("mxfp4", unknown="copy"))


def test_gguf_files_are_sources_again(converted: Convert, tmp_path: Path) -> None:
    """MXFP4 experts come back as the release's own values; K-types are read as they are."""
    convert(converted("mxfp4"), tmp_path / "nvfp4-like", Recipe("int8-g32"))
    assert verify(tmp_path / "nvfp4-like", converted("mxfp4"), SilentProgress()).findings == ()
    oracle = OracleParams(TINY)
    with open_checkpoint(tmp_path / "nvfp4-like") as output:
        module = "layers.2.ffn.experts.1.w1"
        assert torch.equal(read_dense(output, module), oracle(module))
    convert(converted("q4_k"), tmp_path / "again", Recipe("int8-g32"))
    assert verify(tmp_path / "again", converted("q4_k"), SilentProgress()).findings == ()
