"""GGUF files of V4.1: read by the gguf package, equal to the source, the Engram in a file apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize

from tests.support.conversion import convert
from v4quant.builtin import resolve_source
from v4quant.checks.verify import verify
from v4quant.recipe import Recipe, RecipeError
from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_formats.deepseek_v4 import split_part
from v4quant_formats.engram import read_token_map
from v4quant_formats.errors import WrongMetadata
from v4quant_formats.gguf.metadata_v41 import v41_config
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.progress import SilentProgress

Convert = Callable[..., Path]
TOKENIZER = Path(resolve_source("builtin:tiny-v4")).parent / "tiny-v41"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random V4.1 with a tokenizer that llama.cpp has."""
    out = tmp_path_factory.mktemp("v41") / "source"
    sizes = {
        "num_hidden_layers": 8,
        "n_routed_experts": 2,
        "dspark_n_routed_experts": 2,
        "vocab_size": 2054,
    }
    write_checkpoint(out, Request("v41", overrides=tuple(sizes.items()), seed=5))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, out / name)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["engram_compressed_vocab_size"] = 1590
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    made: dict[str, Path] = {}

    def get(scheme: str, **recipe: str) -> Path:
        key = f"{scheme}{recipe}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gguf") / "out"
            convert(source, made[key], Recipe(scheme, "gguf", **recipe))
        return made[key]

    return get


def config_of(folder: Path) -> ModelConfig:
    with open_checkpoint(folder) as checkpoint:
        return parse_model_config(dict(checkpoint.config))


def test_every_value_comes_back(source: Path, converted: Convert) -> None:
    out = converted("mxfp4")
    with open_checkpoint(source) as before, open_checkpoint(out) as after:
        modules = {split_part(n)[0] for n in after.tensors}
        left = {split_part(n)[0] for n in before.tensors} - modules
        outside = ("mtp.", "vision.", "aligner.", "image_")
        assert left and all(m.startswith(outside) for m in left)
        for module in modules:
            assert torch.equal(read_dense(before, module), read_dense(after, module)), module
    assert verify(out, source, SilentProgress()).findings == ()
    ours, theirs = config_of(source), config_of(out)
    assert ours.layers == theirs.layers and ours.yarn == theirs.yarn
    assert ours.rms_norm_eps == theirs.rms_norm_eps == 1e-20
    assert ours.v41 is not None and theirs.v41 is not None
    assert ours.v41 == theirs.v41


def test_files_without_our_own_keys_read_as_well(converted: Convert) -> None:
    """Tables start at the first prime then, and no choice is limited to blocks."""
    from v4quant_formats.gguf.checkpoint import metadata_of

    file = sorted(converted("mxfp4").glob("*.gguf"))[0]
    metadata = {k: v for k, v in metadata_of(file).items() if not k.startswith("v4quant.")}
    names = [t.name for t in gguf.GGUFReader(file).tensors]
    config = parse_model_config(v41_config(metadata, names, "model.gguf"))
    whole = config_of(file.parent)
    assert config.v41 is not None and whole.v41 is not None
    assert config.v41.candidate_source_layer_id is None
    assert config.v41.engram_tables == whole.v41.engram_tables
    assert config.v41.kv_source_layer_ids == whole.v41.kv_source_layer_ids


def test_the_gguf_package_reads_names_types_and_constants(source: Path, converted: Convert) -> None:
    out, config = converted("mxfp4"), config_of(source)
    assert config.v41 is not None
    first, second = (gguf.GGUFReader(p) for p in sorted(out.glob("*.gguf")))
    assert first.fields["general.architecture"].contents() == "deepseek41"
    table = config.v41.engram_tables[0]
    wanted: dict[str, Any] = {
        "layer_ids": [1],
        "head_count": config.v41.engram_n_heads,
        "key_length": config.v41.engram_head_dim,
        "max_ngram_size": config.v41.engram_max_ngram_size,
        "multipliers": list(table.multipliers),
        "primes": list(table.primes),
        "offsets": list(table.offsets),
        "token_map": list(
            read_token_map((source / "tokenizer.json").read_bytes(), source, 2054, 1590)
        ),
    }
    for key, value in wanted.items():
        field = first.fields[f"deepseek41.engram.{key}"]
        assert field.contents() == value, key
        if key in ("multipliers", "primes", "offsets"):
            assert field.types[1] == gguf.GGUFValueType.UINT64
    assert "deepseek41.hash_layer_count" not in first.fields
    assert list(first.fields["deepseek41.attention.compress_ratios"].contents())[:3] == [0, 0, 2]
    names = {t.name: t for t in first.tensors}
    for name in ("indexer.attn_k", "indexer.k_norm", "attn_compressor_gate", "indexer.proj"):
        assert f"blk.2.{name}.weight" in names
    assert names["blk.1.engram_wkv.weight"].shape[1] == 5 * config.hidden_size
    assert names["blk.1.engram_q.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert "blk.0.exp_probs_b_vl.bias" in names and "output_hc_fn.weight" not in names
    assert [t.name for t in second.tensors] == ["blk.1.engram_embd.weight"]
    embd = second.tensors[0]
    assert list(embd.shape) == [config.v41.engram_head_dim, table.rows]
    with open_checkpoint(source) as checkpoint:
        values = torch.from_numpy(dequantize(embd.data, embd.tensor_type))
        assert torch.equal(values, read_dense(checkpoint, "layers.1.engram.embed"))


def test_conversions_share_the_engrams_file(converted: Convert) -> None:
    """Its bytes depend on its own type, not on how the experts are coded."""
    plain, other = converted("mxfp4"), converted("q8_0", dense="q8_0", engram="bf16")
    last = [next(f.glob("*-00002-of-00002.gguf")).read_bytes() for f in (plain, other)]
    assert last[0] == last[1]


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 0.01), ("iq4_nl", 0.1), ("q4_0", 0.12)])
def test_tables_are_rounded_and_the_error_counted(
    source: Path, converted: Convert, kind: str, most: float
) -> None:
    out = converted("mxfp4", engram=kind)
    module = "layers.1.engram.embed"
    with open_checkpoint(source) as before, open_checkpoint(out) as after:
        x, y = read_dense(before, module), read_dense(after, module)
    error = float((x - y).norm() / x.norm())
    record = next(
        r
        for r in json.loads((out / "v4quant.json").read_text())["tensors"]
        if r["module"] == module
    )
    assert record["target"] == kind and record["disposition"] == "quantized"
    assert record["relative_rms"] == pytest.approx(error, rel=1e-4)
    assert 0 < error < most


def test_preflight_names_the_uncertainty(converted: Convert) -> None:
    with open_checkpoint(converted("mxfp4")) as checkpoint:
        found = preflight(checkpoint, "llama.cpp")
    assert any("pull request 28696" in f.problem for f in found.findings if f.severity == "note")
    assert found.loads


def test_memory_keeps_tables_apart(source: Path, converted: Convert) -> None:
    for folder, engine, kind in ((source, "vllm", 64 + 2), (converted("mxfp4"), "llama.cpp", 128)):
        with open_checkpoint(folder) as checkpoint:
            memory = preflight(checkpoint, engine).memory
            total = checkpoint.nbytes
        assert memory is not None and memory.tables == kind * 796
        assert memory.weights + memory.tables == total


def test_only_formats_with_a_choice_take_engram() -> None:
    with pytest.raises(RecipeError, match="has no effect there"):
        Recipe("mxfp4", "deepseek", engram="q8_0")
    with pytest.raises(RecipeError, match="is not one of bf16, q8_0"):
        Recipe("mxfp4", "gguf", engram="mxfp4")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("primes", [4], "contradict"),
        ("multipliers", None, "rows would be others'"),
        ("token_map", "x", "not a list of numbers"),
        ("pad_id", -1, "expected a number"),
        ("head_count", 2**40, "expected a number"),
    ],
)
def test_damaged_constants_are_refused(
    converted: Convert, key: str, value: Any, message: str
) -> None:
    from v4quant_formats.gguf.checkpoint import metadata_of

    metadata = dict(metadata_of(sorted(converted("mxfp4").glob("*.gguf"))[0]))
    name = f"deepseek41.engram.{key}"
    metadata[name] = [3 * m for m in metadata[name]] if value is None else value
    with pytest.raises(WrongMetadata, match=message):
        v41_config(metadata, (), "model.gguf")
