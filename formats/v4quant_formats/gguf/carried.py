"""What a GGUF file carries besides weights, for the files and the GGUF made from it.

A lone .gguf has its tokenizer, chat template, sampling defaults and origin in its metadata. A GGUF
made from it gets these pairs as they are, types and all; a folder of safetensors gets them as the
files that transformers and v4quant read: tokenizer.json (byte-level BPE, built from tokens, merges
and the pre-tokenizer's expressions), tokenizer_config.json, chat_template.jinja,
generation_config.json. Files that lie beside the .gguf are better, and come first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from functools import lru_cache
from typing import Any

from gguf import GGUFValueType, TokenType

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import UnknownTokenizer
from v4quant_formats.gguf.file import Field
from v4quant_formats.gguf.header import GgufHeader
from v4quant_formats.gguf.names import ARCHITECTURE, V41_ARCHITECTURE
from v4quant_formats.gguf.tokenizer import PRE_TOKENIZERS, tokenizer_fields
from v4quant_formats.sidecars import CHAT_TEMPLATE, TOKENIZER

# Said anew by whoever writes a file.
_OWN = (
    "general.architecture", "general.type", "general.file_type", "general.quantization_version",
    "general.alignment",
)  # fmt: skip
_TOKENIZER = "tokenizer."
_TEMPLATE = "tokenizer.chat_template"


def trunk_header(checkpoint: Checkpoint) -> GgufHeader | None:
    """The header of the file with the model's metadata; None for other containers."""
    found: GgufHeader | None = None
    for name in sorted(checkpoint.container):
        if "-of-" in name and "-00001-of-" not in name:
            continue
        header: GgufHeader = checkpoint.container[name]
        if header.metadata.get("general.architecture") in (ARCHITECTURE, V41_ARCHITECTURE):
            if not header.metadata.get(f"{ARCHITECTURE}.nextn_predict_layers"):
                return header
            found = found or header
    return found


def carried_fields(checkpoint: Checkpoint) -> list[Field]:
    """Tokenizer and origin as pairs of a new GGUF file.

    A GGUF source's pairs as they are; its tokenizer only where it has one and none is given for it,
    else that of the small files. Raises UnknownTokenizer or FormatError.
    """
    header = trunk_header(checkpoint)
    if header is None:
        return tokenizer_fields(checkpoint)
    given = checkpoint.tokenizer is not None or not _has_tokens(header.metadata)
    found = {f.key: f for f in tokenizer_fields(checkpoint)} if given else {}
    whole = len(found) > 1  # a tokenizer, not the statement that there is none
    for key, value in header.metadata.items():
        words = key.startswith(_TOKENIZER) and not whole
        if (words or key.startswith("general.")) and key not in _OWN:
            kind, element = _types(header, key)
            found[key] = Field(key, kind, value, element)
    return list(found.values())


def _types(header: GgufHeader, key: str) -> tuple[GGUFValueType, GGUFValueType | None]:
    kind, element = header.types[key]
    return GGUFValueType(kind), None if element is None else GGUFValueType(element)


def _has_tokens(metadata: Mapping[str, Any]) -> bool:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return isinstance(tokens, list) and bool(tokens)


def carried_files(metadata: Mapping[str, Any], where: str) -> dict[str, Callable[[], bytes]]:
    """Files that say what a GGUF's metadata says of its tokenizer, template and sampling, each made
    when it is called.

    Those calls raise UnknownTokenizer for a tokenizer that has no such files.
    """
    files: dict[str, Callable[[], bytes]] = {}
    if _has_tokens(metadata):
        files[TOKENIZER] = lambda: _tokenizer_json(metadata, where)
        files["tokenizer_config.json"] = lambda: _tokenizer_config(metadata)
    template = metadata.get(_TEMPLATE)
    if isinstance(template, str):
        files[CHAT_TEMPLATE] = lambda: template.encode(errors="replace")
    if sampling := _sampling(metadata):
        files["generation_config.json"] = lambda: _json(sampling)
    return {name: lru_cache(maxsize=1)(make) for name, make in files.items()}


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json's object; empty where the file names no way of sampling."""
    sampling = {
        name: metadata[key]
        for name, key in (
            ("temperature", "general.sampling.temp"),
            ("top_p", "general.sampling.top_p"),
        )
        if isinstance(metadata.get(key), float)
    }
    ids = {
        f"{name}_token_id": number
        for name in ("bos", "eos")
        if type(number := metadata.get(f"tokenizer.ggml.{name}_token_id")) is int
    }
    rounded = {k: float(f"{v:.6g}") for k, v in sampling.items()}
    return {**ids, "do_sample": True, **rounded} if sampling else {}


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode(
        errors="backslashreplace"
    )


def _tokenizer_json(metadata: Mapping[str, Any], where: str) -> bytes:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type")
    merges, pre = metadata.get("tokenizer.ggml.merges"), metadata.get("tokenizer.ggml.pre")
    patterns = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    remedy = "put the release's tokenizer.json beside the file, or give it by --tokenizer"
    if metadata.get("tokenizer.ggml.model") != "gpt2" or patterns is None:
        model = f"{metadata.get('tokenizer.ggml.model')!r}, {pre!r}"
        raise UnknownTokenizer(
            f"{where}: its tokenizer ({model[:80]}) is not V4's byte-level BPE, so no "
            f"tokenizer.json can be made from it; {remedy}"
        )
    if not all(isinstance(t, str) for t in tokens) or not (
        isinstance(merges, list) and all(isinstance(m, str) for m in merges)
    ):
        raise UnknownTokenizer(f"{where}: its tokens or merges are not text; {remedy}")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise UnknownTokenizer(f"{where}: it does not say which tokens are special; {remedy}")
    special, unused = int(TokenType.CONTROL), int(TokenType.UNUSED)
    added = [
        {
            "id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == special,
        }
        for number, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (special, int(TokenType.USER_DEFINED))
    ]  # fmt: skip
    vocabulary = {t: n for n, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k != unused}
    split = {"behavior": "Isolated", "invert": False}
    steps = [{"type": "Split", "pattern": {"Regex": p}, **split} for p in patterns]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    pairs = [_pair(merge, where, vocabulary) for merge in merges]
    if len({*tokens}) != len(tokens):
        raise UnknownTokenizer(f"{where}: it has a token twice; {remedy}")
    return _json(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": []},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]},
            "post_processor": {**level, "add_prefix_space": True, "trim_offsets": False,
                               "use_regex": True},
            "decoder": {**level, "add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None,
                "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary,
                "merges": pairs,
            },
        }
    )  # fmt: skip


def _pair(merge: str, where: str, vocabulary: Container[str]) -> list[str]:
    pair = merge.split(" ")
    if len(pair) != 2 or not all(token in vocabulary for token in (*pair, "".join(pair))):
        raise UnknownTokenizer(f"{where}: its merge {merge[:80]!r} is not a pair of tokens")
    return pair


def _tokenizer_config(metadata: Mapping[str, Any]) -> bytes:
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("add_bos_token", "add_eos_token"):
        config[key] = metadata.get(f"tokenizer.ggml.{key}") is True
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    return _json(config)
