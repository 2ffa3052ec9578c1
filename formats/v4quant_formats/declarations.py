"""What config.json declares, against what the tensors are and what every V4 release has.

Engines believe these statements, v4quant does not: it decodes by dtypes and shapes. So a false one
stops nothing here, but whoever works on the checkpoint is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.config_fields import is_integers, short
from v4quant_formats.deepseek_v4 import is_linear
from v4quant_formats.defect import Defect
from v4quant_formats.errors import WrongDtype
from v4quant_formats.model_config import ConfigError
from v4quant_formats.weights import StoredWeight

_ELEMENTS = {"fp4": ("e2m1",), "fp8": ("e4m3",)}
_FAMILY = re.compile(r"deepseek_v4(1)?(_[a-z]+)?")
_CLASSES = re.compile(r"DeepseekV4(1)?[A-Za-z]*For(CausalLM|ConditionalGeneration)")
_DTYPES = ("bfloat16", "float16", "float32", "auto")
# What goes with blocks of FP8 in every release and in every engine.
_BLOCK_FP8 = {"fmt": "e4m3", "activation_scheme": "dynamic"}
_BOOLEANS = ("tie_word_embeddings", "use_cache")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Numbers of the arithmetic in which no two releases of a family differ; nothing in the tensors
# tells them. V4.1's norms have another epsilon.
_CONSTANTS: Mapping[str, tuple[float, ...]] = {
    "rms_norm_eps": (1e-6, 1e-20),
    "hc_eps": (1e-6,),
    "hc_sinkhorn_iters": (20,),
    "rope_theta": (10_000,),
    "compress_rope_theta": (160_000,),
    "swiglu_limit": (10,),
}
_YARN_CONSTANTS: Mapping[str, tuple[float, ...]] = {
    "beta_fast": (32,),
    "beta_slow": (1,),
    "factor": (16,),
    "original_max_position_embeddings": (65_536,),
}


def false_statements(
    checkpoint: Checkpoint, stored: Mapping[str, StoredWeight]
) -> Iterator[Defect]:
    """Every statement of config.json that is false, or none at all."""
    yield from _of_counts(checkpoint)
    yield from _of_experts(checkpoint, stored)
    yield from _of_quantization(checkpoint, stored)
    yield from _of_block_fp8(checkpoint, stored)
    text = checkpoint.config.get("text_config")
    said = {**(text if isinstance(text, Mapping) else {}), **checkpoint.config}
    yield from _of_kinds(said)
    yield from _of_constants(said, _CONSTANTS)
    yarn = said.get("rope_scaling")
    yield from _of_constants(yarn if isinstance(yarn, Mapping) else {}, _YARN_CONSTANTS)


def _note(problem: str, kind: type[WrongDtype] | type[ConfigError] = WrongDtype) -> Defect:
    return Defect("", problem, kind, blocking=False)


def _of_counts(checkpoint: Checkpoint) -> Iterator[Defect]:
    """What reading has put right."""
    written = (checkpoint.written_config or {}).get("n_routed_experts")
    if isinstance(written, int) and written != checkpoint.config.get("n_routed_experts"):
        problem = f"config.json says {written} routed experts, every layer has "
        yield _note(problem + f"{checkpoint.config.get('n_routed_experts')}")
    tied = (checkpoint.written_config or {}).get("tie_word_embeddings")
    if tied is True and checkpoint.config.get("tie_word_embeddings") is False:
        problem = "config.json ties the head to the embedding, but there is a head of its own"
        yield _note(problem, ConfigError)


def _of_experts(checkpoint: Checkpoint, stored: Mapping[str, StoredWeight]) -> Iterator[Defect]:
    declared = checkpoint.config.get("quantization_config")
    inner = declared.get("expert_dtype") if isinstance(declared, Mapping) else None
    said = checkpoint.config.get("expert_dtype", inner)
    elements = _ELEMENTS.get(said) if isinstance(said, str) else None
    experts = {
        w.scheme.element if w.scheme else w.first.dtype
        for m, w in stored.items()
        if ".ffn.experts." in m
    }
    if said is None or not experts or (elements and experts & set(elements)):
        return
    has = ", ".join(sorted(experts))
    yield _note(f"config.json says expert_dtype {short(said)}, but the experts are stored as {has}")


def _of_quantization(
    checkpoint: Checkpoint, stored: Mapping[str, StoredWeight]
) -> Iterator[Defect]:
    declared = checkpoint.config.get("quantization_config")
    # V4.1's tables are rows under scales wherever nothing else is quantized.
    coded = sum(1 for w in stored.values() if w.scheme and not w.base and is_linear(w.module))
    if declared is not None and not isinstance(declared, Mapping):
        yield _note(f"config.json's quantization_config is {short(declared)}, no object")
    elif not declared and coded and not checkpoint.container:
        problem = f"config.json declares no quantization, but {coded:,} matrices are quantized; "
        yield _note(problem + "engines would read their codes as weights, or stop")
    elif (
        declared
        and stored
        and not any(w.scheme for w in stored.values())
        and declared.get("quant_method") is not None
    ):
        method = str(declared["quant_method"])[:40]
        yield _note(f"config.json declares quant_method {method!r}, but nothing is quantized")


def _of_block_fp8(checkpoint: Checkpoint, stored: Mapping[str, StoredWeight]) -> Iterator[Defect]:
    """What `quant_method: fp8` says of dense matrices in blocks, which engines believe."""
    declared = checkpoint.config.get("quantization_config")
    if not isinstance(declared, Mapping) or declared.get("quant_method") != "fp8":
        return
    coded = [w.scheme for m, w in stored.items() if w.scheme and is_linear(m) and not w.base]
    blocks = {s.block for s in coded if s.element == "e4m3" and s.block[0] > 1}
    said = declared.get("weight_block_size")
    if said is not None and blocks and said not in [list(block) for block in blocks]:
        has = " and ".join(f"{block[0]} x {block[1]}" for block in sorted(blocks))
        yield _note(f"config.json's weight_block_size is {short(said)}, the blocks are {has}")
    for key, wanted in _BLOCK_FP8.items():
        if declared.get(key, wanted) != wanted:
            yield _note(
                f"config.json's quantization says {key} {short(declared[key])}, not {wanted}"
            )


def _is_class(name: object) -> bool:
    return isinstance(name, str) and _CLASSES.fullmatch(name) is not None


def _of_kinds(config: Mapping[str, Any]) -> Iterator[Defect]:
    """Values that are of no use to anybody, and what every release says otherwise."""
    model = config.get("model_type")
    if model is not None and not (isinstance(model, str) and _FAMILY.fullmatch(model)):
        yield _note(f"config.json's model_type is {short(model)}, V4's is deepseek_v4", ConfigError)
    classes = config.get("architectures")
    named = isinstance(classes, list) and classes and all(map(_is_class, classes))
    if classes is not None and not named:
        yield _note(f"config.json's architectures is {short(classes)}, none of V4's", ConfigError)
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and config[key] not in _DTYPES:
            yield _note(f"config.json's {key} is {short(config[key])}, no dtype of weights")
    if config.get("rope_scaling") is None:
        problem = "config.json has no rope_scaling, but every V4 release scales positions by YaRN; "
        yield _note(problem + "if a tool dropped it, long texts come out wrong", ConfigError)
    for key in _BOOLEANS:
        if config.get(key) is not None and not isinstance(config[key], bool):
            yield _note(f"config.json's {key} is {short(config[key])}, not true or false")
    drafts = config.get("num_nextn_predict_layers", 0)
    if isinstance(drafts, bool) or not isinstance(drafts, int | None) or (drafts or 0) < 0:
        yield _note(f"config.json's num_nextn_predict_layers is {short(drafts)}, no count")
    size = config.get("vocab_size")
    vocabulary = size if isinstance(size, int) else 0
    for key in _TOKENS:
        said = config.get(key)
        tokens = said if isinstance(said, list) and said else [said]
        inside = is_integers(tokens) and all(0 <= token < vocabulary for token in tokens)
        if said is not None and not inside:
            yield _note(f"config.json's {key} is {short(said)}, no token's number", ConfigError)


def _of_constants(
    config: Mapping[str, Any], constants: Mapping[str, tuple[float, ...]]
) -> Iterator[Defect]:
    """Numbers that are the same in every release, and others here."""
    for key, usual in constants.items():
        said = config.get(key)
        if said is not None and said not in usual:
            problem = f"config.json's {key} is {short(said)}, every V4 release has {usual[0]:g}; "
            yield _note(problem + "right only for a model that was trained so", ConfigError)
