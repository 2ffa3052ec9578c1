"""Preflight of GGUF files: a good one passes, metadata that lies or is lost is found."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert
from v4quant_formats.engines.llama_cpp import TYPES
from v4quant_formats.errors import WrongMetadata
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import Preflight, preflight
from v4quant_kernels.ggml_types import get_type


def check(path: Path, engine: str = "llama.cpp") -> Preflight:
    with open_checkpoint(path) as checkpoint:
        return preflight(checkpoint, engine)


def alarms(found: Preflight) -> list[str]:
    return [f"{f.rule} {f.tensor}: {f.problem}" for f in found.findings if f.severity != "note"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).parents[3] / "v4quant" / "data" / "tiny-v4"
    folder = tmp_path_factory.mktemp("gguf") / "out"
    convert(source, folder, "mxfp4/gguf")
    return folder


def test_gguf_is_for_llama_cpp(gguf: Path) -> None:
    found = check(gguf, "llama.cpp")
    assert found.loads and not alarms(found) and "sm86" in found.gpus and "CPU" in found.gpus
    assert found.memory is not None and found.memory.weights > 10**7
    for engine in ("vllm", "sglang", "transformers"):
        assert not check(gguf, engine).loads
    assert "whose int2-g64 has q2_0's bits" in check(gguf, "vllm").findings[0].remedy
    assert not any(f.rule == "build" for f in found.findings), "as old as the architecture"


def test_types_that_older_builds_do_not_know(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "out", "q2_0/gguf")
    found = check(tmp_path / "out")
    told = next(f for f in found.findings if f.rule == "build")
    assert told.severity == "note" and "from build 9937" in told.problem
    assert "convert to q2_k" in told.remedy
    for name, since in TYPES.items():
        older = get_type(since.instead)
        assert older.offered and older.dtype not in TYPES and get_type(name.lower()).dtype == name


def test_gguf_without_a_tensor(gguf: Path) -> None:
    with open_checkpoint(gguf) as checkpoint:
        kept = {
            n: s for n, s in checkpoint.tensors.items() if not n.startswith("layers.1.attn.wq_b")
        }
        broken = replace(checkpoint, tensors=kept)
        found = preflight(broken, "llama.cpp")
    assert not found.loads and "layers.1.attn.wq_b" in found.findings[0].tensor


def place(data: bytes, name: str) -> int:
    """Where the value behind a name of the header begins."""
    raw = name.encode()
    return data.index(struct.pack("<Q", len(raw)) + raw) + 8 + len(raw)


def changed(gguf: Path, folder: Path, at: int, new: bytes) -> Path:
    """The trunk's file with some bytes replaced."""
    data = next(gguf.glob("tiny-*.gguf")).read_bytes()
    folder.mkdir(exist_ok=True)
    (folder / "model.gguf").write_bytes(data[:at] + new + data[at + len(new) :])
    return folder


def without(gguf: Path, folder: Path, key: str) -> Path:
    """A key renamed to one nobody reads."""
    data = next(gguf.glob("tiny-*.gguf")).read_bytes()
    return changed(gguf, folder, place(data, key) - 1, b"#")


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("deepseek4.expert_shared_count", "V4 needs 1"),
        ("deepseek4.expert_weights_norm", "V4 needs True"),
        ("deepseek4.attention.head_count_kv", "V4 needs 1"),
        ("tokenizer.ggml.tokens", "no tokenizer"),
        ("tokenizer.ggml.merges", "cannot read text"),
        ("tokenizer.ggml.model", "cannot read text"),
    ],
)
def test_metadata_that_is_needed(gguf: Path, key: str, word: str, tmp_path: Path) -> None:
    found = check(without(gguf, tmp_path, key))
    assert not found.loads and not found.gpus and word in found.findings[0].problem


@pytest.mark.parametrize("key", ["pre", "token_type", "bos_token_id", "eos_token_id"])
def test_metadata_that_has_a_wrong_default(gguf: Path, key: str, tmp_path: Path) -> None:
    found = check(without(gguf, tmp_path, f"tokenizer.ggml.{key}"))
    assert found.loads and found.gpus and key in alarms(found)[0]


def test_yarn_without_its_type_is_no_plain_rope(gguf: Path, tmp_path: Path) -> None:
    bare = without(gguf, tmp_path, "deepseek4.rope.scaling.type")
    with open_checkpoint(bare) as opened:
        assert opened.config["rope_scaling"]["type"] == "yarn"
    assert "rope.scaling.type' is absent" in alarms(check(bare))[0]
    (bare / "model.gguf").rename(bare / "tiny-a.gguf")
    plain = without(bare, tmp_path / "b", "deepseek4.rope.scaling.yarn_beta_fast")
    with pytest.raises(WrongMetadata, match="rope scaling"):
        check(plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 0),
        ("attention.indexer.top_k", 0),
        ("expert_shared_count", 2),
        ("expert_used_count", 3),
        ("expert_count", 4),
        ("block_count", 5),
        ("hash_layer_count", 0),
    ],
)
def test_numbers_that_lie(gguf: Path, key: str, value: int, tmp_path: Path) -> None:
    data = next(gguf.glob("tiny-*.gguf")).read_bytes()
    at = place(data, f"deepseek4.{key}") + 4
    assert not check(changed(gguf, tmp_path, at, struct.pack("<I", value))).loads


def test_hash_table_of_floats(gguf: Path, tmp_path: Path) -> None:
    data = next(gguf.glob("tiny-*.gguf")).read_bytes()
    at = place(data, "blk.0.ffn_gate_tid2eid.weight") + 4 + 2 * 8
    assert data[at : at + 4] == struct.pack("<I", 26)  # I32
    found = check(changed(gguf, tmp_path, at, struct.pack("<I", 0)))
    assert not found.loads and "reads I32" in found.findings[0].problem
