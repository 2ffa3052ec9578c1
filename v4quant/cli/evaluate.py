"""`v4quant evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.builtin import MIXED_HELDOUT
from v4quant.cli import _exit, _output
from v4quant.cli._options import corpus_options, overwrite_option, products_option, threads_option
from v4quant.cli._types import ADAPTER, SOURCE
from v4quant.sizes import human_bytes
from v4quant_calibration.defaults import MOST_FLOORS

if TYPE_CHECKING:
    from v4quant import Evaluation
    from v4quant.evaluation.figures import Draft, Figures, Needle
    from v4quant.evaluation.result import Perplexity


@click.command(epilog="Example: v4quant evaluate out --reference DeepSeek-V4-Flash --report r.html")
@click.argument("source", type=SOURCE)
@click.option("--reference", type=SOURCE, help="Compare with this checkpoint.")
@click.option(
    "--adapter",
    type=ADAPTER,
    help="LoRA adapter, a folder or repository, merged into the reference (without one: SOURCE).",
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
@overwrite_option("a report and logits")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    source: str,
    reference: str | None,
    adapter: str | None,
    others: tuple[str, ...],
    corpus: tuple[str, ...],
    tokens: int | None,
    seq_len: int | None,
    tokenizer: Path | None,
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
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure perplexity of SOURCE; with --reference also KL, top-1 and the noise floor.

    Exit code 3: a candidate holds matrices that look damaged. A high cost alone does not cause it.
    """
    found = v4quant.evaluate(
        source,
        reference=reference,
        adapter=adapter,
        candidates=others,
        corpus=corpus,
        tokens=tokens,
        seq_len=seq_len,
        tokenizer=tokenizer,
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
        overwrite=overwrite,
        progress=_output.TerminalProgress(),
    )
    if as_json:
        _output.emit(found.as_dict())
    else:
        for one in (found, *found.others):
            for line in finding_lines(one):
                _output.data(line)
        _output.data(_output.table(summary_rows(found)))
        if others:
            _output.data("")
            _output.data(_output.table(*candidate_rows(found)))
        if report is not None:
            _output.data(f"report in {report}")
    if found.is_damaged:
        ctx.exit(_exit.DIFFERENT)


def summary_rows(found: Evaluation) -> list[tuple[str, str]]:
    """The figures a person looks at first."""
    windows = f"{found.figures.sequences or 0:.0f} windows"
    rows = [("tokens scored", f"{found.tokens:,} in {windows}")]
    if found.skipped_rows:
        rows.append(("rows left out", f"{found.skipped_rows:,} that cannot be read"))
    rows.append(("perplexity", _with_error(found.perplexity, 3)))
    moved, floor, before = found.distance, found.floor, found.reference_perplexity
    if moved is None or floor is None or before is None:
        return rows + probe_rows(found.figures)
    top_k = found.figures.reference_logits.top_k
    bound = f" (at least; top {top_k:.0f})" if top_k else ""
    ratio = f"{moved.perplexity_ratio:.5f} +- {moved.perplexity_ratio_stderr:.5f}"
    rows += [
        ("reference perplexity", _with_error(before, 3)),
        ("perplexity ratio", ratio),
        ("mean KL" + bound, f"{moved.kl_mean:.3e} nats (noise floor {floor.kl_mean:.3e})"),
        ("99th percentile KL", f"{moved.kl_p99:.3e} (floor {floor.kl_p99:.3e})"),
        ("top-1 agreement", f"{100 * moved.top1_agreement:.2f} % "
                            f"(floor {100 * floor.top1_agreement:.2f} %)"),
        ("verdict", found.verdict.text if found.verdict is not None else ""),
    ]  # fmt: skip
    if found.findings is not None:
        count = len(found.findings)
        rows.append(("suspected defects", f"{count} (above)" if count else "none"))
    return rows + probe_rows(found.figures)


def _with_error(perplexity: Perplexity, digits: int) -> str:
    return f"{perplexity.value:.{digits}f} +- {perplexity.stderr:.{digits}f}"


def probe_rows(figures: Figures) -> list[tuple[str, str]]:
    """What was measured beside the text: needles and the draft; empty when not asked for."""
    return needle_rows(figures.needle) + draft_rows(figures.draft)


def needle_rows(needle: Needle) -> list[tuple[str, str]]:
    """Loss of the hidden sentence by depth, before and after."""
    rows = []
    for row in needle.depths:
        where = "absent" if row.depth is None else f"at {100 * row.depth:.0f} %"
        told = [f"{nll:.3f}" for nll in (row.reference_nll, row.nll) if nll is not None]
        rows.append((f"needle {where}", " -> ".join(told) + " nats per token"))
    return rows


def draft_rows(draft: Draft) -> list[tuple[str, str]]:
    """How often drafts guess what the model itself chooses; empty when not asked."""
    if draft.note:
        return [("draft", draft.note)]
    sides = (draft.reference, draft.candidate)
    shares = [s.target_agreement for s in sides if s.target_agreement is not None]
    if not shares:
        return []
    told = " -> ".join(f"{100 * share:.2f} %" for share in shares)
    if draft.change is not None:
        told += f" (change {100 * draft.change:+.2f} +- {100 * (draft.change_stderr or 0):.2f})"
    rows = [("draft accepted", told)]
    lengths = [s.accepted_length for s in sides if s.accepted_length is not None]
    if lengths:
        told = " -> ".join(f"{length:.3f}" for length in lengths)
        rows.append(("accepted in a row", f"{told} of {draft.block_size or 0:.0f} guesses"))
    return rows


def finding_lines(one: Evaluation) -> list[str]:
    """One line for every suspected defect of one candidate."""
    where = Path(one.candidate.path).name
    return [f"FOUND in {where}: {found.where}: {found.problem}" for found in one.findings or ()]


def candidate_rows(found: Evaluation) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """One row a candidate, smallest first, and the header."""
    rows: list[tuple[str, ...]] = [
        (
            Path(one.candidate.path).name,
            one.candidate.scheme,
            human_bytes(one.candidate.bytes),
            f"{one.distance.kl_mean:.3e}",
            f"{one.distance.perplexity_ratio:.5f}",
            f"{100 * one.distance.top1_agreement:.2f} %",
            "-" if one.findings is None else str(len(one.findings)),
        )
        for one in found.candidates
        if one.distance is not None
    ]
    header = ("candidate", "scheme", "size", "mean KL", "ppl ratio", "top-1", "defects")
    return rows, header
