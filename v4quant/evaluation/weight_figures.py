"""What comparing weights adds to a candidate's figures: errors by group and layer, and findings.

What a conversion recorded of itself in its manifest is read here, too: the errors of its matrices,
against which they are measured again, and the source they are of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from v4quant_calibration.evaluation.output_gains import OutputGain, odd_outputs
from v4quant_calibration.evaluation.weight_error import Finding, WeightComparison
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME, read_manifest


def add_weights(
    figures: dict[str, Any], compared: WeightComparison | None, checkpoint: Checkpoint
) -> None:
    """Weight errors by group, their mean and worst by layer, and the findings."""
    if compared is None:
        means = _manifest_errors(checkpoint)
        for row in figures["layers"]:
            row["weight_relative_rms"] = means.get(row["name"])
        return
    found = [*compared.findings, *_odd_outputs(figures.get("layers", []), compared)]
    figures["findings"] = [vars(finding) for finding in found]
    figures["weights"] = [vars(group) for group in compared.groups]
    for row in figures.get("layers", []):
        experts = [g for g in compared.groups if g.stage == row["name"] and "*" in g.where]
        matrices = sum(g.matrices for g in experts)
        worst = max(experts, key=lambda g: g.largest)
        row["weight_relative_rms"] = sum(g.mean * g.matrices for g in experts) / matrices
        row["weight_largest"] = worst.largest
        row["weight_worst"] = worst.worst.rpartition(".ffn.experts.")[2]


def recorded_errors(reference: Checkpoint, candidate: Checkpoint) -> dict[str, float]:
    """Relative errors by module that the candidate's conversion from `reference` wrote down."""
    if source_digest(candidate) != reference.digest():
        return {}
    manifest = read_manifest(candidate.path)
    if not {s.file for s in candidate} <= {f["name"] for f in manifest["files"]}:
        return {}  # another file of the same folder
    rows = manifest["tensors"]
    found = {r.get("module"): r.get("relative_rms", 0.0) for r in rows if isinstance(r, dict)}
    return {
        m: float(e) for m, e in found.items() if isinstance(m, str) and isinstance(e, int | float)
    }


def source_digest(checkpoint: Checkpoint) -> str | None:
    """Digest of what a checkpoint was converted from, where its manifest says."""
    if not (checkpoint.path / MANIFEST_NAME).exists():
        return None
    source = read_manifest(checkpoint.path).get("source")
    digest = source.get("digest") if isinstance(source, dict) else None
    return digest if isinstance(digest, str) else None


def _odd_outputs(rows: Sequence[Mapping[str, Any]], compared: WeightComparison) -> list[Finding]:
    """Layers whose experts answer louder or softer than others', but for those told of already."""
    told = {f.where.partition(".ffn.experts")[0] for f in compared.findings}
    experts = [g for g in compared.groups if "*" in g.where]
    schemes = {
        row["name"]: ", ".join(g.scheme for g in experts if g.stage == row["name"]) for row in rows
    }
    gains = {
        row["name"]: OutputGain(row["expert_gain"], row["expert_gain_stderr"])
        for row in rows
        if row.get("expert_gain") is not None
    }
    odd = (Finding(*pair) for pair in odd_outputs(gains, schemes))
    return [f for f in odd if f.where.partition(".ffn.experts")[0] not in told]


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
