"""The run file that makes a candidate: what `plan --write` hands to `run`."""

from __future__ import annotations

import json

from v4quant.planner.candidates import Candidate, PlanError
from v4quant_kernels.scheme import get_scheme

_SEQ_LEN = 2048
_EVALUATED = 8192


def run_file(candidate: Candidate, source: str) -> str:
    """TOML text. Raises PlanError for a release as it is, and for a mixture, which is allocated."""
    recipe, cost = candidate.recipe, candidate.cost
    if recipe is None:
        why = (
            "it is a mixture of schemes, which `allocate` chooses first (its commands say how)"
            if candidate.budget
            else "it is the release as it is, so there is nothing to run"
        )
        raise PlanError(f"no run file for {candidate.scheme}: {why}; take another with --choice")
    lines = [f"source = {json.dumps(source)}"]
    if cost is not None and cost.level.tokens:
        lines += [
            "", "[calibrate]", 'corpus = ["builtin:mixed-calibration"]',
            f"tokens = {cost.level.tokens}", f"seq_len = {_SEQ_LEN}",
        ]  # fmt: skip
        if "--no-propagate" in cost.level.options:
            lines.append("propagate = false")
    lines += ["", "[quantize]", f"scheme = {json.dumps(recipe.scheme)}"]
    for key in ("format", "engine", "dense", "engram", "draft"):
        value = getattr(recipe, key)
        if value not in ("", "neutral", "convert"):
            lines.append(f"{key} = {json.dumps(value)}")
    if cost is not None and get_scheme(recipe.scheme).coder:  # else `run` would choose it anew
        lines.append(f'solver = "{"gptq" if cost.level.solves else "optimal"}"')
    lines += ["", "[verify]", "source = true", "kernels = false"]
    if candidate.loss.basis != "exact":
        lines += [
            "", "[evaluate]", 'corpus = ["builtin:mixed-heldout"]',
            f"tokens = {_EVALUATED}", f"seq_len = {_SEQ_LEN}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"
