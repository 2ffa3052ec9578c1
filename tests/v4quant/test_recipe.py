"""Recipes: every choice is checked, unknown keys are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.conversion import SCHEMES
from v4quant.recipe import Recipe, RecipeError, read_toml, recipe_from_table
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_kernels.errors import UnsupportedScheme


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "/" not in s])
def test_default_format_of_every_scheme(scheme: str) -> None:
    recipe = Recipe(scheme)
    assert scheme in LAYOUTS[recipe.format].schemes
    assert recipe.expert_scheme.name == scheme and recipe.layout is LAYOUTS[recipe.format]
    assert recipe_from_table(recipe.as_dict(), "x") == recipe
    assert Recipe(scheme, recipe.format) == recipe, "the default, said or not, is one recipe"


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"scheme": "int5-g32"}, UnsupportedScheme, "'int5-g32'.*int4-g32"),
        ({"scheme": ""}, UnsupportedScheme, "unknown scheme"),
        ({"scheme": "int4-g32", "format": "deepseek"}, UnsupportedPair, "pairs that work"),
        ({"scheme": "int4-g32", "format": "gguf5"}, UnsupportedPair, "unknown format"),
        ({"scheme": "int4-g32", "draft": "maybe"}, RecipeError, "draft = 'maybe'.*convert, drop"),
        ({"scheme": "int4-g32", "unknown": "yes"}, RecipeError, "unknown = 'yes'"),
        ({"scheme": "int4-g32", "on_inexact": ""}, RecipeError, "on_inexact"),
        ({"scheme": "int4-g32", "on-inexact": "nearest"}, RecipeError, "unknown key 'on-inexact'"),
        ({"scheme": 4}, RecipeError, "'scheme' must be a string"),
        ({"format": "deepseek"}, RecipeError, "'scheme' is missing"),
    ],
)
def test_refused(fields: dict[str, object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        recipe_from_table(fields, "recipe.toml")


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('scheme = "fp8"\ndraft = "drop"\n')
    assert recipe_from_table(read_toml(path), str(path)) == Recipe("fp8", draft="drop")
    for content in (b"scheme = ", b"\xff\xfe", b"a = 1\na = 2"):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"r\.toml: cannot be read"):
            read_toml(path)
    with pytest.raises(RecipeError, match=r"absent\.toml"):
        read_toml(tmp_path / "absent.toml")
