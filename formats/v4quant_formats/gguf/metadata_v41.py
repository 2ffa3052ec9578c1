"""The key-value pairs of a `deepseek41` file: V4's under another name, and the Engram's constants.

llama.cpp hashes n-grams itself, from the multipliers, primes and offsets of every column and a map
from token ids to compressed ones, so it needs neither the tokenizer's Unicode rules nor a search
for primes. Which layers own entries and choices follows from the tensors that exist.

Where the release's loader limits a choice to candidate blocks, the files that were read have no
keys (the loader "caps the context" instead). v4quant says them under its own prefix, so that its
own files come back whole; files without them read as if there were no such limit, which changes
nothing up to 16,384 entries of the released model.

Source: src/models/deepseek41.cpp in two states and public patches of the converter (family A). Of
the keys that mainline's converter writes since build 11870 no file's header was seen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from gguf import GGUFValueType

from v4quant_formats.engram import engram_tables, multipliers
from v4quant_formats.errors import WrongMetadata
from v4quant_formats.gguf.file import Field
from v4quant_formats.gguf.metadata import model_fields, v4_config
from v4quant_formats.gguf.names import ARCHITECTURE, V41_ARCHITECTURE
from v4quant_formats.model_config import ModelConfig

_U32, _I32, _U64 = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64
_ARRAY = GGUFValueType.ARRAY
_OWN = "v4quant.candidate"
_TABLE_SIZE = "v4quant.engram.vocab_size"
_CANDIDATES = {
    "candidate_source_layer_id": "source_layer",
    "candidate_topk_blocks": "topk_blocks",
    "candidate_block_size": "block_size",
}
_IMAGE = "<｜deepseek_image｜>"
_MOST_LAYERS = 10_000


def v41_fields(
    config: ModelConfig, name: str, scheme: str, token_map: Sequence[int]
) -> list[Field]:
    """Everything but the tokenizer. token_map: compressed id of every token id.

    Raises WrongMetadata when config.json lacks or contradicts what llama.cpp needs.
    """
    v41 = config.v41
    assert v41 is not None
    text = {**config.raw["text_config"], "num_hash_layers": 0}
    old, new = f"{ARCHITECTURE}.", f"{V41_ARCHITECTURE}."
    fields = [
        replace(f, key=f.key.replace(old, new))
        for f in model_fields(replace(config, raw=text), name, scheme)
        if f.key != f"{old}hash_layer_count"
    ]
    fields[0] = replace(fields[0], value=V41_ARCHITECTURE)
    tables = v41.engram_tables
    engram: list[tuple[str, GGUFValueType, Any, GGUFValueType | None]] = [
        ("layer_ids", _ARRAY, list(v41.engram_layer_ids), _I32),
        ("head_count", _U32, v41.engram_n_heads, None),
        ("key_length", _U32, v41.engram_head_dim, None),
        ("max_ngram_size", _U32, v41.engram_max_ngram_size, None),
        ("pad_id", _U32, token_map[v41.engram_pad_token_id], None),
        ("multipliers", _ARRAY, [m for t in tables for m in t.multipliers], _U64),
        ("primes", _ARRAY, [p for t in tables for p in t.primes], _U64),
        ("offsets", _ARRAY, [o for t in tables for o in t.offsets], _U64),
        ("token_map", _ARRAY, list(token_map), _I32),
    ]
    fields += [Field(f"{new}engram.{k}", kind, v, e) for k, kind, v, e in engram]
    fields.append(Field(_TABLE_SIZE, _U32, v41.engram_vocab_size))
    if v41.candidate_source_layer_id is not None:
        fields += [
            Field(f"{_OWN}.{key}", _U32, getattr(v41, field)) for field, key in _CANDIDATES.items()
        ]
    return fields


def v41_config(metadata: Mapping[str, Any], tensors: Collection[str], where: str) -> dict[str, Any]:
    """config.json's object from a file's pairs and the names of the model's tensors.

    Raises WrongMetadata naming the key that is missing or of the wrong kind, also where constants
    are not those that config.json's numbers give.
    """
    old, new = f"{V41_ARCHITECTURE}.", f"{ARCHITECTURE}."
    pairs = {k.replace(old, new): v for k, v in metadata.items()}
    pairs |= {"general.architecture": ARCHITECTURE, f"{new}hash_layer_count": 0}
    text, _ = v4_config(pairs, where)
    layers = text["num_hidden_layers"]
    for key in ("architectures", "model_type", "torch_dtype", "num_hash_layers"):
        del text[key]
    text |= {"model_type": "deepseek_v41_text", "dtype": "bfloat16"}
    text["kv_source_layer_ids"] = _having("attn_compressor_kv.weight", layers, tensors)
    text["index_source_layer_ids"] = _having("indexer.attn_q_b.weight", layers, tensors)
    text |= _candidates(metadata)
    text |= _engram(metadata, where)
    tokens = metadata.get("tokenizer.ggml.tokens")
    named = tokens.index(_IMAGE) if isinstance(tokens, list) and _IMAGE in tokens else None
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "dtype": "bfloat16",
        **{k: text[k] for k in ("bos_token_id", "eos_token_id") if k in text},
        # A number no token has where the vocabulary names none.
        "image_token_id": text["vocab_size"] if named is None else named,
        "text_config": text,
    }


def _having(name: str, layers: int, tensors: Collection[str]) -> list[int]:
    return [n for n in range(min(layers, _MOST_LAYERS)) if f"blk.{n}.{name}" in tensors]


def _candidates(metadata: Mapping[str, Any]) -> dict[str, int]:
    found = {f: metadata.get(f"{_OWN}.{key}") for f, key in _CANDIDATES.items()}
    if all(isinstance(v, int) and not isinstance(v, bool) for v in found.values()):
        return {k: int(v) for k, v in found.items() if v is not None}
    return dict(zip(_CANDIDATES, (-1, 1, 1), strict=True))


def _engram(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json's Engram fields, from constants that are checked against each other."""
    layers = _numbers(metadata, "layer_ids", where)
    heads, width = (_number(metadata, k, where) for k in ("head_count", "key_length"))
    orders = _number(metadata, "max_ngram_size", where)
    token_map = _numbers(metadata, "token_map", where)
    primes, offsets = (_numbers(metadata, k, where) for k in ("primes", "offsets"))
    columns = (orders - 1) * heads
    size, pad = max(token_map, default=-1) + 1, _number(metadata, "pad_id", where)
    if not layers or columns < 1 or len(primes) != columns * len(layers) or pad not in token_map:
        raise WrongMetadata(f"{where}: the Engram's keys contradict each other; convert again")
    # Searching from the first prime on finds the same primes as searching from config.json's
    # engram_vocab_size, of which it is the next prime.
    start = metadata.get(_TABLE_SIZE)
    if type(start) is not int or not 1 < start <= primes[0]:
        start = primes[0]
    tables = engram_tables(tuple(layers), start, heads, orders, size)
    own = [p for t in tables for p in t.primes], [o for t in tables for o in t.offsets]
    factors = [m for n in layers for m in multipliers(n, orders, size)]
    if (primes, offsets) != own or _numbers(metadata, "multipliers", where) != factors:
        raise WrongMetadata(
            f"{where}: the Engram's primes, offsets or multipliers are not those of a V4.1; rows "
            "would be others'"
        )
    rows = [list(accumulate(primes[i : i + columns]))[-1] for i in range(0, len(primes), columns)]
    return {
        "engram_layer_ids": layers,
        "engram_num_embeddings": rows,
        "engram_n_heads": heads,
        "engram_head_dim": width,
        "engram_max_ngram_size": orders,
        "engram_vocab_size": start,
        "engram_pad_token_id": token_map.index(pad),
        "engram_compressed_vocab_size": size,
    }


def _number(metadata: Mapping[str, Any], key: str, where: str) -> int:
    value = metadata.get(f"{V41_ARCHITECTURE}.engram.{key}")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise WrongMetadata(
            f"{where}: key 'engram.{key}' is {str(value)[:80]!r}, expected a number"
        )
    return value


def _numbers(metadata: Mapping[str, Any], key: str, where: str) -> list[int]:
    value = metadata.get(f"{V41_ARCHITECTURE}.engram.{key}")
    if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
        raise WrongMetadata(f"{where}: key 'engram.{key}' is not a list of numbers")
    return value
