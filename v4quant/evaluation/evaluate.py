"""Evaluation as users see it: the forward pass's figures plus sizes, weight errors and logits.

`calibration.evaluate` knows models and tokens; this adds what only files know (bytes, schemes, the
manifest's weight errors) so that JSON, HTML and Markdown come from one object.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from v4quant import __version__
from v4quant.checks.inspection import inspect_checkpoint
from v4quant.checks.soundness import require_sound
from v4quant.devices import CPU, device_bytes
from v4quant.evaluation.cost import evaluation_hours
from v4quant.evaluation.logit_files import SavedFile, logits_writer, open_saved, writes_whole_rows
from v4quant.evaluation.memory import MemoryPlan, plan_evaluation, work_of
from v4quant.evaluation.saved_logits import LogitFacts, LogitsError
from v4quant.evaluation.weight_figures import add_weights, recorded_errors, source_digest
from v4quant.evaluation.worst_stretches import worst_stretches
from v4quant.memory import Limits
from v4quant.planner.effort import hours_text
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.corpus.tokenizer import tokenizer_of
from v4quant_calibration.evaluation.evaluate import (
    Measures,
    Room,
    evaluate,
    evaluate_all,
    evaluate_saved,
)
from v4quant_calibration.evaluation.weight_error import compare_weights
from v4quant_calibration.forward.kept import UNFINISHED, KeptStore
from v4quant_calibration.forward.scratch import PREFIX, Scratch
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.system import return_freed_memory
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress, SilentProgress
from v4quant_kernels.user_cache import cache_folder

_LOG = logging.getLogger(__name__)


class EvaluationError(V4QuantError):
    """A combination of requests that makes no sense."""


SCORES_ONLY = Measures()
# What all candidates of a run have in common is told once.
SHARED = ("noise_floor", "coverage")


@dataclass(frozen=True)
class LogitFiles:
    """save: where to write the checkpoint's logits, `top_k` of them if given. reference: logits
    saved earlier, to compare with instead of running the reference. place: where `save` is written,
    if elsewhere."""

    save: Path | None = None
    top_k: int | None = None
    reference: Path | None = None
    place: Path | None = None


NO_FILES = LogitFiles()


@dataclass(frozen=True)
class Resources:
    """max_memory: the most bytes an evaluation may take. scratch: folder for streams, which then
    always go there, so that the same evaluation goes on when it is started again after a crash.

    kept: folder in which a run whose streams are in memory keeps copies of them now and then, for
    the same purpose; nothing of it is left behind a run that ends well.

    device: where the arithmetic is done; a GPU's memory is then limited by `max_memory` as well.

    Without a scratch folder, streams go to files only when memory is short, below the user's cache
    folder.
    """

    max_memory: int | None = None
    scratch: Path | None = None
    device: torch.device = CPU
    kept: Path | None = None


UNLIMITED = Resources()


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    files: LogitFiles = NO_FILES,
    weights: bool = True,
    measures: Measures = SCORES_ONLY,
    others: Sequence[Checkpoint] = (),
    resources: Resources = UNLIMITED,
    until: ExitStack | None = None,
) -> dict[str, Any]:
    """The full evaluation object (the schema of `evaluate --json` and of reports).

    weights: with a reference, also compare every matrix with its source and list what does not
    fit as `findings`. others: further conversions of the reference, evaluated in the same run;
    their figures are the entries of `others`. until: what was kept of finished layers goes when it
    is closed, by default when this returns. With `files.reference` the reference, if given, only
    lends its weights for that comparison. Raises what `evaluate` and `compare_weights` raise,
    LogitsError, EvaluationError, SizeError for too little memory and OutputError for scratch files.
    """
    _check_request(reference, others, files, measures)
    require_sound(checkpoint, *others, *([reference] if reference is not None else []))
    candidates = [checkpoint, *others]
    runs = reference is not None and files.reference is None
    floors = measures.floors if reference is not None or files.reference is not None else 0
    ran = measures.with_needles(corpus)
    config = parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))
    work = work_of(ran, len(candidates) if runs else 0, floors, weights, measures.draft)
    whole_rows = files.save is not None and writes_whole_rows(files.save)
    work = replace(work, kernels=options.expert_kernels, whole_rows=whole_rows)
    limits = Limits.of(resources.max_memory, device_bytes(resources.device))
    plan = plan_evaluation(config, work, limits, resources.scratch is not None)
    in_pieces = plan.apply(options)
    if resources.max_memory is not None:
        return_freed_memory()
    with ExitStack() as opened:
        run = [*candidates, reference] if runs and reference is not None else candidates
        kind = f"{floors} {bool(files.reference)} {measures.draft} {resources.device.type}"
        room = (until or opened).enter_context(
            _opened_room(plan, resources, lambda: _run_key(run, ran, in_pieces, kind))
        )
        if resources.device.type == "cpu":  # no other has been timed
            left = 1 - room.store.finished / config.num_hidden_layers
            others_run = len(candidates) if runs else 0
            cores = torch.get_num_threads()
            hours = evaluation_hours(config, ran.tokens, others_run, floors, weights, left, cores)
            on = f"{cores} cores" if cores > 1 else "one core"
            _LOG.info("about %s expected, on %s", hours_text(hours), on)
        if files.reference is not None:
            saved = open_saved(files.reference)
            opened.callback(saved.close)
            _check_saved(saved, checkpoint, reference, corpus, options)
            all_figures = [
                evaluate_saved(checkpoint, saved, corpus, in_pieces, progress, measures, room)
            ]
        else:
            all_figures = _figures(
                candidates, reference, corpus, in_pieces, progress, files, measures, room
            )
        compared = None
        if reference is not None and weights:
            written = [recorded_errors(reference, c) for c in candidates]
            compared = compare_weights(reference, candidates, progress, written)
    if reference is not None:
        for index, (figures, candidate) in enumerate(zip(all_figures, candidates, strict=True)):
            add_weights(figures, None if compared is None else compared[index], candidate)
    tokenizer = tokenizer_of(checkpoint)
    for figures in all_figures:
        if "verdict" in figures:
            figures["worst_stretches"] = worst_stretches(figures["verdict"], ran, tokenizer)
    lengths = [len(w) for w in corpus.windows]
    result = {
        "reference": _facts(reference) if reference is not None else None,
        "candidate": _facts(checkpoint),
        "sequences": len(lengths),
        "seq_len": max(lengths),
        "skipped_rows": corpus.skipped_rows,
        "activations": options.activations,
        "products": options.products,
        "device": resources.device.type,
        **all_figures[0],
    }
    if files.reference is not None:
        result["reference_logits"] = _saved_facts(saved)
    if others:
        result["others"] = [
            {"candidate": _facts(c)} | {k: v for k, v in f.items() if k not in SHARED}
            for c, f in zip(others, all_figures[1:], strict=True)
        ]
    return result


@contextmanager
def _opened_room(plan: MemoryPlan, resources: Resources, key: Callable[[], str]) -> Iterator[Room]:
    """Where streams live while this lasts, and what stays of them when it ends by an error."""
    room = Room(tile=plan.tile, device=resources.device)
    if plan.spill:
        with Scratch(resources.scratch or cache_folder(), key()) as scratch:
            yield replace(room, store=scratch)
            scratch.remove()
    elif resources.kept is not None:
        digest = key()
        folder = resources.kept / f"{PREFIX}{digest[:24]}{UNFINISHED}"
        with KeptStore(room.store, folder, digest) as kept:
            yield replace(room, store=kept)
            kept.forget()
    else:
        yield room


def _check_request(
    reference: Checkpoint | None,
    others: Sequence[Checkpoint],
    files: LogitFiles,
    measures: Measures,
) -> None:
    if others and (reference is None or files != NO_FILES):
        raise EvaluationError(
            "several candidates need a --reference, and --save-logits takes only one"
        )
    if files.reference is not None and (measures.draft or measures.needles or files.save):
        raise EvaluationError(
            "--reference-logits knows next tokens of its own text only: leave --draft, --needle "
            "and --save-logits out"
        )
    if files.save is not None and measures.needles is not None:
        raise EvaluationError("--save-logits writes the corpus' logits: leave --needle out")


def _check_saved(
    saved: SavedFile,
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    corpus: Corpus,
    options: ForwardOptions,
) -> None:
    """Raise LogitsError unless the logits are of this text and of the right source."""
    saved.check(corpus, int(checkpoint.config["vocab_size"]))
    facts = saved.facts
    if facts is None:
        return
    if facts.activations != options.activations:
        raise LogitsError(
            f"{saved.path}: was saved with --activations {facts.activations}; use the same here"
        )
    if facts.products != options.products:
        raise LogitsError(
            f"{saved.path}: was saved with --products {facts.products}; use the same here"
        )
    sources = {
        "the --reference": reference.digest() if reference is not None else None,
        "the source this was converted from": source_digest(checkpoint),
    }
    for what, digest in sources.items():
        if digest is not None and facts.checkpoint not in (digest, checkpoint.digest()):
            raise LogitsError(
                f"{saved.path}: these logits are of {facts.path}, which is not {what}; save the "
                "logits of the right checkpoint"
            )


def _saved_facts(saved: SavedFile) -> dict[str, Any]:
    facts = saved.facts
    return {
        "file": str(saved.path),
        "checkpoint": None if facts is None else facts.path,
        "top_k": saved.top_k,
        "kl": saved.kl,
    }


def _figures(
    candidates: Sequence[Checkpoint],
    reference: Checkpoint | None,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    files: LogitFiles,
    measures: Measures,
    room: Room,
) -> list[dict[str, Any]]:
    """Each candidate's figures; logits are saved on the way, or nothing of them is left."""
    sink = None
    if files.save is not None:
        first = candidates[0]
        facts = LogitFacts(first.digest(), str(first.path), options.activations, options.products)
        vocab_size = int(first.config["vocab_size"])
        sink = logits_writer(files.save, corpus, vocab_size, facts, files.top_k, files.place)
    try:
        if reference is None:
            found = [evaluate(candidates[0], None, corpus, options, progress, sink, measures, room)]
        else:
            found = evaluate_all(
                candidates, reference, corpus, options, progress, sink, measures, room
            )
    except BaseException:
        if sink is not None:
            sink.abort()
        raise
    if sink is not None:
        sink.close()
    return found


def _run_key(
    checkpoints: Sequence[Checkpoint],
    corpus: Corpus,
    options: ForwardOptions,
    kind: str,
) -> str:
    """SHA-256 of all that decides a run's numbers and files: checkpoints, text, options, versions,
    and what `kind` says of models beside them."""
    sha = hashlib.sha256()
    for part in (__version__, torch.__version__, repr(options), kind):
        sha.update(part.encode() + b"\0")
    for checkpoint in checkpoints:
        sha.update(checkpoint.digest().encode())
    for number, window in zip(corpus.part_of, corpus.windows, strict=True):
        sha.update(f"{number} {len(window)}:".encode())
        sha.update(window.numpy().tobytes())
    return sha.hexdigest()


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    found = inspect_checkpoint(checkpoint, SilentProgress())
    experts = [c for c in found.classes if "routed experts" in c.role]
    nbytes, weights = sum(c.nbytes for c in experts), sum(c.weights for c in experts)
    schemes = {kind for c in experts for kind in c.formats}
    return {
        "path": checkpoint.label,
        "scheme": ", ".join(sorted(schemes)),
        "bytes": checkpoint.file_bytes,
        "expert_bits_per_weight": 8 * nbytes / weights if weights else None,
    }
