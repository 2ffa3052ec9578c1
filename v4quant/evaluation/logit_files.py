"""Which form a file of logits has: v4quant's own, or a base file of llama.cpp.

One that is read says by its first bytes, one that is written by its name: `.kld` for llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

from v4quant.evaluation.kld_file import SUFFIX, KldFile, is_kld
from v4quant.evaluation.kld_writer import KldWriter
from v4quant.evaluation.saved_logits import LogitFacts, LogitsError, LogitsFile, SavedLogits
from v4quant_calibration.corpus.corpus import Corpus

SavedFile = SavedLogits | KldFile


def open_saved(path: Path) -> SavedFile:
    """A file of logits as a reference. Raises LogitsError, KldError or FormatError."""
    return KldFile(path) if is_kld(path) else SavedLogits(path)


def writes_whole_rows(path: Path) -> bool:
    """Whether the writer of this file gathers rows over the whole vocabulary."""
    return path.suffix.lower() == SUFFIX


def logits_writer(
    path: Path,
    corpus: Corpus,
    vocab_size: int,
    facts: LogitFacts,
    top_k: int | None,
    place: Path | None = None,
) -> LogitsFile | KldWriter:
    """Begin a file. path: what it is called; place: where it is written, if elsewhere.

    Raises LogitsError or KldError for what its form cannot hold."""
    if not writes_whole_rows(path):
        return LogitsFile(path, corpus, vocab_size, facts, top_k, place)
    if top_k is not None:
        raise LogitsError(f"{path}: llama.cpp's base files hold all tokens; leave --save-top-k out")
    return KldWriter(path, corpus, vocab_size, place)
