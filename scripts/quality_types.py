"""The GGUF types one by one: KL of the tiny V4 with only its experts in a type, against bits.

    scripts/quality_types.py iq2_xxs            searched and solved, into the stored figures
    scripts/quality_types.py iq2_xxs --ggml-lib libggml-base.so      and llama.cpp's encoder
    scripts/quality_types.py iq2_xxs --work DIR  keep statistics and solutions, and go on there
    scripts/quality_types.py iq3_xxs --tokens 24576       score all its ways on more text
    scripts/quality_types.py --page             docs/quality-types.md and .svg from what is stored
    scripts/quality_types.py --check            a reduced row again, compared with the stored one

searched: the encoder, weighed by the inputs' second moments, gain restored. solved: error feedback,
refinement and propagation. llama.cpp: `ggml_quantize_chunk` on the same experts with the same
importance (an importance matrix holds the same mean squares). All are whole GGUF files, scored by
our forward on held-out text; a type's figures are stored as soon as they are measured.
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

from quality_table import STORED as QUALITY
from script_tools.curve import Curve, Dot, draw
from script_tools.figures import drift, figures
from script_tools.ggml_library import quantizer
from script_tools.work import work_folder
from torch import Tensor

import v4quant
from v4quant.builtin import CALIBRATION, HELDOUT
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
STORED = ROOT / "v4quant" / "data" / "measured" / "quality-types.json"
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
    parser.add_argument("--tokens", type=int, default=FULL[1] * WINDOW, help="Held-out tokens.")
    parser.add_argument("--work", type=Path, help="Keep what is made here, and go on there.")
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
    with work_folder(options.work) as work:
        for name in options.types:
            found = measure(name, ways, options.ggml_lib, work, options.tokens)
            stored = read_stored()
            row = {"bits": get_scheme(name).bits_per_weight, **stored["types"].get(name, {})}
            write_stored({**stored, "types": {**stored["types"], name: {**row, **found}}})
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


def measure(
    name: str, ways: Sequence[str], library: Path | None, work: Path, heldout: int
) -> dict[str, dict[str, Any]]:
    """Figures of the experts in one type, by way, on so many held-out tokens."""
    calibration = FULL[0] * WINDOW
    first, *rest = [export(calibration, name, way, library, work) for way in ways]
    found = v4quant.evaluate(
        first, reference=TINY, candidates=rest, corpus=HELDOUT, tokens=heldout, seq_len=WINDOW,
        weights=False,
    )  # fmt: skip
    tokens = {"tokens": [calibration, heldout]}
    scored = zip(ways, (found, *found.others), strict=True)
    return {way: {**figures(one), **tokens} for way, one in scored}


def export(tokens: int, name: str, way: str, library: Path | None, work: Path) -> Path:
    """A GGUF file whose experts have the type, everything else as in the source."""
    solve = name if way == "solved" else None
    known, out = work / (f"solution-{name}" if solve else "statistics"), work / f"{name}-{way}"
    if solve or not known.exists():  # a solution resumes; statistics serve every type
        v4quant.calibrate(
            TINY, known, solve=solve, corpus=CALIBRATION, tokens=tokens, seq_len=WINDOW,
            min_tokens=1,
        )  # fmt: skip
    with peer_encoder(library if way == "llama.cpp" else None):
        v4quant.quantize(
            TINY, out, scheme=name, format="gguf", solver="gptq" if solve else "optimal",
            draft="drop", stats=known, workers=1,
        )  # fmt: skip
    return out


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
        f"routed experts in a type. Every figure is of 8,192 tokens{_longer(rows)} of prose and",
        "code that calibration (32,768 tokens) never saw; ± one standard error. llama.cpp: its own",
        "encoder with the same importance (0.3.36 of its Python package). Searched: our encoder,",
        "gain restored. Solved: error feedback, refinement, propagation, gain restored.",
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
    return "\n".join([*lines, *_integers(rows), ""])


def _longer(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Which types were scored on more text, where fewer tokens left open who is better."""
    tokens = {n: max(r[w]["tokens"][1] for w in WAYS if w in r) for n, r in rows.items()}
    told = [f"`{n}`: {t:,}" for n, t in tokens.items() if t > FULL[1] * WINDOW]
    return f" ({', '.join(told)})" if told else ""


def _integers(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`q2_0` beside the integers that it is the GGUF form of, where both are solved."""
    if "solved" not in rows.get("q2_0", {}):
        return []
    table = json.loads(QUALITY.read_text())["full"]["rows"]
    other = next(r for r in table if (r["scheme"], r["solver"]) == ("int2-g64", "propagated"))
    return [
        "",
        "`q2_0` has the values of `int2-g64` with the sign of the scale turned. Solved, that has",
        f"{other['kl']:.5f} ± {other['kl_stderr']:.5f} on the same text",
        "([quality.md](quality.md)).",
    ]


_COLOURS = {"llama.cpp": "#b4552d", "searched": "#7a7f87", "solved": "#1f6f9f"}


def plot(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """KL against bits per weight; a type's name stands at its lowest figure."""
    lowest = {name: min((w for w in WAYS if w in r), key=lambda w: r[w]["kl"])
              for name, r in rows.items()}  # fmt: skip
    curves = []
    for way, colour in _COLOURS.items():
        dots = [
            Dot(
                row["bits"], row[way]["kl"],
                f"{name}, {way}: {row[way]['kl']:.5f} at {row['bits']:.4f}",
                name if lowest[name] == way else "",
            )
            for name, row in rows.items() if way in row
        ]  # fmt: skip
        curves.append(Curve(way, colour, dots))
    return draw(curves, "bits per weight", "KL divergence against bits per weight, by type")


if __name__ == "__main__":
    raise SystemExit(main())
