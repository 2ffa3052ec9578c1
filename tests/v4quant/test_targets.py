"""WorkFolders of a recipe: read, written, refused, and obeyed by the output."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from random import Random

import pytest
from gguf import GGUFReader

from tests.support.conversion import convert
from v4quant.builtin import TINY_V4, resolve_source
from v4quant.checks.verify import verify
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe, RecipeError, recipe_from_table
from v4quant.targets import GROUPS, LAYER, PlaceError, read_places, write_places
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

SOURCE = Path(resolve_source(TINY_V4))


def test_ranges_are_written_out() -> None:
    found = read_places(
        [("layers.1-3.down", "q2_k"), ("mtp.0.dense", "q8_0"), ("head", "q6_k"),
         ("layers.4.hyper", "q8_0")]
    )  # fmt: skip
    assert found == {
        ("", "head"): "q6_k",
        ("layers.4", "hyper"): "q8_0",
        ("layers.1", "down"): "q2_k",
        ("layers.2", "down"): "q2_k",
        ("layers.3", "down"): "q2_k",
        ("mtp.0", "dense"): "q8_0",
    }


def test_a_layers_experts_in_one_word() -> None:
    schemes = {("layers.1", LAYER): "int3-g128", ("layers.2", LAYER): "int3-g128"}
    lines = write_places({**schemes, ("mtp.0", LAYER): "mxfp4"})
    assert lines == [("layers.1-2.experts", "int3-g128"), ("mtp.0.experts", "mxfp4")]
    assert read_places(lines[:1]) == {
        (f"layers.{n}", group): "int3-g128" for n in (1, 2) for group in ("gate_up", "down")
    }
    with pytest.raises(PlaceError, match=r"'layers\.0\.experts' names layers\.0\.down again"):
        read_places([("layers.0.down", "q2_k"), ("layers.0.experts", "q2_k")])


def test_written_places_are_read_again() -> None:
    seed = secrets.randbits(32)
    rng = Random(seed)
    schemes = {
        (f"{kind}.{number}", group): rng.choice(["q2_k", "mxfp4"])
        for kind, count in (("layers", 20), ("mtp", 3))
        for number in range(count)
        for group in GROUPS
        if rng.random() < 0.8
    } | {("", "embed"): "q8_0"}
    lines = write_places(schemes)
    assert read_places(lines) == schemes, seed
    assert len(lines) < len(schemes), seed


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("layers.0", "not a place"),
        ("experts", "not a place"),
        ("layers.0.w1", "not a place"),
        ("layers.x.down", "not a place"),
        ("layers.0-99999999999.down", "not a place"),
        ("layers.5-2.down", "empty range"),
        ("layers.0.embed", "not a place"),
    ],
)
def test_places_that_cannot_be_read(key: str, text: str) -> None:
    with pytest.raises(PlaceError, match=text):
        Recipe("mxfp4", "gguf", schemes=((key, "q2_k"),))


def test_no_place_twice() -> None:
    schemes = {"layers.0-3.down": "q2_k", "layers.2.down": "q3_k"}
    with pytest.raises(PlaceError, match=r"'layers\.2\.down' names layers\.2\.down again"):
        recipe_from_table({"scheme": "mxfp4", "format": "gguf", "schemes": schemes}, "r.toml")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"scheme": "int4-g32", "schemes": {"layers.0.down": "int4-g64"}}, "does not work in"),
        ({"schemes": {"layers.0.down": "int4-g32"}}, r"layers\.0\.down = 'int4-g32' is not one"),
        (
            {"schemes": {"layers.0.dense": "mxfp4"}},
            r"layers\.0\.dense = 'mxfp4' is not one of bf16",
        ),
        ({"schemes": "q2_k"}, "must be a table"),
        ({"schemes": {"layers.0.down": 2}}, "must be a table"),
    ],
)
def test_refused(table: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        recipe_from_table({"scheme": "mxfp4", "format": "gguf"} | dict(_format(table)), "r.toml")


def _format(table: dict[str, object]) -> dict[str, object]:
    return {**table, "format": "compressed-tensors"} if "scheme" in table else table


@pytest.mark.parametrize(
    ("key", "draft"), [("layers.9.down", "convert"), ("mtp.1.dense", "convert"),
                       ("mtp.0.down", "drop")]
)  # fmt: skip
def test_stages_that_are_not_there(key: str, draft: str) -> None:
    recipe = Recipe("mxfp4", "gguf", draft=draft, schemes=((key, "q3_k"),))
    with open_checkpoint(SOURCE) as checkpoint, pytest.raises(PlaceError, match=key):
        make_plan(checkpoint, recipe)


def test_the_output_has_what_was_asked_for(tmp_path: Path) -> None:
    schemes = {
        "layers.1-2.down": "q3_k", "layers.2.gate_up": "q2_k", "layers.4.dense": "q6_k",
        "layers.2-3.compressor": "q8_0", "layers.5.hyper": "q6_k", "head": "q5_k", "embed": "bf16",
    }  # fmt: skip
    recipe = Recipe("mxfp4", "gguf", draft="drop", schemes=tuple(schemes.items()))
    plain = Recipe("mxfp4", "gguf", draft="drop")
    out = tmp_path / "out"
    result = convert(SOURCE, out, recipe)
    types = {t.name: t.tensor_type.name for t in GGUFReader(out / "tiny-v4-MXFP4.gguf").tensors}
    for layer in range(6):
        down = "Q3_K" if layer in (1, 2) else "MXFP4"
        gate = "Q2_K" if layer == 2 else "MXFP4"
        assert types[f"blk.{layer}.ffn_down_exps.weight"] == down
        assert types[f"blk.{layer}.ffn_gate_exps.weight"] == gate
        assert types[f"blk.{layer}.ffn_up_exps.weight"] == gate
        assert types[f"blk.{layer}.ffn_down_shexp.weight"] == ("Q6_K" if layer == 4 else "BF16")
    assert types["token_embd.weight"] == "BF16" and types["output.weight"] == "Q5_K"
    assert types["blk.2.indexer_compressor_kv.weight"] == "Q8_0"
    assert types["blk.3.attn_compressor_gate.weight"] == "Q8_0"
    assert types["blk.4.attn_compressor_gate.weight"] == "BF16"
    assert types["blk.5.hc_attn_fn.weight"] == "Q6_K" and types["blk.4.hc_ffn_fn.weight"] == "F32"
    manifest = json.loads((out / "v4quant.json").read_text())
    assert recipe_from_table(manifest["recipe"], "manifest") == recipe
    with open_checkpoint(SOURCE) as checkpoint:
        plan, other = make_plan(checkpoint, recipe), make_plan(checkpoint, plain)
        assert plan.digest != other.digest and plan.bytes_out < other.bytes_out
        assert result.bytes_out == plan.bytes_out == (out / "tiny-v4-MXFP4.gguf").stat().st_size
    assert verify(out, SOURCE, SilentProgress()).findings == ()
