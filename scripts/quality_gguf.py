"""GGUF files of the tiny V4 beside llama.cpp's own quantizer: bytes and KL of whole models.

    scripts/quality_gguf.py               every row, into docs/quality-gguf.md and quality-gguf.json
    scripts/quality_gguf.py --only Q2_K   one row, the others as stored
    scripts/quality_gguf.py --allocate    choose the recipes anew; else the stored ones are used
    scripts/quality_gguf.py --check       a reduced row again, compared with the stored one

A row has a size in bytes, that of llama.cpp's file of the type named; our files have no more. The
recipe is `allocate`'s for that size, rounded by the encoder alone and solved. llama.cpp's files are
made by its Python package where that is installed, else the stored figures stand, with the version
they are of. All are scored by our forward on the same held-out text.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from script_tools.figures import drift, figures

import v4quant
from v4quant import Recipe
from v4quant.builtin import CALIBRATION, HELDOUT
from v4quant.recipe import recipe_from_table

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "v4quant" / "data" / "tiny-v4"
STORED = ROOT / "docs" / "quality-gguf.json"
PAGE = ROOT / "docs" / "quality-gguf.md"
# llama.cpp's type of a whole file, and a size its own file of that type does not go below.
SIZES = {"Q6_K": "20.3MB", "Q4_K_M": "14.6MB", "Q3_K_M": "11.8MB", "Q2_K": "9.3MB"}
# One layer's experts, two layers' dense matrices and the head: what solving is made of, in little.
REDUCED = {
    "scheme": "mxfp4",
    "format": "gguf",
    "draft": "drop",
    "schemes": {
        "layers.0.gate_up": "q3_k", "layers.0.down": "q3_k", "layers.0-1.dense": "q3_k",
        "head": "q3_k",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Windows of 512 tokens: how many to calibrate on, and how many held out."""

    calibration: int
    heldout: int


WINDOW = 512
FULL, LITTLE = Texts(64, 16), Texts(6, 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then write or compare. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*SIZES, "reduced"])
    parser.add_argument("--allocate", action="store_true", help="Choose recipes anew.")
    parser.add_argument("--work", type=Path, help="Keep solutions and files here, and go on there.")
    parser.add_argument("--check", action="store_true", help="Compare the reduced row.")
    options = parser.parse_args(arguments)
    stored = _stored()
    if options.check:
        problems = drift(stored["reduced"], measure_reduced())
        sys.stderr.writelines(f"{line}\n" for line in problems)
        return 1 if problems else 0
    for name in options.only or [*SIZES, "reduced"]:
        if name == "reduced":
            found = measure_reduced()
            stored = {**_stored(), "reduced": found}
        else:
            old = stored.get("rows", {}).get(name)
            with _folder(options.work, name) as work:
                row = measure_row(name, None if options.allocate else old, work)
            fresh = _stored()
            stored = {**fresh, "rows": {**fresh.get("rows", {}), name: row}}
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
    if all("solved" in stored.get("rows", {}).get(name, {}) for name in SIZES):
        PAGE.write_text(page(stored["rows"]))
    return 0


def _stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text()) if STORED.exists() else {}
    return found


def measure_reduced() -> dict[str, Any]:
    """The reduced recipe, rounded and solved, on little text."""
    with tempfile.TemporaryDirectory() as work:
        return _measure(recipe_from_table(REDUCED, "reduced"), LITTLE, {}, Path(work))


@contextmanager
def _folder(kept: Path | None, name: str) -> Iterator[Path]:
    """Where a row's files lie: in a folder that is kept, or in one that is not."""
    if kept is None:
        with tempfile.TemporaryDirectory() as work:
            yield Path(work)
    else:
        (kept / name).mkdir(parents=True, exist_ok=True)
        yield kept / name


def measure_row(name: str, old: Mapping[str, Any] | None, work: Path) -> dict[str, Any]:
    """A row of the table; `old` has the recipe to use, and llama.cpp's figures without it."""
    recipe = _allocated(SIZES[name], work) if old is None else _read_recipe(old)
    peer = llama_file(name, work)
    files = {} if peer is None else {"llama.cpp": peer}
    row: dict[str, Any] = {
        "recipe": recipe.as_dict(),
        "bytes": v4quant.plan_quantize(TINY, work / "planned", recipe=recipe).bytes_out,
        "heldout_tokens": FULL.heldout * WINDOW,
        "calibration_tokens": FULL.calibration * WINDOW,
        **_measure(recipe, FULL, files, work),
    }
    if peer is not None:
        import llama_cpp

        row["llama.cpp"] |= {"bytes": peer.stat().st_size, "version": llama_cpp.__version__}
    elif old is not None:
        row["llama.cpp"] = old["llama.cpp"]
    return row


def _read_recipe(row: Mapping[str, Any]) -> Recipe:
    return recipe_from_table(row["recipe"], "stored")


def _allocated(budget: str, work: Path) -> Recipe:
    """What `allocate --dense all --measure-kl --draft drop` chooses on the calibration text."""
    found = v4quant.allocate(
        TINY, work / "recipe.toml", budget=budget, dense="all", draft="drop", measure_kl=True,
        corpus=CALIBRATION,
    )  # fmt: skip
    return found.found.recipe


def _measure(
    recipe: Recipe, texts: Texts, others: Mapping[str, Path], work: Path
) -> dict[str, Any]:
    """KL of the recipe rounded ("searched") and solved, and of other files."""
    solution = v4quant.calibrate(
        TINY, work / "solution", recipe=recipe, corpus=CALIBRATION,
        tokens=texts.calibration * WINDOW, seq_len=WINDOW, min_tokens=1,
    )  # fmt: skip
    files = dict(others)
    for name, solver, stats in (("searched", "optimal", None), ("solved", "gptq", solution.path)):
        wanted = replace(recipe, solver=solver)
        v4quant.quantize(TINY, work / name, recipe=wanted, stats=stats, workers=1)
        files[name] = work / name
    first, *rest = files.values()
    found = v4quant.evaluate(
        first, reference=TINY, candidates=rest, corpus=HELDOUT, tokens=texts.heldout * WINDOW,
        seq_len=WINDOW, weights=False,
    )  # fmt: skip
    return {name: figures(one) for name, one in zip(files, (found, *found.others), strict=True)}


def llama_file(name: str, work: Path) -> Path | None:
    """llama.cpp's own file of a type, without importance matrix; None without its package."""
    try:
        import llama_cpp
    except (ImportError, RuntimeError, OSError):
        return None
    v4quant.quantize(TINY, work / "exact", scheme="mxfp4", format="gguf", draft="drop", workers=1)
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    parameters.nthread, parameters.allow_requantize = 1, True
    out = work / f"{name}.gguf"
    (model,) = (work / "exact").glob("*.gguf")
    paths = (os.fsencode(model), os.fsencode(out))
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {name}")
    return out


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    first = rows["Q2_K"]
    version = first["llama.cpp"]["version"]
    lines = [
        "# GGUF files compared with llama.cpp's own",
        "",
        "Mean KL divergence from the source, in nats per token, of whole files of the built-in",
        f"tiny V4 (its trunk), over {first['heldout_tokens']:,} tokens of prose and code held",
        f"out from the {first['calibration_tokens']:,} calibration tokens. llama.cpp's files",
        f"come from its own quantizer (llama-cpp-python {version}) without an importance",
        "matrix, starting from our exact MXFP4 file. Ours are no larger:",
        "`allocate --dense all --measure-kl` chose a type for each place within the size,",
        "rounded once by the encoder (searched) and once solved (`calibrate --recipe`).",
        "All files are scored by our forward pass in float32. `scripts/quality_gguf.py`",
        "writes this page; quality-gguf.json beside it has the recipes.",
        "",
        "| llama.cpp's type | its MB | its KL | our MB | searched | solved | solved / llama.cpp |",
        "|---|---:|---|---:|---|---|---:|",
    ]
    quality = []
    for name in SIZES:
        row = rows[name]
        peer, searched, solved = row["llama.cpp"], row["searched"], row["solved"]
        cells = [f"{r['kl']:.5f} ± {r['kl_stderr']:.5f}" for r in (peer, searched, solved)]
        ratio = solved["kl"] / peer["kl"]
        lines.append(
            f"| {name} | {peer['bytes'] / 1e6:.2f} | {cells[0]} | {row['bytes'] / 1e6:.2f} "
            f"| {cells[1]} | {cells[2]} | {ratio:.2f} |"
        )
        figures = [f"{r['perplexity']:.3f}, {r['top1']:.2%}" for r in (peer, searched, solved)]
        quality.append(f"| {name} | " + " | ".join(figures) + " |")
    lines += [
        "", "Perplexity and top-1 agreement with the source:", "",
        "| size of | llama.cpp | searched | solved |", "|---|---|---|---|", *quality, "",
        "To reproduce one row (`evaluate` scores any of these files):", "",
        "```",
        "v4quant allocate builtin:tiny-v4 --out q2.toml --budget 9.3MB --dense all --measure-kl \\",
        "    --draft drop --corpus builtin:calibration",
        "v4quant calibrate builtin:tiny-v4 --recipe q2.toml --out solved \\",
        "    --corpus builtin:calibration --tokens 32768 --seq-len 512",
        "v4quant quantize builtin:tiny-v4 out --recipe q2.toml --stats solved",
        "v4quant evaluate out --reference builtin:tiny-v4 --corpus builtin:heldout \\",
        "    --tokens 8192 --seq-len 512",
        "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
