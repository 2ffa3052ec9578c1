"""What a manifest says of a conversion, and how a card writes it: names, sizes, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from v4quant.recipe import recipe_from_table
from v4quant.sizes import human_bytes
from v4quant.visible import visible
from v4quant_formats.layouts.layout import Layout
from v4quant_kernels.errors import V4QuantError


def section(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The manifest's object under `key`, empty when absent. Raises TypeError for other kinds."""
    value = manifest.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"'{key}' is not an object")
    return value or {}


def text(table: Mapping[str, Any], key: str) -> str:
    """The value under `key` as visible text, empty when absent."""
    value = table.get(key)
    return "" if value is None else visible(str(value))


def scheme_of(manifest: Mapping[str, Any]) -> str:
    """The experts' scheme."""
    return text(section(manifest, "recipe"), "scheme")


def format_of(manifest: Mapping[str, Any]) -> str:
    """The container."""
    return text(section(manifest, "recipe"), "format")


def layout_of(manifest: Mapping[str, Any]) -> Layout | None:
    """The layout of the recipe; None for one of another version."""
    try:
        return recipe_from_table(section(manifest, "recipe"), "v4quant.json").layout
    except (V4QuantError, TypeError):
        return None


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are escaped already."""
    marks = ["---"] + ["---:" if len(columns) > 2 else "---"] * (len(columns) - 1)
    lines = [columns, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size_text(count: Any) -> str:
    """Bytes for people; empty for what is no number of them."""
    if not isinstance(count, int) or isinstance(count, bool):
        return ""
    return human_bytes(count)
