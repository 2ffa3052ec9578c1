"""`v4quant inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.cli import _exit, _output
from v4quant.cli._types import SOURCE
from v4quant.sizes import human_bytes

if TYPE_CHECKING:
    from v4quant import Inspection
    from v4quant.checks.inspection import ByteClass


@click.command(epilog="Example: v4quant inspect DeepSeek-V4-Flash --deep")
@click.argument("source", type=SOURCE)
@click.option("--deep", is_flag=True, help="Also read all data: NaN, scale spreads, tables.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def inspect(ctx: click.Context, source: str, deep: bool, as_json: bool) -> None:
    """Show what checkpoint SOURCE is: release, layers, bytes by class, anything wrong.

    Exit code 3: it has defects.
    """
    found = v4quant.inspect(source, deep=deep, progress=_output.TerminalProgress())
    if as_json:
        _output.emit(_as_json(found))
    else:
        _output.data(_as_text(found))
    if found.defects:
        ctx.exit(_exit.DIFFERENT)


def _as_json(found: Inspection) -> dict[str, object]:
    table = asdict(found)
    for row, entry in zip(table["classes"], found.classes, strict=True):
        row["formats"] = dict(entry.formats)
        row["bits_per_weight"] = entry.bits_per_weight
    return table


def _as_text(found: Inspection) -> str:
    kinds = ", ".join(f"{n} {kind.upper()}" for kind, n in found.layer_kinds.items()) or "unknown"
    draft = ", ".join(found.draft_stages) or "none"
    facts = [
        ("checkpoint", found.path),
        ("release", found.release),
        ("size", f"{found.files} files, {found.tensors:,} tensors, "
                 f"{human_bytes(found.nbytes)} ({found.nbytes:,} bytes)"),
        ("layers", f"{kinds}; the first {found.hash_layers} hash-routed"),
        ("experts", f"{found.experts} routed, {found.experts_per_token} per token"),
        ("draft stages", draft),
    ]  # fmt: skip
    if found.layer_roles:
        facts.append(("layer roles", _roles(found.layer_roles)))
    if found.kv_bytes_per_token is not None:
        packed = f"; {found.kv_bytes_packed:,} packed" if found.kv_bytes_packed else ""
        facts.append(("KV cache", f"{found.kv_bytes_per_token:,} bytes per token (BF16){packed}"))
    if found.scales is not None:
        s = found.scales
        facts.append(
            ("expert scales", f"2^{s.lowest} to 2^{s.highest}; spread at most {s.span_fp8} octaves "
                              f"in a 128x128 tile, {s.span_nvfp4} in a matrix")
        )  # fmt: skip
    parts = [_output.table(facts), "", _class_table(found.classes, found.nbytes), ""]
    if found.defects:
        parts.append(f"{len(found.defects)} defects:")
        parts += [f"  {d}" for d in found.defects[:20]]
        if len(found.defects) > 20:
            parts.append(f"  ... and {len(found.defects) - 20} more (--json lists them)")
    else:
        parts.append("No defects found.")
    return "\n".join(parts)


def _roles(roles: dict[str, list[int]]) -> str:
    """Layers by role, neighbours as one range: `reuse 3-7, 9-13`."""
    return "; ".join(f"{role} {_ranges(layers)}" for role, layers in roles.items())


def _ranges(layers: list[int]) -> str:
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _class_table(classes: list[ByteClass], total: int) -> str:
    rows = []
    for entry in classes:
        formats = ", ".join(kind for kind, _ in entry.formats.most_common(4))
        share = f"{100 * entry.nbytes / total:.2f} %" if total else "-"
        rows.append(
            (entry.role, f"{entry.tensors:,}", human_bytes(entry.nbytes), share,
             f"{entry.bits_per_weight:.3f}", formats)
        )  # fmt: skip
    return _output.table(rows, ("class", "tensors", "bytes", "share", "bits/weight", "stored as"))
