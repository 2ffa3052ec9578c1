"""Preflight of GGUF: is the model whole, in the types and with the metadata llama.cpp needs?

A GGUF file describes itself, so there is no declaration to resolve, and its reader has refused what
is malformed. What is left is what llama.cpp's loader asks for, and what it replaces by a default
that is not V4's when it is absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from v4quant_formats.engines.llama_cpp import ARCHITECTURES, TYPES
from v4quant_formats.errors import FormatError
from v4quant_formats.gguf.carried import trunk_header
from v4quant_formats.gguf.names import V41_ARCHITECTURE
from v4quant_formats.gguf.vocabulary import lacks
from v4quant_formats.preflight.survey import Check, Finding, Survey
from v4quant_formats.spec import DTYPE_BITS
from v4quant_formats.weights import find_weight
from v4quant_kernels.ggml_types import block_type

_REMEDY = "convert again; the file was damaged or written wrongly"
_CARRY = "convert again with --tokenizer"
_V41 = ARCHITECTURES[V41_ARCHITECTURE]

# Key below the architecture -> value it must have.
_NEEDED: dict[str, Any] = {
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "attention.head_count_kv": 1,
}


def shapes(survey: Survey) -> Iterator[Finding]:
    """Every module decodable, and of the shape the metadata implies; hash tables of integers."""
    for name, module in survey.modules.items():
        dtype = next(iter(module.parts.values()))[0]
        if dtype not in DTYPE_BITS and block_type(dtype) is None:
            problem = f"its values are not readable here ({dtype}), so they were not looked at"
            yield Finding("note", "dtype", name, problem, "llama.cpp's own tools read them")
            continue
        try:
            shape = find_weight(survey.checkpoint, name).shape
        except FormatError as error:
            yield Finding("error", "dtype", name, str(error), _REMEDY)
            continue
        if module.shape is not None and shape != module.shape:
            problem = f"shape is {list(shape)}, the metadata implies {list(module.shape)}"
            yield Finding("error", "shape", name, problem, _REMEDY)
        if name.endswith(".tid2eid") and dtype != "I32":
            problem = f"the table of hash-routed experts is {dtype}; llama.cpp reads I32"
            yield Finding("error", "dtype", name, problem, _REMEDY)


def numbers(survey: Survey) -> Iterator[Finding]:
    """Metadata that no tensor confirms."""
    metadata, file = _metadata(survey)
    architecture = metadata["general.architecture"]
    for key, wanted in _NEEDED.items():
        value = metadata.get(f"{architecture}.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value != wanted:
            problem = f"'{architecture}.{key}' is {value!r}, V4 needs {wanted!r}"
            yield Finding("error", "metadata", file, problem, _REMEDY)
    config = survey.checkpoint.config.get("text_config", survey.checkpoint.config)
    layers = config["num_hidden_layers"]
    blocks = metadata.get(f"{architecture}.block_count")
    if blocks not in (layers, layers + config.get("num_nextn_predict_layers", 0)):
        problem = f"'{architecture}.block_count' is {blocks!r}, the tensors make {layers} layers"
        yield Finding("error", "metadata", file, problem, _REMEDY)
    scaling = f"{architecture}.rope.scaling"
    if f"{scaling}.factor" in metadata and f"{scaling}.type" not in metadata:
        problem = f"'{scaling}.type' is absent; YaRN's other keys are then taken as linear scaling"
        yield Finding("warning", "metadata", file, problem, _REMEDY)
    for key in ("sliding_window", "index_topk"):
        if not config.get(key):
            problem = f"'{key}' is {config.get(key)!r}; attention sees nothing"
            yield Finding("error", "metadata", file, problem, _REMEDY)


def v41_keys(survey: Survey) -> Iterator[Finding]:
    """V4.1's keys are those of a build older than what mainline writes; nobody compared headers."""
    metadata, file = _metadata(survey)
    if metadata["general.architecture"] == V41_ARCHITECTURE:
        problem = (
            f"the keys of '{V41_ARCHITECTURE}' are those of llama.cpp's pull request "
            f"{_V41.pull} and its loader; mainline loads V4.1 since build {_V41.build}, and which "
            "keys its own converter writes was not seen"
        )
        remedy = "load the first shards before sending all; llama.cpp names a key it lacks"
        yield Finding("note", "metadata", file, problem, remedy)


def builds(survey: Survey) -> Iterator[Finding]:
    """Types that builds which know the architecture may not know yet."""
    metadata, file = _metadata(survey)
    known = ARCHITECTURES[metadata["general.architecture"]].build
    held = {next(iter(module.parts.values()))[0] for module in survey.modules.values()}
    for dtype in sorted(held & TYPES.keys()):
        since = TYPES[dtype]
        if since.build > known:
            problem = (
                f"{dtype} loads in llama.cpp from build {since.build} ({since.date}) on, while "
                f"build {known} knows the model already; {since.where}"
            )
            remedy = f"update llama.cpp, or convert to {since.instead} for older builds"
            yield Finding("note", "build", file, problem, remedy)


def tokenizer(survey: Survey) -> Iterator[Finding]:
    """The vocabulary must be there, and as large as the embedding."""
    metadata, file = _metadata(survey)
    rows = next(iter(survey.modules["embed"].parts.values()))[1][0]
    for lack in lacks(metadata, rows):
        remedy = _CARRY if lack.severity != "note" else "pass --chat-template-file"
        yield Finding(lack.severity, "tokenizer", file, lack.problem, remedy)


def _metadata(survey: Survey) -> tuple[Mapping[str, Any], str]:
    """Metadata of the trunk's first file, and its name."""
    checkpoint = survey.checkpoint
    header = trunk_header(checkpoint)
    assert header is not None, "opened as GGUF"
    return header.metadata, sorted(checkpoint.files)[0]


GGUF_CHECKS: tuple[Check, ...] = (shapes, numbers, v41_keys, builds, tokenizer)
