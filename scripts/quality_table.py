"""What calibration is worth: every solver on the tiny V4, against its source, on unseen text.

    scripts/quality_table.py              the whole table, into docs/quality.md and its JSON, which
                                          lies in v4quant/data/measured
    scripts/quality_table.py --reduced    two rows on little text, for the drift check
    scripts/quality_table.py --check      the reduced rows again, compared with the stored ones

Every figure is that of an exported checkpoint: solved, converted by `quantize`'s own path, read
back and scored beside the source. Calibration text and held-out text share no document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from script_tools.figures import drift, figures

import v4quant
from v4quant.builtin import CALIBRATION, HELDOUT, resolve_corpus
from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solve import solve
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import get_scheme

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "v4quant" / "data" / "tiny-v4"
STORED = ROOT / "v4quant" / "data" / "measured" / "quality.json"
PAGE = ROOT / "docs" / "quality.md"
WINDOW = 512
SCHEMES = ("int4-g32", "int4-g128", "int3-g128", "int2-g64")
SOLVERS = ("rtn", "optimal", "gptq", "refined", "propagated")
LABELS = {
    "rtn": "largest magnitude",
    "optimal": "optimal scales",
    "gptq": "GPTQ",
    "refined": "+ refinement",
    "propagated": "+ propagation",
}


@dataclass(frozen=True)
class Setting:
    """How much text, and which rows."""

    calibration: int
    heldout: int
    schemes: tuple[str, ...]
    solvers: tuple[str, ...]


FULL = Setting(64, 16, SCHEMES, SOLVERS)
REDUCED = Setting(6, 4, ("int2-g64",), ("optimal", "propagated"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then write or compare. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reduced", action="store_true", help="Only the reduced rows; store them.")
    parser.add_argument(
        "--check", action="store_true", help="Compare reduced rows with stored ones."
    )
    options = parser.parse_args(arguments)
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if options.check:
        problems = drift(by_name(stored["reduced"]), by_name(measure(REDUCED)))
        sys.stderr.writelines(f"{line}\n" for line in problems)
        return 1 if problems else 0
    stored["reduced"] = measure(REDUCED)
    if not options.reduced:
        stored["full"] = measure(FULL)
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
    if "full" in stored:
        PAGE.write_text(page(stored["full"]))
    return 0


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a table by scheme and solver."""
    return {f"{row['scheme']} {row['solver']}": row for row in found["rows"]}


def measure(setting: Setting) -> dict[str, Any]:
    """All rows of a setting, with the noise floor and the text they were measured on."""
    with tempfile.TemporaryDirectory() as work:
        made = [
            (scheme, solver, _export(setting.calibration, scheme, solver, Path(work)))
            for scheme in setting.schemes
            for solver in setting.solvers
        ]
        first, *others = (folder for *_, folder in made)
        found = v4quant.evaluate(
            first, reference=TINY, candidates=others, **text(HELDOUT, setting.heldout),
            weights=False,
        )  # fmt: skip
    assert found.floor is not None and found.reference_perplexity is not None
    rows = [
        {
            "scheme": scheme,
            "solver": solver,
            "bits": round(one.candidate.expert_bits_per_weight or 0.0, 3),
            **figures(one),
        }
        for (scheme, solver, _), one in zip(made, (found, *found.others), strict=True)
    ]
    return {
        "calibration_tokens": setting.calibration * WINDOW,
        "heldout_tokens": setting.heldout * WINDOW,
        "floor_kl": found.floor.kl_mean,
        "reference_perplexity": found.reference_perplexity.value,
        "rows": rows,
    }


def text(name: str, windows: int) -> dict[str, Any]:
    """The first windows of a built-in text, as `calibrate` and `evaluate` are asked for them."""
    return {"corpus": name, "tokens": windows * WINDOW, "seq_len": WINDOW}


def _export(windows: int, scheme: str, solver: str, work: Path) -> Path:
    """One exported checkpoint."""
    found, out = work / f"{scheme}-{solver}.found", work / f"{scheme}-{solver}"
    given = text(CALIBRATION, windows)
    if solver == "gptq":
        _without_refinement(scheme, given, found)
    elif solver in ("refined", "propagated"):
        v4quant.calibrate(
            TINY, found, solve=scheme, propagate=solver == "propagated", min_tokens=1, **given
        )
    else:
        found = work / "moments"
        if not found.exists():
            v4quant.calibrate(TINY, found, min_tokens=1, **given)
    chosen = solver if solver in ("rtn", "optimal") else "gptq"
    v4quant.quantize(TINY, out, scheme=scheme, solver=chosen, stats=found, workers=1)
    return out


def _without_refinement(scheme: str, given: dict[str, Any], out: Path) -> None:
    """GPTQ alone, which the program does not offer: the column shows what refinement adds."""
    with open_checkpoint(TINY) as source:
        config = parse_model_config(dict(source.config), "config.json")
        request = CorpusRequest(
            given["seq_len"], given["tokens"], config.bos_token_id, config.vocab_size
        )
        corpus = load_corpus(resolve_corpus([given["corpus"]]), TINY / "tokenizer.json", request)
        settings = SolveSettings(get_scheme(scheme), False, 0)
        options, silent = ForwardOptions(), SilentProgress()
        solve(source, config, corpus.windows, options, 1, settings, out, silent).close()


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# What calibration is worth",
        "",
        "Mean KL divergence from the source, nats per token, of the built-in tiny V4 with only its",
        f"routed experts converted; {found['heldout_tokens']:,} tokens of prose and code that",
        f"calibration ({found['calibration_tokens']:,} tokens) never saw. The noise floor (same",
        f"weights, another legitimate rounding) is {found['floor_kl']:.5f}; the source's",
        f"perplexity is {found['reference_perplexity']:.3f}.",
        "`scripts/quality_table.py` writes this page. The columns GPTQ and + refinement were",
        "measured before rows got their gain back (calibration.md).",
        "",
        "| scheme | bits per weight | " + " | ".join(LABELS[s] for s in SOLVERS) + " |",
        "|---|---|" + "---|" * len(SOLVERS),
    ]
    ppl = []
    for scheme in SCHEMES:
        rows = {r["solver"]: r for r in found["rows"] if r["scheme"] == scheme}
        start = f"| {scheme} | {rows['rtn']['bits']} | "
        cells = [f"{rows[s]['kl']:.5f} ± {rows[s]['kl_stderr']:.5f}" for s in SOLVERS]
        lines.append(start + " | ".join(cells) + " |")
        ppl.append(start + " | ".join(f"{rows[s]['perplexity']:.3f}" for s in SOLVERS) + " |")
    lines += ["", "Perplexity on the same text:", "", *lines[10:12], *ppl, ""]
    lines += ["Mean KL of each part of the text, with optimal scales and with all there is:", ""]
    parts = sorted(found["rows"][0]["parts"])
    lines += ["| scheme | " + " | ".join(f"{part}: optimal, all" for part in parts) + " |"]
    lines += ["|---|" + "---|" * len(parts)]
    for scheme in SCHEMES:
        plain, best = (
            next(r["parts"] for r in found["rows"] if (r["scheme"], r["solver"]) == (scheme, s))
            for s in ("optimal", SOLVERS[-1])
        )
        cells = [f"{plain[part]:.5f}, {best[part]:.5f}" for part in parts]
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
