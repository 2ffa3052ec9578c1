"""A footprint planned from a few experts is what the whole plan has, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.synthetic import make_small
from v4quant.conversion.unit_planner import plan_units
from v4quant.planner.footprint import (
    HUB_NAMES,
    footprint,
    outline_checkpoint,
    outline_release,
    release_named,
)
from v4quant.recipe import Recipe
from v4quant.synthetic.configs import RELEASES
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.engines.vllm_split import is_split
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.shard_files import HeadersOnly
from v4quant_formats.structure import check_structure

RECIPES = (
    Recipe("mxfp4", format="gguf", dense="q8_0", draft="drop"),
    Recipe("int4-g32", engine="vllm"),
    Recipe("nvfp4"),
    Recipe("bf16"),
)


@pytest.mark.parametrize("release", ["flash", "flash-dspark", "pro-base", "v41"])
def test_a_few_experts_tell_the_bytes_of_all(tmp_path: Path, release: str) -> None:
    folder = make_small(tmp_path / "source", release, experts=12, headers_only=True)
    with open_checkpoint(folder) as source:
        outline = outline_checkpoint(source)
        assert outline.nbytes == source.nbytes
        structure = check_structure(replace(source, shards=HeadersOnly()))  # its data are zeros
        for recipe in RECIPES:
            units = plan_units(source, recipe, structure).units
            specs = [s for unit in units for s in unit.outputs]
            found = footprint(outline, recipe)
            assert found.total == sum(s.nbytes for s in specs)
            names = {s.name: parse_name(s.name) for s in specs}
            tables = [s for s in specs if ".engram.embed." in s.name]
            cut = [s for s in specs if (n := names[s.name]) and is_split(n) and s not in tables]
            assert found.tables == sum(s.nbytes for s in tables)
            assert bool(tables) == (release == "v41")
            whole = sum(s.nbytes for s in specs) - sum(s.nbytes for s in (*cut, *tables))
            assert found.whole + found.whole_drafts == whole
            assert found.cut + found.cut_drafts == sum(s.nbytes for s in cut)
            layer = [s for s in specs if s.name.startswith("layers.2.")]
            experts = sum(s.nbytes for s in layer if ".ffn.experts." in s.name)
            assert found.layers[2].experts == experts
            assert found.layers[2].rest == sum(s.nbytes for s in layer) - experts


def test_a_converted_checkpoint_is_outlined_by_its_headers(
    converted: Callable[[str], Path],
) -> None:
    """Packed matrices whose shape a tensor tells, which an outline does not read."""
    with open_checkpoint(converted("int4-g32")) as source:
        assert any(name.endswith(".weight_shape") for name in source.tensors)
        outline = outline_checkpoint(source)
        assert not outline.thin.has_data and source.has_data
        assert outline.nbytes == source.nbytes
        assert footprint(outline, Recipe("q8_0", format="gguf", draft="drop")).total > 0
        with pytest.raises(AssertionError, match="only headers are known"):
            outline.thin.read("layers.0.ffn.gate.weight")


def test_built_in_inventories_have_the_published_sizes() -> None:
    """The totals of the releases' own indexes."""
    assert outline_release("flash").nbytes == 159_609_485_896
    assert outline_release("pro").nbytes == 864_704_792_696
    assert outline_release("v41").nbytes == 510_286_023_000
    assert set(HUB_NAMES) == set(RELEASES)


def test_releases_go_by_several_names() -> None:
    assert release_named("flash") == "flash"
    assert release_named("DeepSeek-V4-Pro") == "pro"
    assert release_named("deepseek-ai/deepseek-v4-flash-0731") == "flash-dspark"
    assert release_named("flash-v41") == release_named("DeepSeek-V4.1-Flash-1017") == "v41"
    assert release_named("./out") is None
