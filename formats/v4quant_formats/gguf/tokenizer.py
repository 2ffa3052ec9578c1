"""A release's tokenizer.json as llama.cpp's key-value pairs.

llama.cpp carries out byte-level BPE itself, from tokens, merges and the *name* of a pre-tokenizer,
whose regular expressions are in its code. The name is therefore chosen by comparing the expressions
of tokenizer.json with those llama.cpp has; when they differ there is no right name, and a wrong one
would tokenize almost everything well and some things wrongly, so the conversion is refused.

Added tokens flagged special are *control* tokens (matched only where a prompt is parsed, not
printed); the others, such as the thinking tags and the tool markup, are *user defined*: always
matched and printed. Source: llama.cpp's src/llama-vocab.cpp and conversion/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import UnknownTokenizer
from v4quant_formats.gguf.file import Field
from v4quant_formats.json_object import json_object
from v4quant_formats.sidecars import CHAT_TEMPLATE, TOKENIZER, place_of, small_file

V4_CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
V41_CHAT_TEMPLATE = Path(__file__).with_name("chat_template_v41.jinja")

# The expressions of llama.cpp's pre-tokenizer, in order -> its name.
_PRE = {
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r'[!"#$%&'
        "'"
        r"()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        "|[^\r\n"
        r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
        "[\r\n]*"
        r"|\s*"
        "[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ): "deepseek-v3",
}

PRE_TOKENIZERS = {name: patterns for patterns, name in _PRE.items()}
"""llama.cpp's name of a pre-tokenizer -> its expressions, in order."""


def tokenizer_fields(checkpoint: Checkpoint) -> list[Field]:
    """The tokenizer of a checkpoint as its small files have it, and the chat template.

    Without a tokenizer.json the model has no vocabulary: llama.cpp then takes token ids only.
    Raises UnknownTokenizer, or FormatError for files that cannot be read.
    """
    data, path = small_file(checkpoint, TOKENIZER), place_of(checkpoint, TOKENIZER)
    config = checkpoint.config
    if data is None:
        return [Field("tokenizer.ggml.model", GGUFValueType.STRING, "none")]
    table = json_object(data, path)
    is_v41 = isinstance(config.get("text_config"), Mapping)
    config = {**config["text_config"], **config} if is_v41 else config
    model = table.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UnknownTokenizer(f"{path}: is not byte-level BPE, which V4's tokenizer is")
    tokens, kinds = _tokens(path, table, model, int(config["vocab_size"]))
    fields = [
        Field("tokenizer.ggml.model", GGUFValueType.STRING, "gpt2"),
        Field("tokenizer.ggml.pre", GGUFValueType.STRING, _pre_tokenizer(path, table)),
        _array("tokens", GGUFValueType.STRING, tokens),
        _array("token_type", GGUFValueType.INT32, kinds),
    ]
    if merges := _merges(path, model):
        fields.append(_array("merges", GGUFValueType.STRING, merges))
    fields += _special(checkpoint, config, tokens) + _sampling(checkpoint)
    ours = V41_CHAT_TEMPLATE if is_v41 else V4_CHAT_TEMPLATE
    return fields + _template(checkpoint, tokens, ours)


def _array(name: str, element: GGUFValueType, values: list[Any]) -> Field:
    return Field(f"tokenizer.ggml.{name}", GGUFValueType.ARRAY, values, element)


def _tokens(
    path: Path, table: Mapping[str, Any], model: Mapping[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """Token texts by id and their kinds; ids that nothing uses are marked so."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    vocabulary, added = model.get("vocab"), table.get("added_tokens", [])
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise UnknownTokenizer(f"{path}: 'vocab' or 'added_tokens' is not of the usual form")
    entries: list[tuple[Any, Any, TokenType]] = [
        (text, number, TokenType.NORMAL) for text, number in vocabulary.items()
    ]
    for item in added:
        if not isinstance(item, dict):
            raise UnknownTokenizer(f"{path}: an entry of 'added_tokens' is not an object")
        special = item.get("special") is True
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        entries.append((item.get("content"), item.get("id"), kind))
    for text, number, kind in entries:
        if not isinstance(text, str) or not isinstance(number, int) or isinstance(number, bool):
            raise UnknownTokenizer(f"{path}: token {str(text)[:80]!r} has no number")
        if not 0 <= number < size:
            raise UnknownTokenizer(
                f"{path}: token {text[:80]!r} has number {number}, beyond config.json's "
                f"vocab_size {size}; the files belong to different models"
            )
        tokens[number], kinds[number] = text, int(kind)
    return tokens, kinds


def _merges(path: Path, model: Mapping[str, Any]) -> list[str]:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise UnknownTokenizer(f"{path}: 'merges' is not a list")
    lines = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        plain = isinstance(pair, list) and len(pair) == 2
        if not plain or not all(isinstance(p, str) and p and " " not in p for p in pair):
            raise UnknownTokenizer(f"{path}: merge {str(merge)[:80]!r} is not a pair of tokens")
        lines.append(" ".join(pair))
    return lines


def _pre_tokenizer(path: Path, table: Mapping[str, Any]) -> str:
    """llama.cpp's name for the splitting expressions."""
    steps = table.get("pre_tokenizer")
    listed = steps.get("pretokenizers") if isinstance(steps, dict) else None
    patterns: list[Any] = []
    for step in listed if isinstance(listed, list) else []:
        if isinstance(step, dict) and step.get("type") == "Split":
            pattern = step.get("pattern")
            patterns.append(pattern.get("Regex") if isinstance(pattern, dict) else None)
        elif not isinstance(step, dict) or step.get("type") != "ByteLevel":
            patterns.append(None)
    normalizer = table.get("normalizer")
    changes = isinstance(normalizer, dict) and normalizer.get("normalizers") != []
    name = None if changes else _PRE.get(tuple(patterns))
    if name is None:
        raise UnknownTokenizer(
            f"{path}: splits text by rules that none of llama.cpp's pre-tokenizers has; GGUF needs "
            "V4's own tokenizer"
        )
    return name


def _settings(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    data = small_file(checkpoint, name)
    return {} if data is None else json_object(data, place_of(checkpoint, name))


def _special(checkpoint: Checkpoint, config: Mapping[str, Any], tokens: list[str]) -> list[Field]:
    """Numbers of BOS, EOS and padding, and that the prompt brings its own BOS."""
    settings = _settings(checkpoint, "tokenizer_config.json")
    numbers = {"bos": config.get("bos_token_id"), "eos": config.get("eos_token_id")}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        text = settings.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if numbers.get(name) is None and isinstance(text, str) and text in tokens:
            numbers[name] = tokens.index(text)
    fields = [
        Field(f"tokenizer.ggml.{name}_token_id", GGUFValueType.UINT32, number)
        for name, number in numbers.items()
        if isinstance(number, int) and 0 <= number < len(tokens)
    ]
    for key in ("add_bos_token", "add_eos_token"):
        adds = settings.get(key) is True
        fields.append(Field(f"tokenizer.ggml.{key}", GGUFValueType.BOOL, adds))
    return fields


def _sampling(checkpoint: Checkpoint) -> list[Field]:
    """The release's own sampling, which llama.cpp takes as its defaults."""
    settings = _settings(checkpoint, "generation_config.json")
    return [
        Field(f"general.sampling.{name}", GGUFValueType.FLOAT32, float(value))
        for name, key in (("temp", "temperature"), ("top_p", "top_p"))
        if isinstance(value := settings.get(key), int | float) and not isinstance(value, bool)
    ]


def _template(checkpoint: Checkpoint, tokens: list[str], ours: Path) -> list[Field]:
    """The checkpoint's own chat template if it has one, else the release's encoding as `ours`."""
    own = small_file(checkpoint, CHAT_TEMPLATE)
    if own is None and isinstance(
        inner := _settings(checkpoint, "tokenizer_config.json").get("chat_template"), str
    ):
        own = inner.encode(errors="replace")
    if own is None and "<｜User｜>" not in tokens:
        return []
    text = (ours.read_bytes() if own is None else own).decode(errors="replace")
    return [Field("tokenizer.chat_template", GGUFValueType.STRING, text)]
