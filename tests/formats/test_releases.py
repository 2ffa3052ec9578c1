"""Every release: recognised, inspected, converted by every scheme, and nothing lost on the way.

The synthetic checkpoints list their tensors themselves, from the published layouts, so names and
shapes known here are checked against a second account of them.
"""

from __future__ import annotations

import json
import random
import re
import secrets
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.conversion import convert, recipe_of
from tests.support.synthetic import RELEASES, make_small
from v4quant.checks.inspection import inspect_checkpoint
from v4quant.checks.verify import verify
from v4quant.conversion.plan import make_plan
from v4quant.conversion.records import InexactCast
from v4quant.recipe import Recipe
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import expected_modules, parse_name
from v4quant_formats.errors import WrongDtype
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_formats.manifest import read_manifest
from v4quant_formats.model_config import ConfigError, parse_dimensions, parse_model_config
from v4quant_formats.module_shapes import module_shape
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight
from v4quant_formats.weights import find_weight
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress

Make = Callable[[str], Path]

NAMES = {
    "flash": "V4",
    "pro": "V4",
    "flash-base": "V4 Base",
    "pro-base": "V4 Base",
    "flash-dspark": "V4 with DSpark",
    "pro-dspark": "V4 with DSpark",
    "vision": "V4 Vision-Exp",
    "v41": "V4.1",
}
KINDS = {
    "flash": {"swa": 2, "csa": 1, "hca": 1},
    "pro": {"hca": 3, "csa": 1},
    "v41": {"swa": 2, "csa2/2": 1, "csa2/1": 1},
}
# GGUF files: tests/formats/gguf/test_gguf.py.
PAIRS = [(x.name, s) for x in LAYOUTS.values() if x.index for s in x.schemes]
# Group sizes differ in nothing else, and Pro from Flash in sizes only.
REST = {"int3-g128", "int2-g64", "int4-g64", "int8-g128"}
CASES = [
    f"{release} {scheme}/{layout}"
    for release in RELEASES
    for layout, scheme in PAIRS
    if (release == "flash" or scheme not in REST)
    and (not release.startswith("pro") or scheme in ("fp8", "int4-g32"))
]
CASES += [f"{r} int4-g32@vllm" for r in ("flash-base", "flash-dspark", "vision")]
CASES += [f"{r} int4-g32@sglang" for r in ("flash-base", "flash-dspark")]
CASES += ["flash-dspark nvfp4@sglang"]
# V4.1's variants: tests/formats/layouts/test_v41_layouts.py.
# Largest relative RMS error of a matrix with random weights.
WORST = {"int4": 0.2, "int3": 0.4, "int2": 0.8, "nvfp4": 0.2, "mxfp4": 0.2, "mxfp8": 0.05}
WORST |= {"int8": 0.2, "fp8": 0.2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Folder of a small checkpoint of a release; made once, not to be changed."""
    folders: dict[str, Path] = {}

    def get(release: str) -> Path:
        if release not in folders:
            seed = secrets.randbits(31)
            sys.stdout.write(f"{release} seed {seed}\n")
            folder = tmp_path_factory.mktemp("synthetic") / release
            folders[release] = make_small(folder, release, seed=seed)
        return folders[release]

    return get


def modules_of(checkpoint: Checkpoint) -> set[str]:
    return {n.module for spec in checkpoint if (n := parse_name(spec.name))}


@pytest.mark.parametrize("release", RELEASES)
def test_inspect_names_the_release_and_finds_no_defect(release: str, made: Make) -> None:
    with open_checkpoint(made(release)) as checkpoint:
        found = inspect_checkpoint(checkpoint, SilentProgress(), deep=True)
        assert found.defects == []
        assert found.release == NAMES[release]
        assert found.tensors == len(checkpoint.tensors)
        assert sum(c.nbytes for c in found.classes) == found.nbytes == checkpoint.nbytes
    assert "unknown" not in {c.role for c in found.classes}
    family = "v41" if release == "v41" else release.split("-", maxsplit=1)[0]
    assert found.layer_kinds == KINDS.get(family, KINDS["flash"])
    drafts = 1 if release in ("flash", "pro") or release.endswith("-base") else 3
    assert found.draft_stages == [f"mtp.{i}" for i in range(drafts)]
    assert (found.experts, found.experts_per_token) == (2, 2)
    assert found.hash_layers == (0 if release == "v41" else 3)
    assert found.kv_bytes_per_token and (found.kv_bytes_packed is None) == (release != "v41")
    if release.endswith("-base"):
        assert found.scales is None
    else:
        assert found.scales is not None
        assert found.scales.span_fp8 <= 3


@pytest.mark.parametrize("release", RELEASES)
def test_every_tensor_has_a_role_a_shape_and_is_required(release: str, made: Make) -> None:
    with open_checkpoint(made(release)) as checkpoint:
        config = parse_dimensions(dict(checkpoint.config))
        for spec in checkpoint:
            name = parse_name(spec.name)
            assert name is not None, spec.name
            if name.role != "vision":
                stored = find_weight(checkpoint, name.module)
                assert module_shape(config, name.module) == stored.shape, name.module
        present = modules_of(checkpoint)
        required = list(expected_modules(config, checkpoint.tensors))
    assert len(required) == len(set(required))
    assert set(required) <= present
    # What is not required: copies only Base has, and the inside of the vision tower.
    extra = {m for m in present - set(required) if parse_name(f"{m}.weight") is not None}
    extra = {m for m in extra if not m.startswith(("vision.", "aligner.")) and m != "image_pad"}
    copies = {"mtp.0.emb.tok_emb", "mtp.0.head"} if release.endswith("-base") else set()
    assert extra == copies


@pytest.mark.parametrize("release", RELEASES)
def test_a_missing_module_is_still_expected(release: str, made: Make) -> None:
    """What is expected must not be read off what is there, beyond which stages there are."""
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    with open_checkpoint(made(release)) as checkpoint:
        config = parse_dimensions(dict(checkpoint.config))
        names = set(checkpoint.tensors)
        required = set(expected_modules(config, names))
        for module in random.Random(seed).sample(sorted(required), 25):
            left = {n for n in names if (p := parse_name(n)) and p.module != module}
            assert module in set(expected_modules(config, left)), module


@pytest.mark.parametrize("case", CASES)
def test_every_scheme_converts_every_release(case: str, made: Make, tmp_path: Path) -> None:
    release, _, wanted = case.partition(" ")
    source, out, recipe = made(release), tmp_path / "out", recipe_of(wanted)
    scheme = recipe.scheme
    result = convert(source, out, recipe, workers=1)
    checked = verify(out, source, SilentProgress())
    assert checked.findings == ()
    with open_checkpoint(source) as checkpoint, open_checkpoint(out) as output:
        modules = modules_of(checkpoint)
        experts = {m for m in modules if (n := parse_name(m)) and n.expert is not None}
        assert modules == modules_of(output) == {r["module"] for r in read_manifest(out)["tensors"]}
        found = inspect_checkpoint(output, SilentProgress())
        assert found.defects == []
    assert checked.compared == len(modules)
    base = release.endswith("-base")
    # E4M3 under a finer scale of its own rounds nothing.
    exact = scheme in ("fp8", "bf16", "mxfp8") or not (
        base or scheme.startswith(("int4", "int3", "int2"))
    )
    if not exact:
        assert result.lossy_tensors == len(experts)
        assert result.worst_relative_rms > 0
        assert result.worst_relative_rms < WORST[scheme.partition("-")[0]]
        assert result.dropped_tensors == 0
    else:
        assert result.lossy_tensors == 0
    if (recipe.format, scheme, base) in (
        ("deepseek", "mxfp4", False),
        ("deepseek", "fp8", True),
    ):
        assert result.copied_tensors == len(modules)


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_v41_outside_the_experts_is_copied_byte_for_byte(
    scheme: str, made: Make, tmp_path: Path
) -> None:
    source, out = made("v41"), tmp_path / "out"
    convert(source, out, scheme)
    with open_checkpoint(source) as a, open_checkpoint(out) as b:
        for spec in a:
            if ".ffn.experts." not in spec.name:
                same = torch.equal(
                    a.read(spec.name).view(torch.uint8), b.read(spec.name).view(torch.uint8)
                )
                assert same, spec.name
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["weight_block_size"] == [32, 32]
    assert written["expert_dtype"] == "fp4"


def test_v41_tiles_are_32_by_32_when_decoded(made: Make, tmp_path: Path) -> None:
    """BF16 outputs against a decoding that walks the tiles one by one in float64."""
    source, out = made("v41"), tmp_path / "out"
    convert(source, out, "int4-g32")
    with open_checkpoint(source) as a, open_checkpoint(out) as b:
        tables = [s.name for s in a if ".engram.embed." in s.name]
        assert len(tables) == 2
        for name in tables:
            assert torch.equal(a.read(name).view(torch.uint8), b.read(name).view(torch.uint8))
        for module in ("layers.0.attn.wq_b", "layers.1.engram.wkv", "mtp.0.main_proj"):
            codes = a.read(f"{module}.weight").double().numpy()
            powers = a.read(f"{module}.scale").view(torch.uint8).numpy().astype(np.int64) - 127
            for row, column in np.ndindex(*powers.shape):
                tile = (slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32))
                codes[tile] = np.ldexp(codes[tile], powers[row, column])
            assert b.spec(f"{module}.weight").dtype == "BF16"
            assert f"{module}.scale" not in b
            np.testing.assert_array_equal(b.read(f"{module}.weight").double().numpy(), codes)


@pytest.mark.parametrize("release", ["flash", "flash-base", "vision", "v41"])
def test_draft_stages_can_be_dropped(release: str, made: Make, tmp_path: Path) -> None:
    source, out = made(release), tmp_path / "out"
    result = convert(source, out, Recipe("mxfp4", draft="drop"))
    assert verify(out, source, SilentProgress()).findings == ()
    with open_checkpoint(source) as a, open_checkpoint(out) as b:
        drafts = {n for n in a.tensors if n.startswith("mtp.")}
        assert set(a.tensors) - set(b.tensors) == drafts
    assert result.dropped_tensors == len(drafts) > 0


def test_base_scales_that_are_no_powers_of_two_are_counted_as_a_loss(tmp_path: Path) -> None:
    source = make_small(tmp_path / "base", "flash-base", layers=1)
    name = "layers.0.attn.wkv.scale"
    convert(source, tmp_path / "good", "mxfp4")
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "good") as b:
        spec, was, now = a.spec(name), a.read(name), b.read(name)
        assert now.dtype == torch.float8_e8m0fnu
        assert torch.equal(now.float(), was)
    with (source / spec.file).open("r+b") as file:
        file.seek(spec.offset)
        file.write(struct.pack("<f", 0.75 * float(was.flatten()[0])))
    with pytest.raises(InexactCast, match=r"'layers\.0\.attn\.wkv' does not fit fp8 exactly"):
        convert(source, tmp_path / "refused", Recipe("mxfp4", on_inexact="refuse"))
    # Scales that are not powers of two are carried by `fp8`; elsewhere the matrix is coded anew.
    for out, scheme in (("kept", "fp8"), ("recoded", "mxfp4")):
        convert(source, tmp_path / out, scheme)
        assert verify(tmp_path / out, source, SilentProgress()).findings == ()
        manifest = json.loads((tmp_path / out / "v4quant.json").read_text())
        record = next(r for r in manifest["tensors"] if r["module"] == "layers.0.attn.wkv")
        assert record["exact"] == (out == "kept")


def test_the_forward_pass_reads_every_config(made: Make) -> None:
    for release in RELEASES:
        raw = json.loads((made(release) / "config.json").read_text())
        exact = release in ("vision", "v41")
        assert parse_model_config(raw).rms_norm_eps == (1e-20 if exact else 1e-6)


@pytest.mark.parametrize(("mine", "theirs"), [("v41", "flash"), ("flash", "v41")])
def test_a_config_of_the_other_release_is_named(
    mine: str, theirs: str, made: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(made(mine), folder)
    shutil.copy(made(theirs) / "config.json", folder / "config.json")
    with open_checkpoint(folder) as checkpoint:
        defects = inspect_checkpoint(checkpoint, SilentProgress()).defects
    releases = {"v41": r"V4\.1's", "flash": "V4's"}
    said = f"config.json is {releases[theirs]}, but the tensors are {releases[mine]}"
    assert re.match(said, defects[0]), defects[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "'text_config' is missing"),
        ({"compress_ratios": [0, 4, 2, 1]}, r"compress_ratios\[1\] is 4"),
        ({"kv_source_layer_ids": [3]}, "layer 2 reads entries of 2 tokens"),
        ({"kv_source_layer_ids": [2]}, "layer 3 reads entries of 1 tokens"),
        ({"index_source_layer_ids": [2]}, r"KV sources \[3\] are missing"),
        ({"index_source_layer_ids": [1, 2, 3]}, r"layers \[1\] are sources"),
        ({"candidate_source_layer_id": 1}, "candidate_source_layer_id 1 is not among"),
        ({"candidate_source_layer_id": 2}, r"KV sources \[3\] lie behind the candidate source"),
        ({"dspark_num_experts_per_tok": 3}, "dspark_num_experts_per_tok > dspark_n"),
        ({"kv_source_layer_ids": [2, 4]}, "'kv_source_layer_ids' must list layers between 0 and 3"),
        ({"engram_num_embeddings": [5, 5]}, "'engram_num_embeddings' must size"),
        ({"engram_num_embeddings": [0]}, "'engram_num_embeddings' must size"),
        ({"engram_max_ngram_size": 1}, "'engram_max_ngram_size' is 1"),
        ({"engram_vocab_size": 10**400}, "'engram_vocab_size' is "),
        ({"engram_n_heads": 4096}, "Engram would look up 12,288 rows"),
        ({"compress_ratios": [0, 0, 3, 1, 0]}, r"compress_ratios\[2\] is 3; .*have 0, 1, 2"),
        ({"compress_ratios": [0, 0, 2]}, "'compress_ratios' must list at least 4 layers"),
        ({"kv_source_layer_ids": []}, "names no layer that makes them"),
        ({"dspark_target_layer_ids": [True]}, "'dspark_target_layer_ids'"),
        ({"dspark_markov_rank": "16"}, "'dspark_markov_rank' is '16'"),
    ],
)
def test_a_wrong_v41_config_is_named(change: dict[str, Any], message: str, made: Make) -> None:
    raw = json.loads((made("v41") / "config.json").read_text())
    if "text_config" in change:
        raw |= change
    else:
        raw["text_config"] |= change
    with pytest.raises(ConfigError, match=message):
        parse_dimensions(raw)


@pytest.mark.parametrize("missing", ["layers.2", "layers.1"])
def test_a_missing_v41_layer_is_named(missing: str, made: Make, tmp_path: Path) -> None:
    """Layer 2 owns the caches that layers behind it read, layer 1 has the Engram."""
    folder = tmp_path / "source"
    shutil.copytree(made("v41"), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {f for n, f in index["weight_map"].items() if n.startswith(f"{missing}.")}
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f not in shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in shards:
        (folder / shard).unlink()
    with open_checkpoint(folder) as checkpoint:
        defects = inspect_checkpoint(checkpoint, SilentProgress()).defects
        assert defects and all(missing in d for d in defects), defects[:5]
        with pytest.raises(V4QuantError, match=missing):
            make_plan(checkpoint, Recipe("mxfp4"))


def change_config(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= fields
    (folder / "config.json").write_text(json.dumps(raw))


def test_tables_of_other_primes_are_named(made: Make, tmp_path: Path) -> None:
    """By their rows, where config.json counts the tables that are there; by shape elsewhere."""
    folder = tmp_path / "source"
    shutil.copytree(made("v41"), folder)
    change_config(folder, engram_vocab_size=500)
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(ConfigError, match=r"rows for layer 1, but the primes .* add up to"),
    ):
        make_plan(checkpoint, Recipe("mxfp4"))
    config = parse_dimensions(json.loads((folder / "config.json").read_text()))
    assert config.v41 is not None
    change_config(folder, engram_num_embeddings=[t.rows for t in config.v41.engram_tables])
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(WrongDtype, match=r"engram\.embed.* has shape .*, but config\.json implies"),
    ):
        make_plan(checkpoint, Recipe("mxfp4"))


def test_another_tokenizer_is_named_before_an_engine_stops(made: Make, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(made("v41"), folder)
    with open_checkpoint(folder) as checkpoint:
        assert preflight(checkpoint, "vllm").loads
    size = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, engram_compressed_vocab_size=size["engram_compressed_vocab_size"] - 1)
    with open_checkpoint(folder) as checkpoint:
        found = preflight(checkpoint, "sglang")
    assert not found.loads
    assert any("compressed token ids" in f.problem for f in found.findings)
