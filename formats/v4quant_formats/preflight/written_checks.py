"""Checks of what stands in the files where v4quant reads it otherwise.

v4quant translates other tools' names and configs (naming.py); engines do so by rules of their own,
or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from v4quant_formats.checkpoint import INDEX_NAME, MAX_INDEX_BYTES, SINGLE_NAME
from v4quant_formats.json_object import read_json_object
from v4quant_formats.model_config import ConfigError
from v4quant_formats.preflight.survey import Check, Finding, Survey

_REWRITE = "convert it with v4quant quantize (--scheme mxfp4 keeps every value)"
# transformers translates the release's names wherever they begin with `model.` too, but for those
# its rules look for at the very beginning.
_ANCHORED = re.compile(r"model\.(embed|head)\.weight|model\.hc_head_(fn|base|scale)")
_NESTED = "text_config"


def other_names(survey: Survey) -> Iterator[Finding]:
    """Tensors under names that the release does not have."""
    engine, renamed = survey.declaration.engine, survey.checkpoint.renamed
    if engine.name == "transformers":
        lost = [name for name in renamed.values() if _ANCHORED.fullmatch(name)]
        problem = "transformers knows this name only without 'model.' or under its own; the tensor "
        problem += "is left at random values, with a warning"
    else:
        lost = list(renamed.values())
        problem = f"is not the release's name; {engine.title} "
        problem += "stops" if engine.unknown_names == "error" else "drops it and computes nonsense"
    if lost:
        yield Finding("error", "name", lost[0], problem, _REWRITE, len(lost))


def index_metadata(survey: Survey) -> Iterator[Finding]:
    """transformers reads the index's metadata, and needs an index for more than one file."""
    checkpoint = survey.checkpoint
    if survey.declaration.engine.name != "transformers" or checkpoint.origin is not None:
        return
    path = checkpoint.path / INDEX_NAME
    if not path.is_file():
        if len(checkpoint.files) > 1:
            problem = "transformers finds no model without it"
            yield Finding("error", "index", INDEX_NAME, problem, _REWRITE)
        return
    try:
        index = read_json_object(path, MAX_INDEX_BYTES)
    except ConfigError:
        return
    if not isinstance(index.get("metadata"), dict):
        problem = "has no 'metadata' object, which transformers' loader needs (KeyError)"
        remedy = 'add "metadata": {"total_size": ...} to it, or ' + _REWRITE
        yield Finding("error", "index", INDEX_NAME, problem, remedy)


def stray_file(survey: Survey) -> Iterator[Finding]:
    """transformers looks for model.safetensors before it looks for an index."""
    if survey.declaration.engine.name == "transformers" and SINGLE_NAME in survey.checkpoint.beside:
        problem = "lies beside the index and the shards it names; transformers loads this file "
        problem += "alone and leaves all that it lacks at random values"
        yield Finding("error", "stray", SINGLE_NAME, problem, "move it to another folder")


def nested_config(survey: Survey) -> Iterator[Finding]:
    """A V4 config nested as V4.1's is."""
    written = survey.checkpoint.written_config or {}
    if survey.config.v41 is None and isinstance(written.get(_NESTED), Mapping):
        problem = "V4's keys are nested under 'text_config', where its engines do not look"
        yield Finding("error", "config", "config.json", problem, _REWRITE)


def expert_count(survey: Survey) -> Iterator[Finding]:
    """Engines believe config.json's number of experts, v4quant the tensors'."""
    said = (survey.checkpoint.written_config or {}).get("n_routed_experts")
    if isinstance(said, int) and survey.config.v41 is None:
        held = survey.config.n_routed_experts
        if said != held:
            problem = f"'n_routed_experts' is {said}, but every layer has {held}"
            yield Finding("error", "missing", "config.json", problem, _REWRITE)


def four_bit_dtype(survey: Survey) -> Iterator[Finding]:
    """safetensors' F4, which transformers cannot reshape."""
    if survey.declaration.engine.name != "transformers":
        return
    held = [s.name for s in survey.checkpoint if s.is_f4]
    if held:
        problem = "stored as F4; transformers' dequantizer takes I8 and U8 (RuntimeError)"
        yield Finding("error", "dtype", held[0], problem, _REWRITE, len(held))


def fp8_expert_scales(survey: Survey) -> Iterator[Finding]:
    """vLLM up to 0.33 copies the byte of an E8M0 scale into its float32 scale."""
    if survey.declaration.engine.name != "vllm" or survey.declaration.method != "fp8":
        return
    wrong = [
        f"{name}.{part}"
        for name, module in survey.modules.items()
        if module.name.expert is not None and module.parts.get("weight", ("",))[0] == "F8_E4M3"
        for part, (dtype, _) in module.parts.items()
        if dtype in ("F8_E8M0", "U8")
    ]
    if wrong:
        problem = "FP8 experts with E8M0 scales load in vLLM up to 0.33 and compute nonsense: the "
        problem += "scale's byte is copied into a float32 (vllm#43416)"
        remedy = "write float32 scales: v4quant quantize --scheme fp8, which changes no value"
        yield Finding("error", "scale-dtype", wrong[0], problem, remedy, len(wrong))


WRITTEN_CHECKS: tuple[Check, ...] = (
    other_names,
    index_metadata,
    stray_file,
    nested_config,
    expert_count,
    four_bit_dtype,
    fp8_expert_scales,
)
