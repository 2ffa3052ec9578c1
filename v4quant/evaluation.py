"""Evaluation as users see it: the forward pass's figures plus sizes, weight errors and logits.

`calibration.evaluate` knows models and tokens; this adds what only files know (bytes, schemes, the
manifest's weight errors) so that JSON, HTML and Markdown come from one object.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from v4quant import __version__
from v4quant.evaluation_memory import plan_evaluation, work_of
from v4quant.inspection import inspect_checkpoint
from v4quant.memory import return_freed_memory
from v4quant_calibration.corpus import Corpus
from v4quant_calibration.evaluate import Measures, Room, evaluate, evaluate_all
from v4quant_calibration.logits import LogitTile
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.scratch import Scratch
from v4quant_calibration.weight_error import WeightComparison, compare_weights
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME, read_manifest
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.shards import ShardWriter, plan_shard
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress, SilentProgress


class LogitsError(V4QuantError):
    """Logits that cannot be saved in the requested form."""


class EvaluationError(V4QuantError):
    """A combination of requests that makes no sense."""


SCORES_ONLY = Measures()
# What all candidates of a run have in common is told once.
SHARED = ("noise_floor", "coverage")


class LogitsFile:
    """Writes `logits` [sequences, length, vocab] F32 and `input_ids` as they are computed."""

    def __init__(self, path: Path, corpus: Corpus, vocab_size: int) -> None:
        """Plan the file. Raises LogitsError unless all windows have one length."""
        windows = corpus.windows
        lengths = {len(w) for w in windows}
        if len(lengths) != 1:
            raise LogitsError(
                f"{path}: --save-logits needs windows of one length, these have "
                f"{min(lengths)} to {max(lengths)} tokens; drop the short ones"
            )
        self._length, self._vocab = lengths.pop(), vocab_size
        shape = (len(windows), self._length, vocab_size)
        specs = [
            TensorSpec("logits", "F32", shape),
            TensorSpec("input_ids", "I64", (len(windows), self._length)),
        ]
        self._writer = ShardWriter(path, plan_shard(specs))
        self._writer.add("input_ids", torch.stack(windows))

    def __call__(self, piece: LogitTile) -> None:
        """Write one tile; the scored model's logits stand at index 1 (0 when alone)."""
        scored = piece.logits[1] if len(piece.logits) > 1 else piece.logits[0]
        scored = scored.float().cpu()
        if scored.shape[1] == self._vocab:
            self._writer.add_piece("logits", piece.start * self._vocab * 4, scored)
            return
        for row, values in enumerate(scored, piece.start):
            self._writer.add_piece("logits", (row * self._vocab + piece.first) * 4, values)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._writer.abort()


@dataclass(frozen=True)
class Resources:
    """max_memory: the most bytes an evaluation may take. scratch: folder for streams, which then
    always go there, so that the same evaluation goes on when it is started again after a crash.

    Without a scratch folder, streams go to files only when memory is short, below the user's cache
    folder.
    """

    max_memory: int | None = None
    scratch: Path | None = None


UNLIMITED = Resources()


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    save_logits: Path | None = None,
    weights: bool = True,
    measures: Measures = SCORES_ONLY,
    others: Sequence[Checkpoint] = (),
    resources: Resources = UNLIMITED,
) -> dict[str, Any]:
    """The full evaluation object (the schema of `evaluate --json` and of reports).

    weights: with a reference, also compare every matrix with its source and list what does not
    fit as `findings`. others: further conversions of the reference, evaluated in the same run;
    their figures are the entries of `others`. Raises what `evaluate` and `compare_weights`
    raise, LogitsError, SizeError for too little memory and OutputError for scratch files.
    """
    if others and (reference is None or save_logits is not None):
        raise EvaluationError(
            "several candidates need a --reference, and --save-logits only one candidate"
        )
    candidates = [checkpoint, *others]
    config = parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))
    work = work_of(corpus, len(candidates) if reference else 0, measures.floors, weights)
    plan = plan_evaluation(config, work, resources.max_memory, resources.scratch is not None)
    in_pieces = plan.apply(options)
    if resources.max_memory is not None:
        return_freed_memory()
    with ExitStack() as opened:
        room, scratch = Room(tile=plan.tile), None
        if plan.spill:
            key = _run_key([*candidates, *([reference] if reference else [])], corpus, in_pieces,
                           measures)  # fmt: skip
            scratch = opened.enter_context(Scratch(resources.scratch or _cache_folder(), key))
            room = Room(scratch, plan.tile)
        all_figures = _figures(
            candidates, reference, corpus, in_pieces, progress, save_logits, measures, room
        )
        compared = None
        if reference is not None and weights:
            compared = compare_weights(reference, candidates, progress)
        if scratch is not None:
            scratch.remove()
    if reference is not None:
        for index, (figures, candidate) in enumerate(zip(all_figures, candidates, strict=True)):
            _add_weights(figures, None if compared is None else compared[index], candidate)
    lengths = [len(w) for w in corpus.windows]
    result = {
        "reference": _facts(reference) if reference is not None else None,
        "candidate": _facts(checkpoint),
        "sequences": len(lengths),
        "seq_len": max(lengths),
        "activations": options.activations,
        **all_figures[0],
    }
    if others:
        result["others"] = [
            {"candidate": _facts(c)} | {k: v for k, v in f.items() if k not in SHARED}
            for c, f in zip(others, all_figures[1:], strict=True)
        ]
    return result


def _figures(
    candidates: Sequence[Checkpoint],
    reference: Checkpoint | None,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    save_logits: Path | None,
    measures: Measures,
    room: Room,
) -> list[dict[str, Any]]:
    """Each candidate's figures; logits are saved on the way, or nothing of them is left."""
    sink = None
    if save_logits is not None:
        sink = LogitsFile(save_logits, corpus, int(candidates[0].config["vocab_size"]))
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
    measures: Measures,
) -> str:
    """SHA-256 of all that decides a run's numbers: files, text, options, versions."""
    sha = hashlib.sha256()
    for part in (__version__, torch.__version__, repr(options), repr(measures)):
        sha.update(part.encode() + b"\0")
    for checkpoint in checkpoints:
        sha.update(checkpoint.digest().encode())
    for number, window in zip(corpus.part_of, corpus.windows, strict=True):
        sha.update(f"{number} {len(window)}:".encode())
        sha.update(window.numpy().tobytes())
    return sha.hexdigest()


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "v4quant"


def _add_weights(
    figures: dict[str, Any], compared: WeightComparison | None, checkpoint: Checkpoint
) -> None:
    """Weight errors by group, their mean and worst by layer, and the findings."""
    if compared is None:
        means = _manifest_errors(checkpoint)
        for row in figures["layers"]:
            row["weight_relative_rms"] = means.get(row["name"])
        return
    figures["findings"] = [vars(finding) for finding in compared.findings]
    figures["weights"] = [vars(group) for group in compared.groups]
    for row in figures["layers"]:
        experts = [g for g in compared.groups if g.stage == row["name"] and "*" in g.where]
        matrices = sum(g.matrices for g in experts)
        worst = max(experts, key=lambda g: g.largest)
        row["weight_relative_rms"] = sum(g.mean * g.matrices for g in experts) / matrices
        row["weight_largest"] = worst.largest
        row["weight_worst"] = worst.worst.rpartition(".ffn.experts.")[2]


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


def _manifest_errors(checkpoint: Checkpoint) -> dict[str, float]:
    """Mean relative RMS of the expert matrices of each stage, from the manifest if there is one."""
    if not (checkpoint.path / MANIFEST_NAME).exists():
        return {}
    by_stage: defaultdict[str, list[float]] = defaultdict(list)
    for row in read_manifest(checkpoint.path)["tensors"]:
        stage, found, _ = str(row.get("module")).partition(".ffn.experts.")
        if found:
            by_stage[stage].append(float(row.get("relative_rms", 0.0)))
    return {stage: sum(v) / len(v) for stage, v in by_stage.items()}
