"""What quantizing V4.1's Engram costs, beside its experts: KL of whole files of the tiny V4.1.

    scripts/quality_v41.py                 every row, into docs/quality-v41.md and quality-v41.json
    scripts/quality_v41.py --tokens 4096   on less text

Every row is a GGUF file in which one thing is rounded and all else is exact: the Engram's tables in
one type, or the routed experts in one type; one row has the tables emptied, which is the model
without its Engram. All are scored by our forward in float32 on the built-in held-out text, in one
run beside the source.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from script_tools.figures import figures

import v4quant
from v4quant.builtin import HELDOUT, TINY_V41, resolve_source
from v4quant_kernels.ggml_types import get_type

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "docs" / "quality-v41.json"
PAGE = ROOT / "docs" / "quality-v41.md"
TABLES = ("q8_0", "q6_k", "iq4_nl", "q4_k", "iq3_s", "q3_k", "q2_k")
EXPERTS = ("q8_0", "q6_k", "q4_k", "q3_k", "q2_k")
EMPTY = "emptied"
_TABLE = "engram.embed"


def main() -> None:
    """Convert, score, write."""
    parser = argparse.ArgumentParser(description="KL of the tiny V4.1's Engram and experts by type")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens (16384)")
    tokens: int = parser.parse_args().tokens
    source = resolve_source(TINY_V41)
    with tempfile.TemporaryDirectory() as name:
        folders = conversions(source, Path(name))
        first, *others = folders.values()
        found = v4quant.evaluate(
            first,
            candidates=others,
            reference=source,
            corpus=HELDOUT,
            tokens=tokens,
            seq_len=512,
            weights=False,
        )
        assert found.floor is not None and found.reference_perplexity is not None
        rows = dict(zip(folders, (found, *found.others), strict=True))
        stored = {
            "tokens": tokens,
            "floor": found.floor.kl_mean,
            "perplexity": found.reference_perplexity.value,
            "rows": {k: row(k, folders[k], r) for k, r in rows.items()},
        }
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
    PAGE.write_text(page(stored))


def conversions(source: Path, work: Path) -> dict[str, Path]:
    """Row -> folder: "engram q4_k", "experts q4_k", "engram emptied"."""
    folders = {}
    for kind in TABLES:
        folders[f"engram {kind}"] = work / f"engram-{kind}"
        v4quant.quantize(
            source, work / f"engram-{kind}", scheme="mxfp4", format="gguf", engram=kind
        )
    for kind in EXPERTS:
        folders[f"experts {kind}"] = work / f"experts-{kind}"
        v4quant.quantize(source, work / f"experts-{kind}", scheme=kind, format="gguf")
    folders[f"engram {EMPTY}"] = empty_tables(source, work / EMPTY)
    return folders


def empty_tables(source: Path, out: Path) -> Path:
    """The checkpoint with zeros in its Engram tables, so that nothing is added to the streams."""
    shutil.copytree(source, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name in {file for tensor, file in index.items() if f".{_TABLE}.weight" in tensor}:
        tensors = load_file(out / name)
        for tensor, value in tensors.items():
            if tensor.endswith(f"{_TABLE}.weight"):
                tensors[tensor] = (value.float() * 0).to(value.dtype)
        save_file(tensors, out / name, metadata={"format": "pt"})
    return out


def row(name: str, folder: Path, result: v4quant.Evaluation) -> dict[str, Any]:
    """What the page keeps of one file: its figures, and the weights' own error."""
    group, kind = name.split()
    kept = figures(result)
    if kind == EMPTY:
        return {**kept, "bits": 0.0, "error": 1.0}
    mark = _TABLE if group == "engram" else ".ffn.experts."
    manifest = json.loads((folder / "v4quant.json").read_text())["tensors"]
    errors = [r.get("relative_rms", 0.0) for r in manifest if mark in r["module"]]
    return {
        **kept,
        "bits": get_type(kind).bits_per_weight,
        "error": sum(e * e for e in errors) ** 0.5 / len(errors) ** 0.5,
    }


def page(stored: dict[str, Any]) -> str:
    """docs/quality-v41.md."""
    rows = stored["rows"]
    lines = [_HEAD.format(**stored)]
    lines += ["| Engram | bits per weight | error | mean KL | top-1 | perplexity |"]
    lines += ["|---|---:|---:|---|---:|---:|"]
    lines += [_line(k.split()[1], rows[k]) for k in rows if k.startswith("engram ")]
    lines += ["", "| experts | bits per weight | error | mean KL | top-1 | perplexity |"]
    lines += ["|---|---:|---:|---|---:|---:|"]
    lines += [_line(k.split()[1], rows[k]) for k in rows if k.startswith("experts ")]
    return "\n".join([*lines, "", *_conclusion(rows)]) + "\n"


def _line(name: str, r: dict[str, Any]) -> str:
    return (
        f"| {name} | {r['bits']:.4g} | {100 * r['error']:.2f}% | "
        f"{r['kl']:.2e} ± {r['kl_stderr']:.0e} | {100 * r['top1']:.2f}% | {r['perplexity']:.2f} |"
    )


_HEAD = """# What quantizing V4.1's Engram costs

Mean KL divergence from the source, nats per token, of files of the built-in tiny V4.1 on
{tokens:,} held-out tokens of prose and code. In every file one thing is rounded and all
else is exact. Errors are relative RMS of the weights themselves. The source's perplexity
is {perplexity:.2f}, and the noise floor (the same weights, streams rounded) {floor:.1e}
nats. `emptied` has zeros for tables: it is the model without its Engram, the most that any
type can cost. `scripts/quality_v41.py` writes this page.
"""


def _conclusion(rows: dict[str, Any]) -> list[str]:
    """What the tables say, in numbers of their own."""
    empty = rows[f"engram {EMPTY}"]
    times = {k: rows[f"experts {k}"]["kl"] / rows[f"engram {k}"]["kl"] for k in ("q4_k", "q3_k")}
    worth = {k: 100 * rows[f"engram {k}"]["kl"] / empty["kl"] for k in ("q8_0", "q4_k", "q3_k")}
    return [
        f"At 4.5 bits (`q4_k`) the experts cost {times['q4_k']:.1f} times what the tables do, at",
        f"3.4 bits (`q3_k`) {times['q3_k']:.1f} times. The tables together are worth",
        f"{empty['kl']:.2g} nats here:",
        f"8.5 bits lose {worth['q8_0']:.1f}% of that, 4.5 bits {worth['q4_k']:.1f}%, 3.4 bits",
        f"{worth['q3_k']:.1f}%. The released model's tables are a quarter of its parameters and",
        "were trained with it from the start, while these were added late to a model that had",
        "learned without; how much more they are worth there, no small model tells.",
    ]


if __name__ == "__main__":
    main()
