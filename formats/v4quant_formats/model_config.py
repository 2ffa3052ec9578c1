"""ModelConfig: the numbers of config.json that change the arithmetic, read and checked once.

Field names are the release's own (DeepSeek-V4 config.json). A missing key is an error rather than a
default: the official code's defaults (rope factor 40, compress theta 40000, no clamp) are wrong for
every release, so guessing would give fluent nonsense.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
class ModelConfig:
    """Dimensions and constants of one DeepSeek-V4 model; see docs/architecture.md for the terms."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    bos_token_id: int
    raw: dict[str, Any]

    def layer_kind(self, layer: int) -> LayerKind:
        """Attention kind of a trunk layer: 0 -> swa, 4 -> csa, 128 -> hca."""
        return _KINDS[self.compress_ratios[layer]]

    def kv_bytes_per_token(self) -> int:
        """BF16 KV-cache bytes each further token costs over all trunk layers.

        A CSA layer adds one 2*head_dim-byte entry and one indexer key every 4 tokens, an HCA layer
        one entry every 128; window layers hold a fixed ring. Flash: 6,880; Pro: 9,848.
        """
        total = 0
        for ratio in self.compress_ratios[: self.num_hidden_layers]:
            if ratio:
                total += 2 * self.head_dim // ratio
            if ratio == CSA_RATIO:
                total += 2 * self.index_head_dim // ratio
        return total


CSA_RATIO = 4
HCA_RATIO = 128
_KINDS: dict[int, LayerKind] = {0: "swa", CSA_RATIO: "csa", HCA_RATIO: "hca"}

_INTS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim "
    "q_lora_rank o_groups o_lora_rank moe_intermediate_size n_routed_experts num_experts_per_tok "
    "sliding_window index_n_heads index_head_dim index_topk hc_mult hc_sinkhorn_iters"
).split()
_FLOATS = (
    "routed_scaling_factor swiglu_limit hc_eps rms_norm_eps rope_theta compress_rope_theta"
).split()


def parse_model_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Check the fields of a V4 config.json and return them typed.

    Raises ConfigError naming the field. `where` is what messages call the file.
    """
    values: dict[str, Any] = {k: _integer(raw, k, where) for k in _INTS}
    values |= {k: _number(raw, k, where) for k in _FLOATS}
    values["num_hash_layers"] = _integer(raw, "num_hash_layers", where, minimum=0)
    values["bos_token_id"] = _integer(raw, "bos_token_id", where, minimum=0, default=0)
    values["compress_ratios"] = _ratios(raw, values["num_hidden_layers"], where)
    values["yarn"] = _yarn(raw.get("rope_scaling"), where)
    config = ModelConfig(raw=raw, **values)
    _check_dimensions(config, where)
    return config


def load_model_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json`. Raises ConfigError when it is absent, too large or not V4."""
    return parse_model_config(read_json_object(folder / "config.json"), str(folder / "config.json"))


def read_json_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file that must hold one object. Raises ConfigError with file and reason."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise ConfigError(f"{path}: {size:,} bytes is above the limit of {limit:,} for this file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: file is missing; download it beside the shards") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def _integer(
    raw: dict[str, Any], key: str, where: str, minimum: int = 1, default: int | None = None
) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum or value > 2**40:
        raise ConfigError(f"{where}: '{key}' is {value!r}, expected an integer >= {minimum}")
    return value


def _number(raw: dict[str, Any], key: str, where: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise ConfigError(f"{where}: '{key}' is {value!r}, expected a number >= 0")
    return float(value)


def _ratios(raw: dict[str, Any], layers: int, where: str) -> tuple[int, ...]:
    value = raw.get("compress_ratios")
    if not isinstance(value, list) or len(value) < layers:
        raise ConfigError(f"{where}: 'compress_ratios' must list at least {layers} layers")
    for layer, ratio in enumerate(value):
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in _KINDS:
            raise ConfigError(
                f"{where}: compress_ratios[{layer}] is {ratio!r}; this release is not one the "
                f"reference forward knows (0, {CSA_RATIO} or {HCA_RATIO})"
            )
    return tuple(value)


def _yarn(value: Any, where: str) -> Yarn | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: 'rope_scaling' is {value!r}, expected an object or null")
    kind = value.get("type", value.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(f"{where}: rope_scaling type {kind!r} is not supported (yarn is)")
    return Yarn(
        factor=_number(value, "factor", where),
        beta_fast=_number(value, "beta_fast", where),
        beta_slow=_number(value, "beta_slow", where),
        original_max_position_embeddings=_integer(
            value, "original_max_position_embeddings", where
        ),
    )


def _check_dimensions(c: ModelConfig, where: str) -> None:
    problems = [
        (c.num_experts_per_tok > c.n_routed_experts, "num_experts_per_tok > n_routed_experts"),
        (c.num_attention_heads % c.o_groups != 0, "num_attention_heads not divisible by o_groups"),
        (c.qk_rope_head_dim > c.head_dim, "qk_rope_head_dim > head_dim"),
        (c.qk_rope_head_dim > c.index_head_dim, "qk_rope_head_dim > index_head_dim"),
        (c.qk_rope_head_dim % 2 != 0, "qk_rope_head_dim is odd"),
        (c.num_hash_layers > c.num_hidden_layers, "num_hash_layers > num_hidden_layers"),
    ]
    for wrong, text in problems:
        if wrong:
            raise ConfigError(f"{where}: {text}")
