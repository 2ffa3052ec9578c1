"""Evaluation as users see it: the forward pass's figures plus sizes, weight errors and logits.

`calibration.evaluate` knows models and tokens; this adds what only files know (bytes, schemes, the
manifest's weight errors) so that JSON, HTML and Markdown come from one object.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from v4quant.inspection import inspect_checkpoint
from v4quant_calibration.corpus import Corpus
from v4quant_calibration.evaluate import Measures, evaluate, evaluate_all
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.stream import LogitSlice
from v4quant_calibration.weight_error import WeightComparison, compare_weights
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME, read_manifest
from v4quant_formats.shards import ShardWriter
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
        self._writer = ShardWriter(path, specs)
        self._writer.add("input_ids", torch.stack(windows))

    def __call__(self, piece: LogitSlice) -> None:
        """Write one slice; the scored model's logits stand at index 1 (0 when alone)."""
        scored = piece.logits[1] if len(piece.logits) > 1 else piece.logits[0]
        first = (piece.sequence * self._length + piece.start) * self._vocab * 4
        self._writer.add_piece("logits", first, scored.float().cpu())

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._writer.abort()


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
) -> dict[str, Any]:
    """The full evaluation object (the schema of `evaluate --json` and of reports).

    weights: with a reference, also compare every matrix with its source and list what does not
    fit as `findings`. others: further conversions of the reference, evaluated in the same run;
    their figures are the entries of `others`. Raises what `evaluate` and `compare_weights`
    raise, and LogitsError.
    """
    if others and (reference is None or save_logits is not None):
        raise EvaluationError(
            "several candidates need a --reference, and --save-logits only one candidate"
        )
    sink = None
    if save_logits is not None:
        sink = LogitsFile(save_logits, corpus, int(checkpoint.config["vocab_size"]))
    candidates = [checkpoint, *others]
    try:
        if reference is None:
            all_figures = [evaluate(checkpoint, None, corpus, options, progress, sink, measures)]
        else:
            all_figures = evaluate_all(
                candidates, reference, corpus, options, progress, sink, measures
            )
    except BaseException:
        if sink is not None:
            sink.abort()
        raise
    if sink is not None:
        sink.close()
    lengths = [len(w) for w in corpus.windows]
    if reference is not None:
        compared = compare_weights(reference, candidates, progress) if weights else None
        for index, (figures, candidate) in enumerate(zip(all_figures, candidates, strict=True)):
            _add_weights(figures, None if compared is None else compared[index], candidate)
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
