"""`v4quant evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import v4quant
from v4quant.builtin import MIXED_HELDOUT
from v4quant.cli import _exit, _output
from v4quant.cli._options import corpus_options, products_option, threads_option
from v4quant.cli._types import SOURCE
from v4quant_calibration.defaults import MOST_FLOORS


@click.command(epilog="Example: v4quant evaluate out --reference DeepSeek-V4-Flash --report r.html")
@click.argument("source", type=SOURCE)
@click.option("--reference", type=SOURCE, help="Compare with this checkpoint.")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Folder of a LoRA adapter, merged into the reference (without one: into SOURCE).",
)
@click.option("--candidate", "others", type=SOURCE, multiple=True, help="Another conversion to "
              "score in the same run; may be repeated.")  # fmt: skip
@corpus_options(MIXED_HELDOUT)
@products_option("kernels")
@click.option("--save-logits", type=click.Path(path_type=Path), help="Write SOURCE's "
              "logits; FILE.kld: as llama.cpp's base file.")  # fmt: skip
@click.option("--save-top-k", type=click.IntRange(min=5), help="Save only the K most probable "
              "tokens of each position.")  # fmt: skip
@click.option("--reference-logits", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Compare with logits saved earlier, or with a base file of "
              "llama-perplexity and its own text; the reference is not run.")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML (.html) page, "
              "a Markdown (.md) table or the JSON (.json).")  # fmt: skip
@click.option("--weights/--no-weights", default=True, show_default=True, help="Compare every "
              "matrix with the reference's and look for defects.")  # fmt: skip
@click.option("--floors", type=click.IntRange(1, MOST_FLOORS), default=1, show_default=True,
              help="Noise floors to run: rounded streams, rounded products too.")  # fmt: skip
@click.option(
    "--draft", is_flag=True, help="Also run the draft stages: are their guesses accepted?"
)
@click.option("--needle", is_flag=True, help="Also hide a sentence in the text at several depths "
              "and ask for it.")  # fmt: skip
@threads_option
@click.option("--device", default="cpu", show_default=True, help="Where the pass runs: cpu, cuda, "
              "cuda:0, ...")  # fmt: skip
@click.option("--max-memory", help="Cap on memory, like 6GB: streams go to files, then pieces "
              "become smaller.")  # fmt: skip
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), help="Keep streams "
              "in this folder; the same command continues after a crash.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    source: str,
    reference: str | None,
    adapter: Path | None,
    others: tuple[str, ...],
    corpus: tuple[str, ...],
    tokens: int | None,
    seq_len: int | None,
    mode: str,
    chat_keys: str,
    skip_bad_rows: int,
    activations: str,
    products: str,
    save_logits: Path | None,
    save_top_k: int | None,
    reference_logits: Path | None,
    report: Path | None,
    weights: bool,
    floors: int,
    draft: bool,
    needle: bool,
    device: str,
    threads: int | None,
    max_memory: str | None,
    scratch: Path | None,
    as_json: bool,
) -> None:
    """Measure perplexity of SOURCE; with --reference also KL, top-1 and the noise floor.

    Exit code 3: some candidate holds matrices that look damaged. What a conversion costs is no
    reason for it, however much.
    """
    found = v4quant.evaluate(
        source,
        reference=reference,
        adapter=adapter,
        candidates=others,
        corpus=corpus,
        tokens=tokens,
        seq_len=seq_len,
        mode=mode,
        chat_keys=chat_keys,
        skip_bad_rows=skip_bad_rows,
        activations=activations,
        products=products,
        save_logits=save_logits,
        save_top_k=save_top_k,
        reference_logits=reference_logits,
        report=report,
        weights=weights,
        floors=floors,
        draft=draft,
        needle=needle,
        device=device,
        threads=threads,
        max_memory=max_memory,
        scratch=scratch,
        progress=_output.TerminalProgress(),
    )
    result = found.as_dict()
    if as_json:
        _output.emit(result)
    else:
        for part in (result, *result.get("others", [])):
            for line in finding_lines(part):
                _output.data(line)
        _output.data(_output.table(summary_rows(result)))
        if others:
            _output.data("")
            _output.data(_output.table(*candidate_rows(result)))
        if report is not None:
            _output.data(f"report in {report}")
    if found.is_damaged:
        ctx.exit(_exit.DIFFERENT)


def summary_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures a person looks at first."""
    rows = [
        ("tokens scored", f"{result['tokens']:,} in {result['sequences']} windows"),
        ("perplexity", f"{result['perplexity']:.3f} +- {result['perplexity_stderr']:.3f}"),
    ]
    if result.get("skipped_rows"):
        rows.insert(1, ("rows left out", f"{result['skipped_rows']:,} that cannot be read"))
    floor = result.get("noise_floor")
    if floor is None:
        return rows + probe_rows(result)
    saved = result.get("reference_logits") or {}
    bound = f" (at least; top {saved['top_k']})" if saved.get("top_k") else ""
    rows += [
        ("reference perplexity", f"{result['reference_perplexity']:.3f} +- "
                                 f"{result['reference_perplexity_stderr']:.3f}"),
        ("perplexity ratio", f"{result['perplexity_ratio']:.5f} +- "
                             f"{result['perplexity_ratio_stderr']:.5f}"),
        ("mean KL" + bound, f"{result['kl_mean']:.3e} nats (noise floor {floor['kl_mean']:.3e})"),
        ("99th percentile KL", f"{result['kl_p99']:.3e} (floor {floor['kl_p99']:.3e})"),
        ("top-1 agreement", f"{100 * result['top1_agreement']:.2f} % "
                            f"(floor {100 * floor['top1_agreement']:.2f} %)"),
        ("verdict", result["verdict"]["text"]),
    ]  # fmt: skip
    if "findings" in result:
        count = len(result["findings"])
        rows.append(("suspected defects", f"{count} (above)" if count else "none"))
    return rows + probe_rows(result)


def probe_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured beside the text: needles and the draft; empty when not asked for."""
    return needle_rows(result) + draft_rows(result)


def needle_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Loss of the hidden sentence by depth, before and after."""
    rows = []
    for row in result.get("needle", {}).get("depths", []):
        where = "absent" if row["depth"] is None else f"at {100 * row['depth']:.0f} %"
        told = [f"{row[k]:.3f}" for k in ("reference_nll", "nll") if k in row]
        rows.append((f"needle {where}", " -> ".join(told) + " nats per token"))
    return rows


def draft_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How often drafts guess what the model itself chooses; empty when not asked."""
    draft = result.get("draft")
    if draft is None:
        return []
    if "note" in draft:
        return [("draft", draft["note"])]
    shares = [draft[k]["target_agreement"] for k in ("reference", "candidate") if k in draft]
    told = " -> ".join(f"{100 * share:.2f} %" for share in shares)
    if "change" in draft:
        told += f" (change {100 * draft['change']:+.2f} +- {100 * draft['change_stderr']:.2f})"
    rows = [("draft accepted", told)]
    lengths = [draft[k]["accepted_length"] for k in ("reference", "candidate")
               if "accepted_length" in draft.get(k, {})]  # fmt: skip
    if lengths:
        told = " -> ".join(f"{length:.3f}" for length in lengths)
        rows.append(("accepted in a row", f"{told} of {draft['block_size']} guesses"))
    return rows


def finding_lines(result: dict[str, Any]) -> list[str]:
    """One line for every suspected defect of one candidate."""
    where = Path(result["candidate"]["path"]).name
    return [
        f"FOUND in {where}: {finding['where']}: {finding['problem']}"
        for finding in result.get("findings", [])
    ]


def candidate_rows(result: dict[str, Any]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """One row a candidate, smallest first, and the header."""
    parts = sorted((result, *result["others"]), key=lambda p: p["candidate"]["bytes"])
    rows: list[tuple[str, ...]] = [
        (
            Path(part["candidate"]["path"]).name,
            part["candidate"]["scheme"],
            _output.human_bytes(part["candidate"]["bytes"]),
            f"{part['kl_mean']:.3e}",
            f"{part['perplexity_ratio']:.5f}",
            f"{100 * part['top1_agreement']:.2f} %",
            str(len(part["findings"])) if "findings" in part else "-",
        )
        for part in parts
    ]
    header = ("candidate", "scheme", "size", "mean KL", "ppl ratio", "top-1", "defects")
    return rows, header
