"""GGUF files of the tiny V4 beside llama.cpp's own quantizer: bytes and KL of whole models.

    scripts/quality_gguf.py               every row, into docs/quality-gguf.md and quality-gguf.json
    scripts/quality_gguf.py --only Q2_K   one row, the others as stored
    scripts/quality_gguf.py --allocate    choose the recipes anew; else the stored ones are used
    scripts/quality_gguf.py --page        the page and the plot from what is stored
    scripts/quality_gguf.py --check       a reduced row again, compared with the stored one

A row has a size in bytes, that of llama.cpp's file of the type named; our files have no more. The
recipe is `allocate`'s for that size, rounded by the encoder alone and solved. llama.cpp's files are
made by its Python package where that is installed, else the stored figures stand, with the version
they are of. For its IQ types it gets an importance matrix of the same text, and ours are solved
only. Where our recipe has types that are not searched without a text, that matrix is our encoder's.
All are scored by our forward on the same held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from script_tools.curve import Curve, Dot, draw
from script_tools.figures import drift, figures
from script_tools.llama_files import quantized_file
from script_tools.work import work_folder

import v4quant
from v4quant import Recipe
from v4quant.builtin import CALIBRATION, HELDOUT
from v4quant.recipe import recipe_from_table

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "v4quant" / "data" / "tiny-v4"
STORED = ROOT / "docs" / "quality-gguf.json"
PAGE = ROOT / "docs" / "quality-gguf.md"
PLOT = ROOT / "docs" / "quality-gguf.svg"
_COLOURS = {"llama.cpp": "#b4552d", "searched": "#7a7f87", "solved": "#1f6f9f"}
WAYS = tuple(_COLOURS)


@dataclass(frozen=True)
class Rival:
    """llama.cpp's file of a type: a size that it does not go below, and whether it is made with an
    importance matrix."""

    size: str
    imatrix: bool = False

    @property
    def ways(self) -> tuple[str, ...]:
        """How ours of that size are measured; searching codebooks for a whole file takes long."""
        return WAYS[2:] if self.imatrix else WAYS[1:]


RIVALS = {
    "Q6_K": Rival("20.3MB"), "Q4_K_M": Rival("14.6MB"), "Q3_K_M": Rival("11.8MB"),
    "Q2_K": Rival("9.3MB"), "IQ3_XXS": Rival("9.86MB", True), "IQ2_M": Rival("8.48MB", True),
    "IQ2_XS": Rival("7.73MB", True), "IQ2_XXS": Rival("7.04MB", True),
    "IQ1_M": Rival("6.17MB", True),
}  # fmt: skip
# One layer's experts, two layers' dense matrices (one in a codebook), the head: what solving is
# made of, in little.
REDUCED = {
    "scheme": "mxfp4",
    "format": "gguf",
    "draft": "drop",
    "schemes": {
        "layers.0.gate_up": "q3_k", "layers.0.down": "q3_k", "layers.0.dense": "q3_k",
        "layers.1.dense": "iq3_s", "head": "q3_k",
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
    parser.add_argument("--only", action="append", choices=[*RIVALS, "reduced"])
    parser.add_argument("--allocate", action="store_true", help="Choose recipes anew.")
    parser.add_argument("--work", type=Path, help="Keep solutions and files here, and go on there.")
    parser.add_argument("--check", action="store_true", help="Compare the reduced row.")
    parser.add_argument("--page", action="store_true", help="Only write the page and the plot.")
    options = parser.parse_args(arguments)
    stored = _stored()
    if options.check:
        problems = drift(stored["reduced"], measure_reduced())
        sys.stderr.writelines(f"{line}\n" for line in problems)
        return 1 if problems else 0
    with work_folder(options.work) as work:
        for name in [] if options.page else options.only or [*RIVALS, "reduced"]:
            if name == "reduced":
                stored = {**_stored(), "reduced": measure_reduced()}
            else:
                old = stored.get("rows", {}).get(name)
                row = measure_row(name, None if options.allocate else old, work)
                fresh = _stored()
                stored = {**fresh, "rows": {**fresh.get("rows", {}), name: row}}
            STORED.write_text(json.dumps(stored, indent=1) + "\n")
    PAGE.write_text(page(stored["rows"]))
    PLOT.write_text(plot(stored["rows"]) + "\n")
    return 0


def _stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text()) if STORED.exists() else {}
    return found


def measure_reduced() -> dict[str, Any]:
    """The reduced recipe, rounded and solved, on little text."""
    with tempfile.TemporaryDirectory() as work:
        return _measure(recipe_from_table(REDUCED, "reduced"), WAYS[1:], LITTLE, {}, Path(work))


def measure_row(name: str, old: Mapping[str, Any] | None, shared: Path) -> dict[str, Any]:
    """A row of the table; `old` has the recipe to use, and llama.cpp's figures without it."""
    rival, work = RIVALS[name], shared / name
    work.mkdir(exist_ok=True)
    recipe = _allocated(rival.size, work) if old is None else _read_recipe(old)
    stats = _importance(shared) if recipe.asking_text("needed") else None
    peer = quantized_file(TINY, name, _importance(shared) if rival.imatrix else None, work)
    files = {} if peer is None else {"llama.cpp": peer}
    row: dict[str, Any] = {
        "recipe": recipe.as_dict(),
        "bytes": v4quant.plan_quantize(
            TINY, work / "planned", recipe=recipe, stats=stats
        ).bytes_out,
        "searched_with_text": stats is not None,
        "heldout_tokens": FULL.heldout * WINDOW,
        "calibration_tokens": FULL.calibration * WINDOW,
        **_measure(recipe, rival.ways, FULL, files, work, stats),
    }
    if peer is not None:
        import llama_cpp

        row["llama.cpp"] |= {"bytes": peer.stat().st_size, "version": llama_cpp.__version__}
    elif old is not None:
        row["llama.cpp"] = old["llama.cpp"]
    return row


def _read_recipe(row: Mapping[str, Any]) -> Recipe:
    return recipe_from_table(row["recipe"], "stored")


def _importance(work: Path) -> Path:
    """What the calibration text says of inputs, as llama.cpp reads it."""
    imatrix = work / "imatrix.gguf"
    if not imatrix.exists():
        v4quant.calibrate(
            TINY, work / "statistics", corpus=CALIBRATION, tokens=FULL.calibration * WINDOW,
            seq_len=WINDOW, min_tokens=1, imatrix=imatrix,
        )  # fmt: skip
    return imatrix


def _allocated(budget: str, work: Path) -> Recipe:
    """What `allocate --dense all --measure-kl --draft drop` chooses on the calibration text."""
    found = v4quant.allocate(
        TINY, work / "recipe.toml", budget=budget, dense="all", draft="drop", measure_kl=True,
        corpus=CALIBRATION,
    )  # fmt: skip
    return found.found.recipe


def _measure(
    recipe: Recipe,
    ways: Sequence[str],
    texts: Texts,
    others: Mapping[str, Path],
    work: Path,
    stats: Path | None = None,
) -> dict[str, Any]:
    """KL of the recipe, rounded ("searched", with statistics if given) or solved, and of others."""
    solution = v4quant.calibrate(
        TINY, work / "solution", recipe=recipe, corpus=CALIBRATION,
        tokens=texts.calibration * WINDOW, seq_len=WINDOW, min_tokens=1,
    )  # fmt: skip
    files = dict(others)
    for way in ways:
        solver, known = ("gptq", solution.path) if way == "solved" else ("optimal", stats)
        wanted = replace(recipe, solver=solver)
        v4quant.quantize(TINY, work / way, recipe=wanted, stats=known, workers=1)
        files[way] = work / way
    first, *rest = files.values()
    found = v4quant.evaluate(
        first, reference=TINY, candidates=rest, corpus=HELDOUT, tokens=texts.heldout * WINDOW,
        seq_len=WINDOW, weights=False,
    )  # fmt: skip
    return {name: figures(one) for name, one in zip(files, (found, *found.others), strict=True)}


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as Markdown."""
    first = rows["Q2_K"]
    version = first["llama.cpp"]["version"]
    lines = [
        "# GGUF files compared with llama.cpp's own",
        "",
        "Mean KL divergence from the source, in nats per token, of whole files of the built-in",
        f"tiny V4 (its trunk), over {first['heldout_tokens']:,} tokens of prose and code held",
        f"out from the {first['calibration_tokens']:,} calibration tokens. llama.cpp's files",
        f"come from its own quantizer (llama-cpp-python {version}), starting from our exact",
        "MXFP4 file, without an importance matrix where the row does not say otherwise; then it",
        "is that of `calibrate --imatrix` on the calibration text. Ours are no larger:",
        "`allocate --dense all --measure-kl` chose a type for each place within the size,",
        "rounded once by the encoder (searched; with that importance matrix where the recipe has",
        "`iq1` types, which are refused without) and once solved (`calibrate --recipe`).",
        "All files are scored by our forward pass in float32. `scripts/quality_gguf.py`",
        "writes this page; quality-gguf.json beside it has the recipes.",
        "",
        "![KL against size of the file](quality-gguf.svg)",
        "",
        "| llama.cpp's type | its MB | its KL | our MB | searched | solved | solved / llama.cpp |",
        "|---|---:|---|---:|---|---|---:|",
    ]
    quality = []
    for name, rival in RIVALS.items():
        if (row := rows.get(name)) is None:
            continue
        peer, ratio = row["llama.cpp"], row["solved"]["kl"] / row["llama.cpp"]["kl"]
        found = [row.get(way) for way in WAYS]
        cells = [f"{r['kl']:.5f} ± {r['kl_stderr']:.5f}" if r else "" for r in found]
        if cells[1] and row.get("searched_with_text"):
            cells[1] += " (imatrix)"
        told = f"{name}, imatrix" if rival.imatrix else name
        lines.append(
            f"| {told} | {peer['bytes'] / 1e6:.2f} | {cells[0]} | {row['bytes'] / 1e6:.2f} "
            f"| {cells[1]} | {cells[2]} | {ratio:.2f} |"
        )
        cells = [f"{r['perplexity']:.3f}, {r['top1']:.2%}" if r else "" for r in found]
        quality.append(f"| {told} | " + " | ".join(cells) + " |")
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


def plot(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """KL against size; llama.cpp's dots have the names of its types."""
    theirs: dict[bool, list[Dot]] = {False: [], True: []}
    ours: dict[str, list[Dot]] = {way: [] for way in WAYS[1:]}
    for name, row in rows.items():
        for way in WAYS:
            if way not in row:
                continue
            own = way != "llama.cpp"
            kl, size = row[way]["kl"], (row if own else row[way])["bytes"] / 1e6
            tip = f"{name}, {way}: {kl:.5f} at {size:.2f} MB"
            dots = ours[way] if own else theirs[RIVALS[name].imatrix]
            dots.append(Dot(size, kl, tip, "" if own else name, slanting=True))
    curves = [
        Curve("llama.cpp", _COLOURS["llama.cpp"], theirs[False]),
        Curve("llama.cpp, imatrix", "#8a3f9f", theirs[True]),
        *(Curve(way, _COLOURS[way], ours[way]) for way in WAYS[1:]),
    ]
    return draw(curves, "size of the file, MB", "KL divergence against size of whole files")


if __name__ == "__main__":
    raise SystemExit(main())
