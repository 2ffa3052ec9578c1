#!/usr/bin/env python
"""What smaller types of dense matrices cost, measured on the built-in tiny V4.

    scripts/quality_dense.py            into v4quant/data/measured/quality-dense.json, for `plan`

Experts stay exact (`mxfp4`), so a row is the loss of all other matrices, embedding and head in one
type, searched without a text. `q8_0` is what everybody takes, and is measured for comparison.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import v4quant
from v4quant.builtin import HELDOUT, TINY_V4

ROOT = Path(__file__).parents[1]
STORED = ROOT / "v4quant" / "data" / "measured" / "quality-dense.json"
USUAL = "q8_0"
SMALLER = ("q6_k", "q5_k", "q4_k", "q3_k")
TOKENS, WINDOW = 8192, 512


def main() -> int:
    """Measure all types in one evaluation, and store the rows."""
    with TemporaryDirectory() as scratch:
        outs = [Path(scratch) / dense for dense in (USUAL, *SMALLER)]
        for out in outs:
            v4quant.quantize(
                TINY_V4, out, scheme="mxfp4", format="gguf", dense=out.name, draft="drop"
            )
        found = v4quant.evaluate(
            outs[0], reference=TINY_V4, candidates=outs[1:], corpus=HELDOUT, tokens=TOKENS,
            seq_len=WINDOW, weights=False,
        )  # fmt: skip
    STORED.write_text(json.dumps(table(found.as_dict()), indent=1) + "\n")
    return 0


def table(found: dict[str, Any]) -> dict[str, Any]:
    """What is stored: the usual type's row, and those of the smaller ones."""
    usual, *rows = (
        {"kl": part["kl_mean"], "top1": part["top1_agreement"]}
        for part in (found, *found["others"])
    )
    return {
        "tokens": TOKENS,
        "usual": {USUAL: usual},
        "rows": dict(zip(SMALLER, rows, strict=True)),
    }


if __name__ == "__main__":
    raise SystemExit(main())
