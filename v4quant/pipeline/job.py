"""What all steps of a run share: where it works, what it converts to, and how a step is known."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

from v4quant.api.arguments import config_of, read_corpus
from v4quant.builtin import resolve_corpus
from v4quant.evaluation.evaluate import Resources
from v4quant.finished import request_key
from v4quant.pipeline.recipe_file import CorpusStep
from v4quant.pipeline.results import RunWatcher
from v4quant.recipe import Recipe
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.sidecars import TOKENIZER, place_of
from v4quant_kernels.progress import Progress

STATS_NAME = "stats.v4q"
ALONE = "checkpoint"
"""Name of a conversion that is the only one."""


@dataclass(frozen=True)
class Job:
    """What all steps of a run share."""

    folder: Path
    limits: Resources
    progress: Progress
    watcher: RunWatcher
    overwrite: bool = False
    kept_source: int = 0


@dataclass(frozen=True)
class Target:
    """A conversion and where its parts go. repo: "" for a folder."""

    name: str
    recipe: Recipe
    folder: Path
    solution: Path
    repo: str

    @property
    def solves(self) -> bool:
        """Whether calibration chooses its codes."""
        return self.recipe.solver == "gptq"


def corpus_of(
    step: CorpusStep, source: Checkpoint, max_memory: int | None, enough: int | None = None
) -> Corpus:
    config = config_of(source)
    return read_corpus(
        step.corpus, source, config, step.seq_len, step.tokens, step.mode, step.chat_keys,
        step.skip_bad_rows, enough, max_memory,
    )  # fmt: skip


def key_of(step: CorpusStep, source: Checkpoint, *digests: str) -> str:
    files = [*resolve_corpus(list(step.corpus)), place_of(source, TOKENIZER)]
    return request_key(astuple(step), files, source.digest(), *digests)
