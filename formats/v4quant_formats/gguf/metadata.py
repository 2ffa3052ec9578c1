"""The key-value pairs of a `deepseek4` file, from config.json, and config.json back from them.

Every number comes from the config; none has a default here. GGUF keeps real numbers as float32, so
1e-6 comes back as the shortest decimal that is the same float32, which is what the config said.

Source: llama.cpp's src/models/deepseek4.cpp and src/llama-model.cpp (what it reads) and
conversion/deepseek.py (what it writes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFValueType

from v4quant_formats.errors import WrongMetadata
from v4quant_formats.gguf.file import Field
from v4quant_formats.gguf.names import ARCHITECTURE, DSPARK_ARCHITECTURE
from v4quant_formats.model_config import ModelConfig, Yarn
from v4quant_kernels.ggml_types import get_type

_U32, _F32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
_BOOL, _STRING = GGUFValueType.BOOL, GGUFValueType.STRING
_ARRAY, _I32 = GGUFValueType.ARRAY, GGUFValueType.INT32

SQRT_SOFTPLUS = 4  # llama.cpp's number for V4's routing scores

# config.json field -> key below the architecture. Integers, then real numbers.
_INTEGERS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "q_lora_rank": "attention.q_lora_rank",
    "o_lora_rank": "attention.output_lora_rank",
    "o_groups": "attention.output_group_count",
    "sliding_window": "attention.sliding_window",
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
    "qk_rope_head_dim": "rope.dimension_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "num_hash_layers": "hash_layer_count",
    "hc_mult": "hyper_connection.count",
    "hc_sinkhorn_iters": "hyper_connection.sinkhorn_iterations",
}
_NUMBERS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "compress_rope_theta": "attention.compress_rope_freq_base",
    "rope_theta": "rope.freq_base",
    "routed_scaling_factor": "expert_weights_scale",
    "hc_eps": "hyper_connection.epsilon",
}
_YARN = {
    "factor": ("rope.scaling.factor", _F32),
    "original_max_position_embeddings": ("rope.scaling.original_context_length", _U32),
    "beta_fast": ("rope.scaling.yarn_beta_fast", _F32),
    "beta_slow": ("rope.scaling.yarn_beta_slow", _F32),
}
_DEFAULTS = {"num_key_value_heads": 1, "n_shared_experts": 1}
# Keys that a V4 has one value of, whoever writes them; None: absent.
_FIXED: dict[str, tuple[Any, ...]] = {
    "expert_weights_norm": (None, True),
    "expert_gating_func": (None, SQRT_SOFTPLUS, "sqrtsoftplus"),
    "expert_group_count": (None, 0, 1),
    "expert_group_used_count": (None, 0, 1),
    "leading_dense_block_count": (None, 0),
    "rope.scaling.attn_factor": (None, 1),
    "rope.scaling.yarn_log_multiplier": (None, 0),
}


def model_fields(config: ModelConfig, name: str, scheme: str, drafts: int = 0) -> list[Field]:
    """Everything but the tokenizer. `drafts`: draft stages in this file (a draft's own file).

    Raises WrongMetadata when config.json lacks or contradicts what llama.cpp needs.
    """
    raw = {**_DEFAULTS, **config.raw}
    _check(raw)
    blocks = config.num_hidden_layers + drafts
    fields = [
        Field("general.architecture", _STRING, ARCHITECTURE),
        Field("general.type", _STRING, "model"),
        Field("general.name", _STRING, name),
        Field("general.quantization_version", _U32, GGML_QUANT_VERSION),
        *_file_type(scheme),
        _field("block_count", _U32, blocks),
    ]
    fields += [_field(key, _U32, _integer(raw, k)) for k, key in _INTEGERS.items()]
    fields += [_field(key, _F32, float(getattr(config, k))) for k, key in _NUMBERS.items()]
    # Keys and values are one vector, so their lengths are equal.
    fields.append(_field("attention.value_length", _U32, config.head_dim))
    fields.append(_field("embedding_length_out", _U32, config.hidden_size * config.hc_mult))
    fields.append(_field("expert_gating_func", _U32, SQRT_SOFTPLUS))
    fields.append(_field("expert_weights_norm", _BOOL, True))
    ratios = list(config.compress_ratios) + [0] * max(0, blocks - len(config.compress_ratios))
    fields.append(_field("attention.compress_ratios", _ARRAY, ratios, _I32))
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        fields.append(_field(key, _ARRAY, [config.swiglu_limit] * blocks, _F32))
    fields += _yarn_fields(config.yarn)
    if drafts:
        fields.append(_field("nextn_predict_layers", _U32, drafts))
    return fields


def dspark_fields(config: ModelConfig, name: str, scheme: str, stages: int) -> list[Field]:
    """The same for DSpark's stages: a model of their own, window attention only, no hash layers.

    Raises WrongMetadata when config.json lacks one of DSpark's keys.
    """
    assert config.dspark is not None
    raw = {**config.raw, "num_hash_layers": 0, "n_routed_experts": config.dspark.n_routed_experts}
    raw["num_experts_per_tok"] = raw.get("dspark_num_experts_per_tok", config.num_experts_per_tok)
    small = replace(
        config, raw=raw, num_hidden_layers=stages, compress_ratios=(0,) * stages, num_hash_layers=0
    )
    old, new = f"{ARCHITECTURE}.", f"{DSPARK_ARCHITECTURE}."
    fields = [replace(f, key=f.key.replace(old, new)) for f in model_fields(small, name, scheme)]
    fields[0] = replace(fields[0], value=DSPARK_ARCHITECTURE)
    # llama.cpp counts a layer's output as the next one's input.
    targets = [layer + 1 for layer in config.dspark.target_layer_ids]
    block, noise = (_integer(raw, f"dspark_{k}") for k in ("block_size", "noise_token_id"))
    return [
        *fields,
        Field(f"{new}block_size", _U32, block),
        Field(f"{new}target_layers", _ARRAY, targets, _I32),
        Field("tokenizer.ggml.mask_token_id", _U32, noise),
    ]


def dspark_config(metadata: Mapping[str, Any], rank: int, where: str) -> tuple[dict[str, Any], int]:
    """config.json's keys of DSpark from the stages' file, and how many stages it has.

    `rank`: columns of its Markov tables. Raises WrongMetadata.
    """
    pairs = {
        k.replace(f"{DSPARK_ARCHITECTURE}.", f"{ARCHITECTURE}."): v for k, v in metadata.items()
    }
    targets = _read(pairs, "target_layers", list, where)
    if not all(isinstance(t, int) and t > 0 for t in targets):
        raise WrongMetadata(f"{where}: target_layers must list layers from 1")
    config = {
        "dspark_block_size": _read(pairs, "block_size", int, where),
        "dspark_noise_token_id": pairs.get("tokenizer.ggml.mask_token_id", 0),
        "dspark_target_layer_ids": [t - 1 for t in targets],
        "dspark_markov_rank": rank,
        "dspark_n_routed_experts": _read(pairs, "expert_count", int, where),
        "dspark_num_experts_per_tok": _read(pairs, "expert_used_count", int, where),
    }
    stages = _read(pairs, "block_count", int, where)
    if not 1 <= stages <= 100:
        raise WrongMetadata(f"{where}: {stages} draft stages cannot be")
    return config, stages


def split_fields(number: int, count: int, tensors: int) -> list[Field]:
    """What every file of a split model says: its number (from 0), how many, tensors in all."""
    return [
        Field("split.no", GGUFValueType.UINT16, number),
        Field("split.count", GGUFValueType.UINT16, count),
        Field("split.tensors.count", _I32, tensors),
    ]


def v4_config(metadata: Mapping[str, Any], where: str) -> tuple[dict[str, Any], int]:
    """V4's config.json from a file's pairs, and how many draft stages the file counts.

    Raises WrongMetadata naming the key that is missing or of the wrong kind.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise WrongMetadata(
            f"{where}: architecture is {str(architecture)[:80]!r}, but only '{ARCHITECTURE}' is "
            "DeepSeek-V4"
        )
    config: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    blocks = _read(metadata, "block_count", int, where)
    drafts = _read(metadata, "nextn_predict_layers", int, where, 0)
    if not 0 <= drafts < blocks <= 10_000:
        raise WrongMetadata(f"{where}: {blocks} blocks with {drafts} draft stages cannot be")
    config["num_hidden_layers"] = blocks - drafts
    config["num_nextn_predict_layers"] = drafts
    for field, key in _INTEGERS.items():
        default = _vocabulary(metadata) if field == "vocab_size" else _DEFAULTS.get(field)
        config[field] = _read(metadata, key, int, where, default)
    for field, key in _NUMBERS.items():
        config[field] = _shortest(_read(metadata, key, float, where))
    _check_fixed(metadata, where)
    config["compress_ratios"] = _read(metadata, "attention.compress_ratios", list, where)
    config["swiglu_limit"] = _clamp(metadata, where)
    config["rope_scaling"] = _yarn_config(metadata, where)
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and not isinstance(number, bool):
            config[field] = number
    return config, drafts


def _check_fixed(metadata: Mapping[str, Any], where: str) -> None:
    """Raise WrongMetadata for keys that say another arithmetic than V4's."""
    for key, allowed in _FIXED.items():
        value = metadata.get(f"{ARCHITECTURE}.{key}")
        if value not in allowed:
            raise WrongMetadata(
                f"{where}: '{ARCHITECTURE}.{key}' is {str(value)[:40]!r}, but V4's is "
                f"{allowed[1]!r}; this is another architecture"
            )
    length, other = (metadata.get(f"{ARCHITECTURE}.attention.{k}_length") for k in ("key", "value"))
    if other not in (None, length):
        raise WrongMetadata(f"{where}: key_length and value_length differ; V4's are one vector")
    width, lanes = (
        metadata.get(f"{ARCHITECTURE}.{k}") for k in ("embedding_length", "hyper_connection.count")
    )
    out = metadata.get(f"{ARCHITECTURE}.embedding_length_out", width)
    if type(width) is int and type(lanes) is int and out not in (width, width * lanes):
        raise WrongMetadata(
            f"{where}: '{ARCHITECTURE}.embedding_length_out' is {str(out)[:40]!r}, but V4's is "
            f"{width * lanes}, {lanes} streams of {width}"
        )


def _clamp(metadata: Mapping[str, Any], where: str) -> float:
    """The one limit of all experts' activations, also the shared ones', by all keys there are."""
    limits: set[float | None] = set()
    for name in ("swiglu_clamp_exp", "swiglu_clamp_shexp", "swiglu_clamp"):
        said = metadata.get(f"{ARCHITECTURE}.{name}")
        for value in said if isinstance(said, list) else [said]:
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None:
                limits.add(_shortest(value) if plain else None)
    limit = limits.pop() if len(limits) == 1 else None
    if limit is None:
        raise WrongMetadata(f"{where}: swiglu_clamp_exp must be one number for all layers")
    return limit


def _check(raw: Mapping[str, Any]) -> None:
    if raw.get("scoring_func", "sqrtsoftplus") != "sqrtsoftplus":
        raise WrongMetadata(
            f"config.json: scoring_func is {str(raw['scoring_func'])[:80]!r}; llama.cpp's "
            f"'{ARCHITECTURE}' knows V4's sqrtsoftplus only"
        )
    if raw.get("norm_topk_prob", True) is not True:
        raise WrongMetadata("config.json: norm_topk_prob must be true, as in every V4 release")


def _file_type(scheme: str) -> list[Field]:
    """llama.cpp's number for a file of this scheme, where it has one; else it guesses."""
    number = get_type(scheme).file_type
    return [] if number is None else [Field("general.file_type", _U32, number)]


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise WrongMetadata(
            f"config.json: '{key}' is {str(value)[:80]!r}; llama.cpp needs an integer there"
        )
    return value


def _field(
    key: str, kind: GGUFValueType, value: Any, element: GGUFValueType | None = None
) -> Field:
    return Field(f"{ARCHITECTURE}.{key}", kind, value, element)


def _yarn_fields(yarn: Yarn | None) -> list[Field]:
    if yarn is None:
        return [_field("rope.scaling.type", _STRING, "none")]
    fields = [_field("rope.scaling.type", _STRING, "yarn")]
    for name, (key, kind) in _YARN.items():
        fields.append(_field(key, kind, getattr(yarn, name)))
    return fields


def _yarn_config(metadata: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    scaled = f"{ARCHITECTURE}.rope.scaling.factor" in metadata
    # Some writers leave the type out; only YaRN has a range of rotations.
    ranged = scaled and f"{ARCHITECTURE}.rope.scaling.yarn_beta_fast" in metadata
    unsaid = "yarn" if ranged else None if scaled else "none"
    kind = metadata.get(f"{ARCHITECTURE}.rope.scaling.type", unsaid)
    if kind == "none":
        return None
    if kind != "yarn":
        raise WrongMetadata(f"{where}: rope scaling {str(kind)[:80]!r} is not V4's yarn")
    config: dict[str, Any] = {"type": "yarn"}
    for name, (key, number) in _YARN.items():
        if number == _U32:
            config[name] = _read(metadata, key, int, where)
        else:
            default = {"beta_fast": 32.0, "beta_slow": 1.0}.get(name)
            config[name] = _shortest(_read(metadata, key, float, where, default))
    return config


def _vocabulary(metadata: Mapping[str, Any]) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _read(
    metadata: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None
) -> Any:
    value = metadata.get(f"{ARCHITECTURE}.{key}", default)
    if kind is int and isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]  # some writers repeat a number for every layer
    if not isinstance(value, kind) or isinstance(value, bool):
        raise WrongMetadata(
            f"{where}: key '{ARCHITECTURE}.{key}' is {str(value)[:80]!r}, expected "
            f"{'a list' if kind is list else f'one {kind.__name__}'}"
        )
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32."""
    return float(str(np.float32(value)))
