"""The GGUF types one by one: KL of the tiny V4 with only its experts in a type, against bits.

    scripts/quality_types.py iq2_xxs            searched and solved, into docs/quality-types.json
    scripts/quality_types.py iq2_xxs --ggml-lib libggml-base.so      and llama.cpp's encoder
    scripts/quality_types.py --page             docs/quality-types.md and .svg from what is stored
    scripts/quality_types.py --check            a reduced row again, compared with the stored one

searched: the encoder, weighed by the inputs' second moments, gain restored. solved: error feedback,
refinement and propagation. llama.cpp: `ggml_quantize_chunk` on the same experts with the same
importance (an importance matrix holds the same mean squares). All are whole GGUF files, scored by
our forward on held-out text; each figure is stored as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from script_tools.figures import drift, figures
from script_tools.ggml_library import quantizer
from torch import Tensor

import v4quant
from v4quant.builtin import CALIBRATION, HELDOUT
from v4quant.evaluation.report import svg
from v4quant.recipe import recipe_from_table
from v4quant_calibration.rounding.measure import measured
from v4quant_calibration.rounding.solvers import SOLVERS
from v4quant_kernels import codec
from v4quant_kernels.ggml_types import GGML_TYPES
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scale_search import QuantizedMatrix
from v4quant_kernels.scheme import Scheme, get_scheme

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "v4quant" / "data" / "tiny-v4"
STORED = ROOT / "docs" / "quality-types.json"
PAGE = ROOT / "docs" / "quality-types.md"
PLOT = ROOT / "docs" / "quality-types.svg"
TYPES = [t.name for t in GGML_TYPES.values() if t.offered and t.coder]
WAYS = ("llama.cpp", "searched", "solved")
WINDOW = 512
FULL, LITTLE = (64, 16), (6, 4)
# One layer's experts in a type with vectors of eight and one with vectors of four.
REDUCED = {
    "scheme": "mxfp4", "format": "gguf", "draft": "drop",
    "schemes": {"layers.2.gate_up": "iq2_xxs", "layers.2.down": "iq3_xxs"},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and store, draw the page, or compare. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", choices=[[], *TYPES], metavar="TYPE")
    parser.add_argument("--way", action="append", choices=WAYS[1:], help="Only this.")
    parser.add_argument("--ggml-lib", type=Path, help="Measure llama.cpp's encoder as well.")
    parser.add_argument("--reduced", action="store_true", help="Store the reduced row.")
    parser.add_argument("--check", action="store_true", help="Compare the reduced row.")
    parser.add_argument("--page", action="store_true", help="Write the page and the plot.")
    options = parser.parse_args(arguments)
    stored = read_stored()
    if options.check or options.reduced:
        found = measure_reduced()
        if options.check:
            problems = drift(stored["reduced"], found)
            sys.stderr.writelines(f"{line}\n" for line in problems)
            return 1 if problems else 0
        write_stored({**stored, "reduced": found})
    ways = [*(["llama.cpp"] if options.ggml_lib else []), *(options.way or WAYS[1:])]
    for name in options.types:
        for way in ways:
            found = measure(name, way, FULL, options.ggml_lib)
            stored = read_stored()
            row = {"bits": get_scheme(name).bits_per_weight, **stored["types"].get(name, {})}
            write_stored({**stored, "types": {**stored["types"], name: {**row, way: found}}})
    if options.page:
        rows = read_stored()["types"]
        PAGE.write_text(page(rows))
        PLOT.write_text(plot(rows) + "\n")
    return 0


def read_stored() -> dict[str, Any]:
    """What was measured so far."""
    found: dict[str, Any] = json.loads(STORED.read_text()) if STORED.exists() else {"types": {}}
    return found


def write_stored(found: Mapping[str, Any]) -> None:
    """Keep what was measured."""
    STORED.write_text(json.dumps(found, indent=1) + "\n")


def measure_reduced() -> dict[str, Any]:
    """Figures of the reduced recipe, searched and solved, on little text."""
    recipe = recipe_from_table(REDUCED, "reduced")
    calibration, heldout = (count * WINDOW for count in LITTLE)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        solution = v4quant.calibrate(
            TINY, work / "solution", recipe=recipe, corpus=CALIBRATION, tokens=calibration,
            seq_len=WINDOW, min_tokens=1,
        )  # fmt: skip
        for way, solver in (("searched", "optimal"), ("solved", "gptq")):
            wanted = replace(recipe, solver=solver)
            v4quant.quantize(TINY, work / way, recipe=wanted, stats=solution.path, workers=1)
        first = v4quant.evaluate(
            work / "searched", reference=TINY, candidates=[work / "solved"], corpus=HELDOUT,
            tokens=heldout, seq_len=WINDOW, weights=False,
        )  # fmt: skip
        return {"searched": figures(first), "solved": figures(first.others[0])}


def measure(name: str, way: str, windows: tuple[int, int], library: Path | None) -> dict[str, Any]:
    """Figures of the experts in one type."""
    calibration, heldout = (count * WINDOW for count in windows)
    with tempfile.TemporaryDirectory() as work:
        out = export(calibration, name, way, library, Path(work))
        found = v4quant.evaluate(
            out, reference=TINY, corpus=HELDOUT, tokens=heldout, seq_len=WINDOW, weights=False
        )
    return {**figures(found), "tokens": [calibration, heldout]}


def export(tokens: int, name: str, way: str, library: Path | None, work: Path) -> Path:
    """A GGUF file whose experts have the type, everything else as in the source."""
    solve = name if way == "solved" else None
    found = v4quant.calibrate(
        TINY, work / "found", solve=solve, corpus=CALIBRATION, tokens=tokens, seq_len=WINDOW,
        min_tokens=1,
    )  # fmt: skip
    with peer_encoder(library if way == "llama.cpp" else None):
        v4quant.quantize(
            TINY, work / "out", scheme=name, format="gguf", solver="gptq" if solve else "optimal",
            draft="drop", stats=found.path, workers=1,
        )  # fmt: skip
    return work / "out"


@contextmanager
def peer_encoder(library: Path | None) -> Iterator[None]:
    """llama.cpp's encoder in place of ours, where its library is given."""
    if library is None:
        yield
        return
    encode, ours = quantizer(library), SOLVERS["optimal"]

    def theirs(
        matrix: QTensor | Tensor, scheme: Scheme, importance: Tensor | None
    ) -> QuantizedMatrix:
        values = matrix if isinstance(matrix, Tensor) else codec.dequantize(matrix)
        rows, columns = values.shape
        data = encode(values, scheme.name, importance)
        return measured(values, QTensor(scheme, (rows, columns), data))

    SOLVERS["optimal"] = theirs
    try:
        yield
    finally:
        SOLVERS["optimal"] = ours


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown, by bits."""
    lines = [
        "# GGUF types one by one",
        "",
        "Mean KL divergence from the source, nats per token, of the built-in tiny V4 with only its",
        "routed experts in a type. Every figure is of 8,192 tokens of prose and code that",
        "calibration (32,768 tokens) never saw; ± one standard error. llama.cpp: its own encoder",
        "with the same importance (0.3.36 of its Python package). Searched: our encoder, gain",
        "restored. Solved: error feedback, refinement, propagation, gain restored.",
        "`scripts/quality_types.py` writes this page.",
        "",
        "![KL against bits per weight](quality-types.svg)",
        "",
        "| type | bits per weight | llama.cpp | searched | solved | solved / llama.cpp |",
        "|---|---:|---|---|---|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["bits"]):
        cells = [
            f"{row[way]['kl']:.5f} ± {row[way]['kl_stderr']:.5f}" if way in row else ""
            for way in WAYS
        ]
        both = "llama.cpp" in row and "solved" in row
        ratio = f"{row['solved']['kl'] / row['llama.cpp']['kl']:.2f}" if both else ""
        lines.append(f"| `{name}` | {row['bits']:.4f} | " + " | ".join([*cells, ratio]) + " |")
    return "\n".join([*lines, ""])


_COLOURS = {"llama.cpp": "#b4552d", "searched": "#7a7f87", "solved": "#1f6f9f"}
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 660.0, 30.0, 360.0


def plot(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """KL, on a logarithmic axis, against bits per weight."""
    values = [row[way]["kl"] for row in rows.values() for way in WAYS if way in row]
    bits = [row["bits"] for row in rows.values()]
    axis = svg.log_axis(values, _BOTTOM, _TOP)
    low, high = min(bits) - 0.2, max(bits) + 0.2
    style = "text{font:12px sans-serif;fill:#444}.grid{stroke:#ddd}.axis{font-size:13px}"
    for index, colour in enumerate(_COLOURS.values()):
        style += f".w{index}{{fill:{colour}}}.l{index}{{fill:none;stroke:{colour}}}"
    parts = [f"<style>{style}</style>"]
    for value, told in axis.ticks():
        parts.append(svg.line(_LEFT, axis(value), _RIGHT, axis(value), "grid"))
        parts.append(svg.label(_LEFT - 8, axis(value) + 4, told, "tick", "end"))

    def across(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT)

    for index, way in enumerate(WAYS):
        known = sorted((r["bits"], r[way]["kl"], name) for name, r in rows.items() if way in r)
        spots = [(across(b), axis(kl)) for b, kl, _ in known]
        if len(spots) > 1:
            parts.append(svg.polyline(spots, f"l{index}"))
        for (x, y), (b, kl, name) in zip(spots, known, strict=True):
            parts.append(svg.circle(x, y, 4, f"w{index}", f"{name}, {way}: {kl:.5f} at {b:.4f}"))
            if way == "solved":
                parts.append(svg.label(x, y + 18, name))
        parts.append(svg.circle(_RIGHT - 110, _TOP + 8 + 18 * index, 4, f"w{index}"))
        parts.append(svg.label(_RIGHT - 98, _TOP + 12 + 18 * index, way, "tick", "start"))
    step = 0.5
    ticks = [step * i for i in range(int(low / step) + 1, int(high / step) + 1)]
    parts += [svg.label(across(t), _BOTTOM + 18, f"{t:g}") for t in ticks]
    parts.append(svg.label((_LEFT + _RIGHT) / 2, _BOTTOM + 40, "bits per weight", "axis"))
    drawn = svg.figure(700, 420, "KL divergence against bits per weight, logarithmic axis", parts)
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


if __name__ == "__main__":
    raise SystemExit(main())
