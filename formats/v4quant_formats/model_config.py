"""The numbers of config.json, read and checked once, in two depths.

`Dimensions` is what decides names, shapes and experts: enough to inspect and to convert any
release, V4.1 with its nested `text_config` included. `ModelConfig` adds the constants of the
forward pass, which only V4 has here.

Field names are the release's own. A missing key is an error rather than a default: the official
code's defaults (rope factor 40, compress theta 40000, no clamp) are wrong for every release, so
guessing would give fluent nonsense.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

from v4quant_formats.json_limits import (
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    has_too_many_values,
    is_too_deep,
)
from v4quant_kernels.errors import V4QuantError

LayerKind = Literal["swa", "csa", "hca"]

MAX_CONFIG_BYTES = 16 * 2**20


class ConfigError(V4QuantError):
    """config.json is missing, not JSON, or lacks or contradicts a field."""


@dataclass(frozen=True)
class Yarn:
    """YaRN frequencies of the compressed layers (config `rope_scaling`)."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DSpark:
    """Speculative stages of the DSpark releases (config `dspark_*`).

    They guess `block_size` tokens at a time, all but the first position fed with `noise_token_id`.
    """

    target_layer_ids: tuple[int, ...]
    markov_rank: int
    n_routed_experts: int
    block_size: int
    noise_token_id: int


@dataclass(frozen=True)
class V41:
    """What V4.1 adds: layers that own the shared caches, and Engram's n-gram tables.

    `engram_columns` is the number of table rows looked up per token (n-gram sizes times heads).
    """

    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    engram_layer_ids: tuple[int, ...]
    engram_num_embeddings: tuple[int, ...]
    engram_head_dim: int
    engram_columns: int


@dataclass(frozen=True)
class Dimensions:
    """What names, shapes and experts follow from, in any release."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    hc_mult: int
    dspark: DSpark | None
    v41: V41 | None
    raw: dict[str, Any] = field(compare=False, repr=False)

    def layer_kind(self, layer: int) -> str:
        """Attention kind of a trunk layer: swa, csa or hca; csa2/1 or csa2/2 in V4.1."""
        ratio = self.compress_ratios[layer]
        return _KINDS.get(ratio, f"csa2/{ratio}")

    def kv_bytes_per_token(self) -> int | None:
        """BF16 KV-cache bytes each further token costs over all trunk layers; None for V4.1.

        A CSA layer adds one 2*head_dim-byte entry and one indexer key every 4 tokens, an HCA layer
        one entry every 128; window layers hold a fixed ring. Flash: 6,880; Pro: 9,848.
        """
        if self.v41 is not None:
            return None
        total = 0
        for ratio in self.compress_ratios[: self.num_hidden_layers]:
            if ratio:
                total += 2 * self.head_dim // ratio
            if ratio == CSA_RATIO:
                total += 2 * self.index_head_dim // ratio
        return total


@dataclass(frozen=True)
class ModelConfig(Dimensions):
    """Dimensions and forward-pass constants of one V4 model; see docs/architecture.md."""

    qk_rope_head_dim: int
    sliding_window: int
    index_topk: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    bos_token_id: int
    max_position_embeddings: int

    def layer_kind(self, layer: int) -> LayerKind:
        """Attention kind of a trunk layer: 0 -> swa, 4 -> csa, 128 -> hca."""
        return _KINDS[self.compress_ratios[layer]]


_POSITIONS = 2**20
CSA_RATIO = 4
HCA_RATIO = 128
_KINDS: dict[int, LayerKind] = {0: "swa", CSA_RATIO: "csa", HCA_RATIO: "hca"}
_V41_RATIOS = (0, 1, 2)

_INTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "index_n_heads",
    "index_head_dim",
    "hc_mult",
)
_FLOATS = ("routed_scaling_factor", "swiglu_limit")
_FORWARD_INTS = ("qk_rope_head_dim", "sliding_window", "index_topk", "hc_sinkhorn_iters")
_FORWARD_FLOATS = ("hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta")


def parse_dimensions(raw: dict[str, Any], where: str = "config.json") -> Dimensions:
    """Check the fields of any release's config.json that decide names and shapes.

    Raises ConfigError naming the field. `where` is what messages call the file.
    """
    dimensions = Dimensions(raw=raw, **_dimension_values(raw, where))
    _check_dimensions(dimensions, where)
    return dimensions


def parse_model_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Check the fields of a V4 config.json that the forward pass needs, and return them typed.

    Raises ConfigError naming the field, or for a release whose arithmetic is not V4's.
    """
    if _is_v41(raw):
        raise ConfigError(
            f"{where}: this is V4.1, whose forward pass v4quant does not have; "
            "inspect, quantize and verify work on it, calibrate and evaluate do not"
        )
    values = _dimension_values(raw, where)
    values |= {k: _integer(raw, k, where) for k in _FORWARD_INTS}
    values |= {k: _number(raw, k, where) for k in _FORWARD_FLOATS}
    values["bos_token_id"] = _integer(raw, "bos_token_id", where, minimum=0, default=0)
    # No part of the arithmetic, only of what engines make tables for.
    values["max_position_embeddings"] = _integer(
        raw, "max_position_embeddings", where, default=_POSITIONS
    )
    values["yarn"] = _yarn(raw.get("rope_scaling"), where)
    config = ModelConfig(raw=raw, **values)
    _check_dimensions(config, where)
    _check_rope(config, where)
    return config


def load_model_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json`. Raises ConfigError when it is absent, too large or not V4."""
    return parse_model_config(read_json_object(folder / "config.json"), str(folder / "config.json"))


def read_json_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file that must hold one object. Raises ConfigError with file and reason."""
    try:
        # A size proves nothing for a device or a pipe, so what is read is bounded too.
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            data = b"" if path.stat().st_size > limit else file.read(limit + 1)
        if not data or len(data) > limit:
            raise ConfigError(f"{path}: is empty or above this file's limit of {limit:,} bytes")
        if has_too_many_values(data):
            raise ConfigError(f"{path}: holds more than {MAX_JSON_VALUES:,} values; not our file")
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: file is missing; download it beside the shards") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    if is_too_deep(value):
        raise ConfigError(f"{path}: is nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def _short(value: Any) -> str:
    return repr(value)[:80]


def _is_v41(raw: dict[str, Any]) -> bool:
    return raw.get("model_type") == "deepseek_v41" or isinstance(raw.get("text_config"), dict)


def _dimension_values(raw: dict[str, Any], where: str) -> dict[str, Any]:
    v41 = _is_v41(raw)
    text = raw.get("text_config") if v41 else raw
    if not isinstance(text, dict):
        raise ConfigError(f"{where}: 'text_config' is missing, but model_type is deepseek_v41")
    values: dict[str, Any] = {k: _integer(text, k, where) for k in _INTS}
    values |= {k: _number(text, k, where) for k in _FLOATS}
    # V4.1 has no hash layers and no such key.
    default = 0 if v41 else None
    values["num_hash_layers"] = _integer(text, "num_hash_layers", where, 0, default)
    allowed = _V41_RATIOS if v41 else tuple(_KINDS)
    values["compress_ratios"] = _ratios(text, values["num_hidden_layers"], allowed, where)
    values["dspark"] = _dspark(text, values, where)
    values["v41"] = _v41(text, values["num_hidden_layers"], where) if v41 else None
    return values


def _dspark(text: dict[str, Any], values: dict[str, Any], where: str) -> DSpark | None:
    if "dspark_target_layer_ids" not in text:
        return None
    experts = values["n_routed_experts"]
    return DSpark(
        _layer_ids(text, "dspark_target_layer_ids", values["num_hidden_layers"], where),
        _integer(text, "dspark_markov_rank", where),
        _integer(text, "dspark_n_routed_experts", where, default=experts),
        _integer(text, "dspark_block_size", where),
        _noise_token(text, values["vocab_size"], where),
    )


def _noise_token(text: dict[str, Any], vocab_size: int, where: str) -> int:
    token = _integer(text, "dspark_noise_token_id", where, minimum=0)
    if token >= vocab_size:
        raise ConfigError(
            f"{where}: dspark_noise_token_id {token} is outside the vocabulary of {vocab_size}"
        )
    return token


def _v41(text: dict[str, Any], layers: int, where: str) -> V41:
    engram = _layer_ids(text, "engram_layer_ids", layers, where)
    rows = text.get("engram_num_embeddings")
    if not _is_integers(rows) or len(rows) != len(engram) or min(rows, default=1) < 1:
        raise ConfigError(f"{where}: 'engram_num_embeddings' must size each Engram layer's table")
    grams = _integer(text, "engram_max_ngram_size", where, minimum=2)
    return V41(
        _layer_ids(text, "kv_source_layer_ids", layers, where),
        _layer_ids(text, "index_source_layer_ids", layers, where),
        engram,
        tuple(rows),
        _integer(text, "engram_head_dim", where),
        (grams - 1) * _integer(text, "engram_n_heads", where),
    )


def _layer_ids(raw: dict[str, Any], key: str, layers: int, where: str) -> tuple[int, ...]:
    value = raw.get(key)
    if not _is_integers(value) or not all(0 <= i < layers for i in value):
        raise ConfigError(f"{where}: '{key}' must list layers between 0 and {layers - 1}")
    return tuple(value)


def _is_integers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) for i in value
    )


def _integer(
    raw: dict[str, Any], key: str, where: str, minimum: int = 1, default: int | None = None
) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum or value > 2**40:
        raise ConfigError(f"{where}: '{key}' is {_short(value)}, expected an integer >= {minimum}")
    return value


def _number(raw: dict[str, Any], key: str, where: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise ConfigError(f"{where}: '{key}' is {_short(value)}, expected a number >= 0")
    return float(value)


def _ratios(
    raw: dict[str, Any], layers: int, allowed: tuple[int, ...], where: str
) -> tuple[int, ...]:
    value = raw.get("compress_ratios")
    if not _is_integers(value) or len(value) < layers:
        raise ConfigError(f"{where}: 'compress_ratios' must list at least {layers} layers")
    for layer, ratio in enumerate(value):
        if ratio not in allowed:
            raise ConfigError(
                f"{where}: compress_ratios[{layer}] is {_short(ratio)}; this release's layers have "
                f"{', '.join(map(str, allowed))}, so it is one v4quant does not know"
            )
    return tuple(value)


def _yarn(value: Any, where: str) -> Yarn | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: 'rope_scaling' is {_short(value)}, expected an object or null")
    kind = value.get("type", value.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(f"{where}: rope_scaling type {_short(kind)} is not supported (yarn is)")
    return Yarn(
        factor=_number(value, "factor", where),
        beta_fast=_number(value, "beta_fast", where),
        beta_slow=_number(value, "beta_slow", where),
        original_max_position_embeddings=_integer(value, "original_max_position_embeddings", where),
    )


def _check_dimensions(c: Dimensions, where: str) -> None:
    problems = [
        (c.num_experts_per_tok > c.n_routed_experts, "num_experts_per_tok > n_routed_experts"),
        (c.num_attention_heads % c.o_groups != 0, "num_attention_heads not divisible by o_groups"),
        (c.num_hash_layers > c.num_hidden_layers, "num_hash_layers > num_hidden_layers"),
    ]
    _raise_first(problems, where)


def _check_rope(c: ModelConfig, where: str) -> None:
    problems = [
        (c.qk_rope_head_dim > c.head_dim, "qk_rope_head_dim > head_dim"),
        (c.qk_rope_head_dim > c.index_head_dim, "qk_rope_head_dim > index_head_dim"),
        (c.qk_rope_head_dim % 2 != 0, "qk_rope_head_dim is odd"),
    ]
    _raise_first(problems, where)


def _raise_first(problems: list[tuple[bool, str]], where: str) -> None:
    for wrong, text in problems:
        if wrong:
            raise ConfigError(f"{where}: {text}")
