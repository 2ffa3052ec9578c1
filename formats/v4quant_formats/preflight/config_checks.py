"""Checks of config.json: its keys, `quantization_config`, drafts; and of the files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from v4quant_formats.deepseek_v4 import draft_stages
from v4quant_formats.model_config import ConfigError
from v4quant_formats.preflight.declared import bad_patterns
from v4quant_formats.preflight.survey import Check, Finding, Survey
from v4quant_formats.sidecars import TOKENIZER, token_map_of

REMEDY = "write it with v4quant quantize (--engine for vLLM and SGLang), or correct "
REMEDY += "quantization_config to what the file holds"
_TITLES = {"v4": "V4", "v41": "V4.1"}
_RESTORE = "restore the key from the release's config.json"


def _raw(survey: Survey) -> Mapping[str, Any]:
    return survey.checkpoint.written_config or survey.checkpoint.config


def _text(survey: Survey) -> Mapping[str, Any]:
    """The table with the language model's keys, as it is written."""
    raw = _raw(survey)
    inner = raw.get("text_config")
    return inner if isinstance(inner, dict) else raw


def method(survey: Survey) -> Iterator[Finding]:
    """`quant_method` must be one the engine takes."""
    engine, found = survey.declaration.engine, survey.declaration.method
    if found in engine.methods:
        return
    if found in engine.others:
        text = f"quant_method '{found}': {engine.title} accepts it, but it is not modelled here"
        yield Finding("note", "quant-method", "config.json", text, "try it, or read its docs")
        return
    known = ", ".join(m or "none" for m in (*engine.methods, *engine.others))
    text = f"quant_method '{found}' is none that {engine.title} takes for V4 ({known})"
    yield Finding("error", "quant-method", "config.json", text, engine.advice or REMEDY)


def release(survey: Survey) -> Iterator[Finding]:
    """The engine must have a class for the release."""
    engine, own = survey.declaration.engine, survey.declaration.release
    if own not in engine.releases:
        problem = f"{engine.title} has no class for {_TITLES[own]} in the versions known here"
        yield Finding("error", "release", "config.json", problem, "serve it with vLLM or SGLang")


def config_keys(survey: Survey) -> Iterator[Finding]:
    """Keys the engine reads, with the values V4 needs."""
    raw, text = _raw(survey), _text(survey)
    for rule in survey.declaration.engine.config:
        if survey.config.v41 is not None and not rule.every_release:
            continue
        value = text.get(rule.key)
        if value is None and any(k in text for k in rule.instead):
            continue
        if rule.allows(value):
            continue
        wanted = f", expected {rule.allowed[0]!r}" if rule.allowed else ""
        problem = f"'{rule.key}' is {value!r}{wanted}: {rule.consequence}"
        yield Finding(rule.severity, "config-key", "config.json", problem, _RESTORE)
    if raw.get("model_type") not in ("deepseek_v4", "deepseek_v41"):
        problem = f"'model_type' is {raw.get('model_type')!r}; no V4 class is chosen"
        yield Finding("error", "config-key", "config.json", problem, "set it to deepseek_v4")
    if survey.declaration.method == "compressed-tensors" and "expert_dtype" in raw:
        problem = "'expert_dtype' is left beside compressed-tensors; it makes engines look for "
        problem += "native experts"
        yield Finding("warning", "expert-dtype", "config.json", problem, "remove the key")


def patterns(survey: Survey) -> Iterator[Finding]:
    """Targets and ignores must compile, and targets must meet something."""
    declaration = survey.declaration
    if declaration.method != "compressed-tensors":
        return
    for entry in bad_patterns(declaration):
        problem = f"'{entry[:80]}' in quantization_config is not a regular expression"
        yield Finding("error", "pattern", "config.json", problem, "correct the pattern")
    if not declaration.groups:
        problem = "compressed-tensors without config_groups declares nothing"
        yield Finding("error", "pattern", "config.json", problem, REMEDY)


def model(survey: Survey) -> Iterator[Finding]:
    """Which class an engine builds, in which dtype, with which head."""
    raw, text = _raw(survey), _text(survey)
    classes = raw.get("architectures")
    named = classes if isinstance(classes, list) else []
    if survey.declaration.engine.reads_architectures and not any(
        str(c).startswith("DeepseekV4") for c in named
    ):
        problem = f"'architectures' is {classes!r}; the engine chooses its model class by it"
        yield Finding("error", "config-key", "config.json", problem, _RESTORE)
    if text.get("tie_word_embeddings"):
        problem = "'tie_word_embeddings' is true: 'embed' is used as the head, 'head' is dropped"
        yield Finding("error", "config-key", "config.json", problem, "set it to false")
    dtype = text.get("dtype", text.get("torch_dtype", raw.get("torch_dtype")))
    if dtype in ("float16", "half"):
        problem = "the model's dtype is float16; V4's streams exceed its range"
        yield Finding("warning", "config-key", "config.json", problem, "set it to bfloat16")


def block_fp8(survey: Survey) -> Iterator[Finding]:
    """What `quant_method: fp8` says beside the block size."""
    declaration = survey.declaration
    if declaration.method != "fp8":
        return
    table = declaration.quantization
    for key, wanted in (("activation_scheme", "dynamic"), ("fmt", "e4m3")):
        if table.get(key, wanted) != wanted:
            problem = (
                f"'{key}' is {table[key]!r}; with blocks of scales engines take '{wanted}' only"
            )
            yield Finding("error", "quantization", "config.json", problem, f"set it to {wanted}")
    if str(table.get("scale_fmt")) != "ue8m0":
        dense = (m for m in survey.modules.values() if m.name.expert is None)
        stored = [m for m in dense if _is_e8m0(m.parts) and m.name.role != "engram tables"]
        if stored:
            problem = "scales are F8_E8M0, but 'scale_fmt' does not say ue8m0"
            name = f"{stored[0].name.module}.scale"
            yield Finding("warning", "quantization", name, problem, "add it", len(stored))
    if not declaration.nvfp4_experts:
        return
    engine = declaration.engine
    keys = (("group_size", 16), ("quant_algo", "MIXED_PRECISION"))
    for key, expected in keys:
        absent = engine.needs_nvfp4_keys and key not in table
        if absent or (key == "group_size" and table.get(key, expected) != expected):
            problem = f"'{key}' is {table.get(key)!r}; NVFP4 experts need {expected!r}"
            yield Finding("error", "quantization", "config.json", problem, f"set it to {expected}")


def _is_e8m0(parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    return parts.get("scale", ("", ()))[0] == "F8_E8M0"


def compressed(survey: Survey) -> Iterator[Finding]:
    """What a compressed-tensors table promises beyond groups and ignores."""
    declaration = survey.declaration
    if declaration.method != "compressed-tensors":
        return
    table = declaration.quantization

    def found(severity: str, key: str, consequence: str, remedy: str) -> Finding:
        problem = f"'{key}' is {str(table[key])[:60]}: {consequence}"
        return Finding(severity, "quantization", "config.json", problem, remedy)

    if table.get("quantization_status", "compressed") != "compressed":
        text = "weights are looked for unpacked"
        severity = "error" if declaration.engine.first_group else "warning"
        yield found(severity, "quantization_status", text, "set it to compressed")
    if table.get("kv_cache_scheme"):
        text = "scales of the cache are expected; V4's files have none, so 1.0 is taken"
        yield found("warning", "kv_cache_scheme", text, "set it to null")
    if table.get("transform_config"):
        yield found("error", "transform_config", "V4 classes apply no rotations", "undo them")
    sparsity = table.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        yield found(
            "error", "sparsity_config", "engines read no sparse weights", "write them dense"
        )


def drafts(survey: Survey) -> Iterator[Finding]:
    """Draft stages promised by config.json but absent, or ignored by the engine."""
    text, title = _text(survey), survey.declaration.engine.title
    spark = "dspark_target_layer_ids" in text
    promised = text.get("num_nextn_predict_layers") or 0
    present = len(draft_stages(survey.modules))
    if (promised or spark) and not present:
        problem = "config.json promises draft stages, and the file has none; speculative decoding "
        problem += "cannot start"
        remedy = "set num_nextn_predict_layers to 0 and remove dspark_*, or add the mtp.* shard"
        yield Finding("warning", "drafts", "config.json", problem, remedy)
    if present and survey.declaration.engine.drafts == "ignored":
        problem = f"{title} ignores draft stages (mtp.*)"
        yield Finding("note", "drafts", "mtp.0", problem, "nothing to do")
    elif present and not spark and promised != present:
        problem = f"'num_nextn_predict_layers' is {promised!r}, the file has {present} draft stages"
        remedy = f"set it to {present}, or remove the mtp.* tensors"
        yield Finding("warning", "drafts", "config.json", problem, remedy)


def sidecars(survey: Survey) -> Iterator[Finding]:
    """The tokenizer's two files travel together; a folder with neither is for other tools."""
    names = ("tokenizer.json", "tokenizer_config.json")
    there = [n for n in names if (survey.checkpoint.path / n).is_file()]
    remedy = "copy tokenizer.json and tokenizer_config.json from the release"
    if len(there) == 1:
        (absent,) = set(names) - set(there)
        problem = f"'{there[0]}' came without '{absent}'; text is read wrongly or not at all"
        yield Finding("warning", "sidecar", absent, problem, remedy)
    elif not there:
        problem = "no tokenizer lies beside the weights; servers stop, or need --tokenizer"
        yield Finding("note", "sidecar", names[0], problem, remedy)


def engram_tokenizer(survey: Survey) -> Iterator[Finding]:
    """Engram's rows are hashed from the tokenizer's texts, and engines stop at another count."""
    tokenizer, v41 = survey.checkpoint.path / TOKENIZER, survey.config.v41
    if v41 is None or not v41.engram_layer_ids or not tokenizer.is_file():
        return
    try:
        token_map_of(survey.checkpoint, survey.config.vocab_size, v41.engram_compressed_vocab_size)
    except ConfigError as error:
        problem = str(error).removeprefix(f"{tokenizer}: ")
        remedy = "copy tokenizer.json from the release"
        yield Finding("error", "tokenizer", "tokenizer.json", problem, remedy)


CONFIG_CHECKS: tuple[Check, ...] = (
    release,
    method,
    config_keys,
    model,
    block_fp8,
    compressed,
    patterns,
    drafts,
    sidecars,
    engram_tokenizer,
)
