"""config.json in the release's own keys, whoever wrote it.

transformers rewrites a V4 config: `layer_types` and `compress_rates` for `compress_ratios`,
`mlp_layer_types` for `num_hash_layers`, `rope_parameters` (flat, or nested into `main` and
`compress`) for `rope_theta` and `rope_scaling`. Others nest everything under `text_config`, or
leave keys out that the tensors state as well. All of these are read where the meaning is unique;
where two keys say different things, nobody guesses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from v4quant_formats.config_fields import check_yarn
from v4quant_formats.model_config import CSA_RATIO, HCA_RATIO, ConfigError

if TYPE_CHECKING:  # loads torch, which a start of the command line does without
    from v4quant_formats.spec import TensorSpec

_V41 = "deepseek_v41"
_RATES = {
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}
_YARN = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "attention_bias": False,
    "n_shared_experts": 1,
    "num_key_value_heads": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
}
"""What config.json may say in one way only: every release of V4 has this arithmetic, no other."""
# Other tools' keys -> the release's, whose values they have.
_ALIASES = {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}
_NUMBERS = (
    "routed_scaling_factor", "swiglu_limit", "rms_norm_eps", "hc_eps", "rope_theta",
    "compress_rope_theta", "rope_scaling", "compress_ratios",
)  # fmt: skip
# What is replaced by keys of the release, and so would say everything twice.
_REPLACED = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters")


def release_config(
    raw: Mapping[str, Any], tensors: Mapping[str, TensorSpec], where: str
) -> dict[str, Any]:
    """The config with the release's keys in place of others'. `tensors`: official names.

    Keys of the wrong kind stay, for who reads them to refuse. Raises ConfigError for two keys that
    say different things.
    """
    _same_inside(raw, where)
    config = _flat(dict(raw))
    if config.get("model_type") == _V41 or isinstance(config.get("text_config"), dict):
        return _one_declaration(config, where)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, float) and layers.is_integer():
        layers = int(layers)
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= 10_000:
        return config
    for key, value in config.items():
        if isinstance(value, float) and value.is_integer() and key in _INTEGERS:
            config[key] = int(value)
    for alias, key in _ALIASES.items():
        if alias in config and config.get(key) is None:
            config[key] = config[alias]
    _experts(config, layers, tensors)
    _same_aliases(config, raw, where)
    if config.get("tie_word_embeddings") is True and "head.weight" in tensors:
        config["tie_word_embeddings"] = False  # the head that is there is meant to be used
    changed = _ratios(config, layers, tensors, where) + _hash_layers(config, layers, tensors, where)
    changed += _rope(config, where)
    return {k: v for k, v in config.items() if k not in changed}


_EXPERT = re.compile(r"((?:layers|mtp)\.\d{1,4})\.ffn\.experts\.(\d{1,5})\.")
_INTEGERS = frozenset(
    {
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "q_lora_rank", "o_groups", "o_lora_rank", "moe_intermediate_size", "n_routed_experts",
        "num_experts_per_tok", "index_n_heads", "index_head_dim", "hc_mult", "num_hash_layers",
        "qk_rope_head_dim", "sliding_window", "index_topk", "hc_sinkhorn_iters", "bos_token_id",
        "max_position_embeddings", "num_nextn_predict_layers",
    }
)  # fmt: skip


def _experts(config: dict[str, Any], layers: int, tensors: Mapping[str, TensorSpec]) -> None:
    """Experts that were pruned from every layer alike: the routers' rows and the experts agree."""
    said = config.get("n_routed_experts")
    gates = {f"layers.{i}.ffn.gate.weight" for i in range(layers)}
    rows = {s.shape[0] for n, s in tensors.items() if n in gates and len(s.shape) == 2}
    if not isinstance(said, int) or len(rows) != 1 or said in rows or not gates <= tensors.keys():
        return
    count = rows.pop()
    numbers: dict[str, set[int]] = {}
    for name in tensors:
        if found := _EXPERT.match(name):
            numbers.setdefault(found[1], set()).add(int(found[2]))
    if len(numbers) >= layers and all(held == set(range(count)) for held in numbers.values()):
        config["n_routed_experts"] = count


def _same_aliases(config: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an alias that says neither what its key nor what the tensors say."""
    for alias, key in _ALIASES.items():
        if raw.get(alias) not in (None, config.get(key), raw.get(key)):
            raise ConfigError(f"{where}: '{alias}' and '{key}' say different things")


def _same_inside(raw: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for what `text_config` says otherwise than the object around it."""
    text = raw.get("text_config")
    inside: dict[str, Any] = text if isinstance(text, dict) else {}
    for key in (*_INTEGERS, *_NUMBERS, *FIXED):
        inner, outer = inside.get(key), raw.get(key)
        if None not in (inner, outer) and inner != outer:
            raise ConfigError(
                f"{where}: '{key}' stands twice, inside 'text_config' and beside it, and they say "
                "different things"
            )


def _one_declaration(config: dict[str, Any], where: str) -> dict[str, Any]:
    """V4.1's config with `quantization_config` beside `text_config`, where some have it inside."""
    text = config.get("text_config")
    if not isinstance(text, dict) or "quantization_config" not in text:
        return config
    inner = text["quantization_config"]
    if config.get("quantization_config", inner) != inner:
        raise ConfigError(
            f"{where}: 'quantization_config' stands twice, inside 'text_config' and beside it, and "
            "they say different things"
        )
    rest = {k: v for k, v in text.items() if k != "quantization_config"}
    return {**config, "text_config": rest, "quantization_config": inner}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A V4 config that somebody nested under `text_config`, as multimodal models have it."""
    text = config.get("text_config")
    if not isinstance(text, dict) or config.get("model_type") == _V41:
        return config
    if text.get("model_type", config.get("model_type")) not in (None, "deepseek_v4"):
        return config
    if any(key.startswith("engram_") for key in text):
        return config
    return {**text, **{k: v for k, v in config.items() if k != "text_config"}}


def _ratios(
    config: dict[str, Any], layers: int, tensors: Mapping[str, TensorSpec], where: str
) -> tuple[str, ...]:
    said, kinds = config.get("compress_ratios"), config.get("layer_types")
    found: list[int] | None = None
    _long_enough(config, "layer_types", layers, where)
    if isinstance(kinds, list):
        rates = config.get("compress_rates")
        rates = {**_RATES, **(rates if isinstance(rates, dict) else {}), "sliding_attention": 0}
        if not all(isinstance(k, str) and isinstance(rates.get(k), int) for k in kinds):
            raise ConfigError(
                f"{where}: 'layer_types' names layers that are not V4's ({str(kinds)[:80]})"
            )
        found = [rates[k] for k in kinds[:layers]]
    elif said is None and "compress_ratios" not in config:
        found = [_ratio_of(f"layers.{i}", tensors) for i in range(layers)]
    if found is None:
        return ()
    if isinstance(said, list):
        if said[:layers] != found:
            raise ConfigError(f"{where}: 'compress_ratios' and 'layer_types' say different things")
    elif said is None:
        config["compress_ratios"] = found
    return ("layer_types", "compress_rates")


def _long_enough(config: Mapping[str, Any], key: str, layers: int, where: str) -> None:
    kinds = config.get(key)
    if isinstance(kinds, list) and len(kinds) < layers:
        raise ConfigError(
            f"{where}: '{key}' describes {len(kinds)} layers, but num_hidden_layers is {layers}"
        )


def _ratio_of(layer: str, tensors: Mapping[str, TensorSpec]) -> int:
    """What a layer's compressor says: its position biases are [ratio, channels]."""
    spec = tensors.get(f"{layer}.attn.compressor.ape")
    return spec.shape[0] if spec and len(spec.shape) == 2 else 0


def _hash_layers(
    config: dict[str, Any], layers: int, tensors: Mapping[str, TensorSpec], where: str
) -> tuple[str, ...]:
    said, kinds = config.get("num_hash_layers"), config.get("mlp_layer_types")
    _long_enough(config, "mlp_layer_types", layers, where)
    if isinstance(kinds, list):
        hashed = [k == "hash_moe" for k in kinds[:layers]]
        count = sum(hashed)
        if hashed != [i < count for i in range(layers)]:
            raise ConfigError(f"{where}: 'mlp_layer_types' has hash layers behind others")
    elif said is None and "num_hash_layers" not in config:
        count = sum(f"layers.{i}.ffn.gate.tid2eid" in tensors for i in range(layers))
    else:
        return ()
    if said is None:
        config["num_hash_layers"] = count
    elif said != count:
        raise ConfigError(f"{where}: 'num_hash_layers' and 'mlp_layer_types' say different things")
    return ("mlp_layer_types",)


def _rope(config: dict[str, Any], where: str) -> tuple[str, ...]:
    """`rope_parameters`, flat or nested, as `rope_theta`, `rope_scaling`, `compress_rope_theta`."""
    given = config.get("rope_parameters")
    _rotary_share(config, config, where)
    if not isinstance(given, dict):
        return ()
    main, compress = given.get("main"), given.get("compress")
    nested = isinstance(main, dict) and isinstance(compress, dict)
    plain: dict[str, Any] = main if isinstance(main, dict) and nested else given
    scaled: dict[str, Any] = compress if isinstance(compress, dict) and nested else given
    if not nested and (strange := [k for k, v in given.items() if isinstance(v, dict)]):
        raise ConfigError(
            f"{where}: rope_parameters describes {str(strange)[:80]}; V4 has 'main' and 'compress'"
        )
    if nested and plain.get("rope_type", "default") != "default":
        raise ConfigError(f"{where}: rope_parameters.main must be 'default'; V4 scales no window")
    kind = scaled.get("rope_type", scaled.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(
            f"{where}: rope_parameters has rope_type {str(kind)[:40]!r}; V4's is yarn"
        )
    check_yarn(scaled, f"{where}: rope_parameters")
    wanted: dict[str, Any] = {"rope_theta": plain.get("rope_theta")}
    if nested:
        wanted["compress_rope_theta"] = scaled.get("rope_theta")
    for key, value in wanted.items():
        _agree(config, key, value, where)
    scaling = None
    if kind == "yarn":
        scaling = {k: scaled[k] for k in _YARN if k in scaled} | {"type": "yarn"}
    old = config.get("rope_scaling")
    if isinstance(old, dict) and {k: old.get(k) for k in _YARN} != {
        k: (scaling or {}).get(k) for k in _YARN
    }:
        raise ConfigError(f"{where}: 'rope_scaling' and 'rope_parameters' say different things")
    if not isinstance(old, dict):
        config["rope_scaling"] = scaling
    _rotary_share(config, plain, where)
    return ("rope_parameters",)


def _rotary_share(config: dict[str, Any], said: Mapping[str, Any], where: str) -> None:
    """transformers' share of a head that is rotated, as the release's number of columns."""
    share, width = said.get("partial_rotary_factor"), config.get("head_dim")
    if not isinstance(share, float) or not isinstance(width, int):
        return
    if config.setdefault("qk_rope_head_dim", int(share * width)) != int(share * width):
        raise ConfigError(
            f"{where}: 'partial_rotary_factor' and 'qk_rope_head_dim' say different things"
        )


def _agree(config: dict[str, Any], key: str, value: Any, where: str) -> None:
    if value is None:
        return
    if config.get(key) is None:
        config[key] = value
    elif config[key] != value:
        raise ConfigError(f"{where}: '{key}' and 'rope_parameters' say different things")
