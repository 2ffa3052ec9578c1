"""Conversions measured by transformers instead of by our own forward pass.

    scripts/check_transformers_quality.py SOURCE OUT [OUT ...] --corpus text.txt --tokens 8192

Loads the source and every conversion in transformers (experts as it holds them, in BF16; arithmetic
in float32), scores each on the same windows with a few lines of float64 of its own, and sets
perplexity, mean KL from the source and top-1 agreement beside what `evaluate` says of the same
folders and text. Both must find the same: the KLs may differ by the noise floor and by a tenth.
For models whose float32 weights fit into memory together. Needs transformers, accelerate and, for
integers, compressed-tensors (`pip install v4quant[test]`).

Exit code 0 when both agree on every conversion, 1 when not.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from script_tools.figures import figures
from torch import Tensor

import v4quant
from v4quant.builtin import resolve_corpus, resolve_source
from v4quant_calibration.corpus.corpus import Corpus, CorpusRequest, load_corpus
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.opening import open_checkpoint


@dataclass(frozen=True)
class Found:
    """What one of the two says of a conversion; kl_stderr over windows (transformers')."""

    perplexity: float
    kl: float
    kl_stderr: float
    top1: float
    parts: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure twice, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder, or builtin:tiny-v4")
    parser.add_argument("out", nargs="+", type=Path, help="conversions of it")
    parser.add_argument("--corpus", action="append", required=True, help="text; may be repeated")
    parser.add_argument("--tokens", type=int, default=8192, help="in all (default 8192)")
    parser.add_argument("--seq-len", type=int, default=512, help="window length (default 512)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    found = compare(options)
    if options.json:
        print(json.dumps(found))
    else:
        print(table(found))
    return 0 if all(row["agrees"] for row in found["rows"]) else 1


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Every conversion by both."""
    folders = [resolve_source(options.source), *options.out]
    with open_checkpoint(folders[0]) as source:
        config = parse_model_config(dict(source.config), "config.json")
        request = CorpusRequest(
            options.seq_len, options.tokens, config.bos_token_id, config.vocab_size
        )
        text = load_corpus(resolve_corpus(options.corpus), folders[0] / "tokenizer.json", request)
    first, *others = options.out
    mine = v4quant.evaluate(
        first, reference=folders[0], candidates=others, corpus=options.corpus,
        tokens=options.tokens, seq_len=options.seq_len, weights=False,
    )  # fmt: skip
    assert mine.floor is not None and mine.reference_perplexity is not None
    floor = mine.floor.kl_mean
    reference, theirs = measure([load(folder) for folder in folders], text)
    rows = []
    for folder, a, b in zip(options.out, (mine, *mine.others), theirs, strict=True):
        ours = Found(**figures(a))
        row = {"name": folder.name, "transformers": asdict(b), "evaluate": asdict(ours)}
        rows.append({**row, "agrees": agree(ours.kl, b.kl, floor)})
    return {
        "tokens": text.tokens,
        "floor_kl": floor,
        "source_perplexity": {
            "transformers": reference,
            "evaluate": mine.reference_perplexity.value,
        },
        "rows": rows,
    }


def agree(ours: float, theirs: float, floor: float) -> bool:
    """Whether two mean KLs differ by no more than what rounding explains."""
    return abs(ours - theirs) <= floor + 0.1 * max(ours, theirs)


def load(folder: Path) -> torch.nn.Module:
    """A checkpoint in transformers, its values widened to float32.

    Raises SystemExit when transformers misses a tensor, or knows none of that name.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # BF16 first: read as float32, parts stored in BF16 would keep that type.
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
        )
    wrong = {kind: sorted(names)[:3] for kind, names in report.items() if names}
    if wrong:
        raise SystemExit(f"{folder}: transformers does not find what it wants: {wrong}")
    # A quantized model forbids its own `float`; it holds plain tensors by now.
    plain: torch.nn.Module = torch.nn.Module.float(model).eval()
    return plain


@torch.no_grad()
def measure(models: Sequence[torch.nn.Module], text: Corpus) -> tuple[float, list[Found]]:
    """Perplexity of the first model, and figures of each other one against it."""
    nll: list[list[Tensor]] = [[] for _ in models]
    kl: list[list[Tensor]] = [[] for _ in models[1:]]
    same: list[list[Tensor]] = [[] for _ in models[1:]]
    for ids in text.windows:
        scores = [log_probabilities(model, ids) for model in models]
        for score, kept in zip(scores, nll, strict=True):
            kept.append(-score.gather(1, ids[1:, None]).squeeze(1))
        p = scores[0]
        for q, divergences, agreements in zip(scores[1:], kl, same, strict=True):
            divergences.append((p.exp() * (p - q)).sum(-1))
            agreements.append(p.argmax(-1) == q.argmax(-1))
    results = []
    for losses, divergences, agreements in zip(nll[1:], kl, same, strict=True):
        means = torch.stack([d.mean() for d in divergences])
        results.append(
            Found(
                perplexity=float(torch.cat(losses).mean().exp()),
                kl=float(torch.cat(divergences).mean()),
                kl_stderr=float(means.std() / len(means) ** 0.5),
                top1=float(torch.cat(agreements).double().mean()),
                parts=by_part(divergences, text),
            )
        )
    return float(torch.cat(nll[0]).mean().exp()), results


def log_probabilities(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """float64 `[tokens - 1, vocabulary]`: what is said of every token but the first."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)


def by_part(divergences: Sequence[Tensor], text: Corpus) -> dict[str, float]:
    """Mean KL of each part of the text."""
    found: dict[str, list[Tensor]] = {}
    for values, part in zip(divergences, text.part_of, strict=True):
        found.setdefault(text.parts[part].name, []).append(values)
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def table(found: dict[str, Any]) -> str:
    """Both measurements side by side."""
    perplexity = found["source_perplexity"]
    lines = [
        f"{found['tokens']:,} tokens; noise floor {found['floor_kl']:.1e}; perplexity of the "
        f"source {perplexity['transformers']:.3f} (transformers), {perplexity['evaluate']:.3f} "
        "(evaluate)",
        "",
        "| conversion | KL, transformers | KL, evaluate | perplexity | top-1 | |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        theirs, ours = row["transformers"], row["evaluate"]
        lines.append(
            f"| {row['name']} | {theirs['kl']:.5f} ± {theirs['kl_stderr']:.5f} "
            f"| {ours['kl']:.5f} ± {ours['kl_stderr']:.5f} "
            f"| {theirs['perplexity']:.3f}, {ours['perplexity']:.3f} "
            f"| {theirs['top1']:.2%}, {ours['top1']:.2%} "
            f"| {'agree' if row['agrees'] else 'DIFFER'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
