"""Training text: named sources, held-out text kept out, token windows drawn reproducibly.

A perplexity on held-out text is worth nothing when the text was trained on, and the same text often
returns under another name (a library module in another Python version, a novel inside a collected
edition). So exclusion goes by content: a document goes when a stretch of it shares a fifth of its
eight-word sequences with the held-out text, however it is named or wrapped.
"""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from torch import Tensor

SHINGLE = 8
STRETCH = 1000
OVERLAP = 0.2
SUFFIXES = {".txt", ".md", ".rst", ".py"}
_SKIPPED = {"test", "tests", "idlelib", "encodings", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """One file's text."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """Documents of one kind; sources are drawn from in proportion to the root of their size."""

    name: str
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Stream:
    """A source as one run of token ids, int64 `[n]`, a BOS before each document."""

    name: str
    ids: Tensor


def standard_library() -> Source:
    """The modules of the running Python's standard library, without tests and codec tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        p for p in sorted(root.rglob("*.py")) if not _SKIPPED & set(p.parts[len(root.parts) :])
    ]
    return Source("Python standard library", tuple(_documents(paths)))


def from_path(path: Path) -> Source:
    """A text file, or every .txt, .md, .rst and .py file below a folder.

    Raises FileNotFoundError when there is nothing to read.
    """
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    documents = tuple(_documents(found))
    if not documents:
        raise FileNotFoundError(f"{path}: holds no text to train on")
    return Source(path.name, documents)


def without_heldout(
    sources: Sequence[Source], heldout: Iterable[Document]
) -> tuple[list[Source], list[str]]:
    """The sources without documents that repeat held-out text, and the names of those dropped."""
    secret: set[int] = set()
    for document in heldout:
        secret.update(_shingles(document.text))
    kept, dropped = [], []
    for source in sources:
        clean = []
        for document in source.documents:
            if _repeats(_shingles(document.text), secret):
                dropped.append(document.name)
            else:
                clean.append(document)
        if clean:
            kept.append(Source(source.name, tuple(clean)))
    return kept, dropped


def encode(tokenizer: Tokenizer, source: Source, bos: int) -> Stream:
    """A source's documents as one run of token ids."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([d.text for d in source.documents]):
        ids.append(bos)
        ids.extend(encoding.ids)
    return Stream(source.name, torch.tensor(ids, dtype=torch.int64))


def draw_windows(streams: Sequence[Stream], rows: int, length: int, bos: int, seed: int) -> Tensor:
    """int64 `[rows, length]`: BOS and then `length - 1` consecutive tokens of a drawn source.

    The same seed gives the same windows, so a resumed run needs no generator state.
    """
    long_enough = [s for s in streams if s.ids.numel() >= length]
    if not long_enough:
        raise ValueError(f"no source holds {length} tokens; give more text")
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([math.sqrt(s.ids.numel()) for s in long_enough])
    windows = torch.full((rows, length), bos, dtype=torch.int64)
    chosen = torch.multinomial(weights, rows, replacement=True, generator=generator)
    for row, index in enumerate(chosen.tolist()):
        ids = long_enough[index].ids
        start = int(torch.randint(ids.numel() - length + 2, (1,), generator=generator))
        windows[row, 1:] = ids[start : start + length - 1]
    return windows


def token_counts(streams: Iterable[Stream], vocab_size: int) -> Tensor:
    """How often each token occurs, int64 `[vocab_size]`."""
    return sum(
        (torch.bincount(s.ids, minlength=vocab_size) for s in streams),
        torch.zeros(vocab_size, dtype=torch.int64),
    )


def train_tokenizer(frame: Path, sources: Iterable[Source], vocab_size: int) -> str:
    """tokenizer.json with a byte-level BPE of `vocab_size` tokens, in the frame of an existing one.

    The frame keeps its normaliser, pre-tokenizer, decoder and special tokens.
    """
    outline = json.loads(frame.read_text(encoding="utf-8"))
    learner = Tokenizer.from_str(json.dumps(outline))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[t["content"] for t in outline["added_tokens"]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator((d.text for s in sources for d in s.documents), trainer)
    outline["model"] = json.loads(learner.to_str())["model"]
    return json.dumps(outline, ensure_ascii=False)


def _documents(paths: Iterable[Path]) -> Iterable[Document]:
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(str(path), text)


def _shingles(text: str) -> list[int]:
    words = text.split()
    return [hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)]


def _repeats(shingles: list[int], secret: set[int]) -> bool:
    stretches = (shingles[i : i + STRETCH] for i in range(0, len(shingles), STRETCH))
    return any(sum(s in secret for s in part) > OVERLAP * len(part) for part in stretches)
