"""Train a tiny DeepSeek-V4 or V4.1 from nothing and write it in the layout of the release.

    python scripts/train_tiny_v4.py --out tiny --minutes 45
    python scripts/train_tiny_v4.py --out tiny --minutes 45 --text novels/ --text rust-docs/
    python scripts/train_tiny_v4.py --out tiny41 --minutes 45 --start v4quant/data/tiny-v4 \
        --config v4quant/data/tiny-v41/config.json --tokenizer v4quant/data/tiny-v41 --text novels/

The config says which of the two. A V4.1 can start from a trained V4 of the same widths (`--start`),
which saves most of the work: experts, attention and embeddings carry over.

Random weights hide quantization damage: nothing they compute is confident enough to be changed by
rounding. The bundled tiny model exists because of that, and this script makes another one like it.

Text. Without `--text` the model learns from the modules of the running Python's standard library
and from the bundled calibration texts. The bundled model also saw the rest of Jane Austen's novels
except Persuasion (as packaged in Debian's r-cran-janeaustenr; its Rdata.rdb holds them as zlib
streams) and the Rust documentation (Debian's rust-doc, its HTML reduced to text); give such text by
`--text FILE-or-FOLDER`. Held-out text (`--heldout`, by default the bundled two) is
kept out by content: a document that repeats a stretch of it is dropped and named.

The run can be stopped at any time; the same command goes on from the last saved state, which lies
beside the output as `<out>.training.pt`. Needs `pip install v4quant[test]` (transformers and
accelerate). One thread is fastest on a busy machine: spinning barriers cost more than they gain.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import v4quant  # noqa: F401  settles OpenMP before torch is loaded

# isort: split
import torch
from tiny_v4_training import families, heldout, loop, model, text
from tokenizers import Tokenizer
from torch import nn

DATA = Path(__file__).resolve().parent.parent / "v4quant" / "data"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a tiny DeepSeek-V4 or V4.1 and write it in the released layout.",
        epilog="example: python scripts/train_tiny_v4.py --out tiny --minutes 45 --threads 1",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="checkpoint folder to write (absent or empty)")
    add("--minutes", type=float, help="time for training, draft stage included")
    add("--steps", type=int, help="optimiser steps of the trunk; the draft stage gets a part more")
    add("--seed", type=int, default=0, help="initial weights and order of text (default 0)")
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--text", type=Path, action="append", default=[], help="further text file or folder")
    add("--only-given-text", action="store_true", help="learn from --text alone")
    add("--heldout", type=Path, action="append", help="text to keep out and to measure on")
    add("--config", type=Path, default=DATA / "tiny-v4" / "config.json", help="dimensions")
    add("--tokenizer", type=Path, default=DATA / "tiny-v4", help="folder of the tokenizer")
    add("--start", type=Path, help="V4 of the same widths, or V4.1, to start from")
    add("--train-tokenizer", action="store_true", help="learn a new vocabulary from the text")
    add("--draft-share", type=float, default=0.12, help="of the time (default 0.12)")
    add("--window", type=int, default=512, help="tokens per window, half at first (default 512)")
    add("--tokens-per-step", type=int, default=2048, help="tokens per step (default 2048)")
    add("--heldout-windows", type=int, default=32, help="windows measured per text (default 32)")
    add("--save-minutes", type=float, default=5.0, help="time between saved states (default 5)")
    chosen = parser.parse_args(arguments)
    if chosen.minutes is None and chosen.steps is None:
        parser.error("say how long to train: --minutes, --steps or both")
    if chosen.only_given_text and not chosen.text:
        parser.error("--only-given-text needs --text")
    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        parser.error(f"{chosen.out} is not an empty folder; choose another --out")
    return chosen


def say(line: str) -> None:
    """A line for the person who watches."""
    print(line, file=sys.stderr, flush=True)


def read_text(args: argparse.Namespace) -> tuple[list[text.Source], list[text.Document]]:
    """Training sources without held-out text, and the held-out documents."""
    held = args.heldout or sorted((DATA / "text").glob("heldout-*.txt"))
    secret = [d for p in held for d in text.from_path(p).documents]
    sources = [text.from_path(p) for p in args.text]
    if not args.only_given_text:
        sources.append(text.standard_library())
        sources += [text.from_path(p) for p in sorted((DATA / "text").glob("calibration-*.txt"))]
    kept, dropped = text.without_heldout(sources, secret)
    for source in kept:
        size = sum(len(d.text) for d in source.documents)
        say(f"text: {source.name}, {len(source.documents)} documents, {size:,} characters")
    say(f"kept out because they repeat held-out text: {', '.join(dropped) or 'none'}")
    return kept, secret


def train_both(
    args: argparse.Namespace,
    family: families.Family[Any, Any],
    tokenizer: Tokenizer,
    streams: list[text.Stream],
) -> tuple[nn.Module, nn.Module]:
    """Train trunk and draft, resuming what a saved state holds."""
    settings = loop.Settings(
        seed=args.seed,
        bos=int(family.flat["bos_token_id"]),
        short=args.window // 2,
        long=args.window,
        tokens_per_step=args.tokens_per_step,
        save_minutes=args.save_minutes,
    )
    trunk = family.trunk(streams, tokenizer, args.seed)
    state_path = args.out.with_name(args.out.name + ".training.pt")
    saved = loop.load_state(state_path, settings)
    draft = family.draft(args.seed)
    if args.start and not saved:
        family.start(trunk, draft, args.start)
    first = family.trunk_phase(trunk, args.start)
    size = sum(p.numel() for p in trunk.parameters())
    say(f"trunk: {size / 1e6:.1f} M parameters")
    if "trunk" in saved:
        first.restore(saved["trunk"])
        say(f"resumed at step {first.step} from {state_path}")
    phases = [first]

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        loop.save_state(state_path, settings, {p.name: p.state() for p in phases})

    minutes, share = args.minutes, args.draft_share
    trunk_budget = loop.Budget(args.steps, minutes * (1 - share) if minutes else None)
    draft_steps = max(1, round(args.steps * share)) if args.steps else None
    loop.train(first, trunk_budget, settings, streams, save)
    second = family.draft_phase(draft, trunk)
    if "mtp" in saved:
        second.restore(saved["mtp"])
    phases.append(second)
    draft_budget = loop.Budget(draft_steps, minutes * share if minutes else None)
    loop.train(second, draft_budget, settings, streams, save)
    return trunk, draft


def report(
    args: argparse.Namespace,
    family: families.Family[Any, Any],
    draft: nn.Module,
    secret: list[text.Document],
) -> None:
    """Read the written folder back and print its held-out figures (stdout)."""
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    bos = int(family.flat["bos_token_id"])
    for document in secret:
        ids = torch.tensor(tokenizer.encode(document.text).ids)
        windows = heldout.heldout_windows(ids, args.window, args.heldout_windows, bos)
        scores = family.scores(args.out, draft, windows)
        print(
            f"{Path(document.name).name}: {scores} on {windows.shape[0]} windows of {args.window}"
        )


def main() -> None:
    """Text, training, writing, measuring."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    family = families.family_of(model.read_config(args.config))
    vocabulary, bos = int(family.flat["vocab_size"]), int(family.flat["bos_token_id"])
    sources, secret = read_text(args)
    frame = args.tokenizer / "tokenizer.json"
    if args.train_tokenizer:
        tokenizer_json = text.train_tokenizer(frame, sources, vocabulary)
    else:
        tokenizer_json = frame.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    if tokenizer.get_vocab_size() > vocabulary:
        sys.exit(f"{frame}: more tokens than the model's vocab_size {vocabulary}")
    streams = [text.encode(tokenizer, source, bos) for source in sources]
    say(f"{sum(s.ids.numel() for s in streams):,} tokens to learn from")
    trunk, draft = train_both(args, family, tokenizer, streams)
    total = family.write(args.out, trunk, draft, args.tokenizer, tokenizer_json)
    say(f"wrote {args.out}: {total:,} bytes of tensors")
    report(args, family, draft, secret)


if __name__ == "__main__":
    main()
