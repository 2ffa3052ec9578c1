"""The numbers of config.json, read and checked once, in two depths.

`Dimensions` is what decides names, shapes and experts: enough to inspect and to convert any
release, V4.1 with its nested `text_config` included. `ModelConfig` adds the constants of the
forward pass. What a single layer is, `LayerFacts` say.

Field names are the release's own. A missing key is an error rather than a default: the official
code's defaults (rope factor 40, compress theta 40000, no clamp) are wrong for every release, so
guessing would give fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from v4quant_formats.config_fields import (
    ConfigError,
    check_yarn,
    integer,
    is_integers,
    layer_ids,
    number,
    positive,
    raise_first,
    short,
)
from v4quant_formats.json_object import read_json_object
from v4quant_formats.layer_facts import (
    CSA_RATIO,
    HCA_RATIO,
    LayerFacts,
    draft_facts,
    v4_layers,
    v41_layers,
)
from v4quant_formats.v41_config import V41, check_v41_forward, parse_v41

__all__ = [
    "CSA_RATIO",
    "HCA_RATIO",
    "V41",
    "ConfigError",
    "DSpark",
    "Dimensions",
    "LayerFacts",
    "ModelConfig",
    "Yarn",
    "load_model_config",
    "parse_dimensions",
    "parse_model_config",
]


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
    Their layers may have fewer experts than the trunk's. reads_inputs: whether what the target
    layers read is what they are given (V4.1), or what these leave behind them.
    """

    target_layer_ids: tuple[int, ...]
    markov_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    block_size: int
    noise_token_id: int
    reads_inputs: bool


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

    @cached_property
    def layers(self) -> tuple[LayerFacts, ...]:
        """Facts of the trunk's layers."""
        ratios = self.compress_ratios[: self.num_hidden_layers]
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if self.v41 is None:
            return v4_layers(ratios, self.num_hash_layers, experts, chosen)
        return v41_layers(
            ratios,
            self.v41.kv_source_layer_ids,
            self.v41.index_source_layer_ids,
            self.v41.candidate_source_layer_id,
            self.v41.engram_layer_ids,
            experts,
            chosen,
        )

    @property
    def fp8_tile(self) -> tuple[int, int]:
        """Rows and columns of an FP8 matrix that share a scale in this release."""
        return (128, 128) if self.v41 is None else (32, 32)

    def facts(self, stage: str) -> LayerFacts:
        """Facts of a stage, "layers.N" below `num_hidden_layers` or "mtp.N"."""
        kind, _, place = stage.partition(".")
        if kind == "layers":
            return self.layers[int(place)]
        if self.dspark is None:
            return draft_facts(int(place), self.n_routed_experts, self.num_experts_per_tok)
        return draft_facts(
            int(place), self.dspark.n_routed_experts, self.dspark.num_experts_per_tok
        )

    def kv_bytes_per_token(self, packed: bool = False) -> int:
        """Bytes of KV cache each further token costs over all trunk layers.

        A layer with a compressor of its own adds an entry of head_dim values every `ratio` tokens,
        and an index key where it has an indexer; window layers hold a fixed ring. In BF16: Flash
        6,880; Pro 9,848; V4.1 3,200. `packed`, V4.1 as it is served: entries in E2M1 with an E4M3
        scale for 16 values, keys in E2M1 with an E8M0 scale for 32; 890 bytes.
        """
        entry, key = 2 * self.head_dim, 2 * self.index_head_dim
        if packed:
            entry = self.head_dim // 2 + self.head_dim // 16
            key = self.index_head_dim // 2 + self.index_head_dim // 32
        total = Fraction(0)
        for layer in self.layers:
            if layer.makes_entries:
                total += Fraction(entry + (key if layer.makes_choice else 0), layer.ratio)
        return int(total)


@dataclass(frozen=True)
class ModelConfig(Dimensions):
    """Dimensions and forward-pass constants of one model; see docs/architecture.md."""

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
    image_token_id: int | None

    @property
    def delayed_mixing(self) -> bool:
        """Whether a sublayer reads the streams by the weights the sublayer before it made (V4.1),
        and the end of the trunk by the last ones, instead of by its own."""
        return self.v41 is not None

    @property
    def normalizes_heads(self) -> bool:
        """Whether every head's query is normalised (V4)."""
        return self.v41 is None


_POSITIONS = 2**20
_V4_RATIOS = (0, CSA_RATIO, HCA_RATIO)
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
    """Check the fields of a config.json that the forward pass needs, and return them typed.

    Raises ConfigError naming the field.
    """
    text = _text(raw, where)
    values = _dimension_values(raw, where)
    values |= {k: integer(text, k, where) for k in _FORWARD_INTS}
    values |= {k: positive(text, k, where) for k in (*_FLOATS, *_FORWARD_FLOATS)}
    outer = {**text, **raw}
    values["bos_token_id"] = integer(outer, "bos_token_id", where, minimum=0, default=0)
    # No part of the arithmetic, only of what engines make tables for.
    values["max_position_embeddings"] = integer(
        text, "max_position_embeddings", where, default=_POSITIONS
    )
    values["yarn"] = _yarn(text.get("rope_scaling"), where)
    values["image_token_id"] = integer(raw, "image_token_id", where, 0) if is_v41(raw) else None
    config = ModelConfig(raw=raw, **values)
    _check_dimensions(config, where)
    _check_forward(config, where)
    return config


def load_model_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json`. Raises ConfigError when it is absent, too large or wrong."""
    return parse_model_config(read_json_object(folder / "config.json"), str(folder / "config.json"))


def is_v41(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is V4.1's, with its nested `text_config`."""
    return raw.get("model_type") == "deepseek_v41" or isinstance(raw.get("text_config"), dict)


def _text(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The object that holds the language model's fields."""
    text = raw.get("text_config") if is_v41(raw) else raw
    if not isinstance(text, dict):
        raise ConfigError(f"{where}: 'text_config' is missing, but model_type is deepseek_v41")
    return text


def _dimension_values(raw: dict[str, Any], where: str) -> dict[str, Any]:
    v41, text = is_v41(raw), _text(raw, where)
    values: dict[str, Any] = {k: integer(text, k, where) for k in _INTS}
    values |= {k: number(text, k, where) for k in _FLOATS}
    # V4.1 has no hash layers and no such key.
    default = 0 if v41 else None
    values["num_hash_layers"] = integer(text, "num_hash_layers", where, 0, default)
    allowed = _V41_RATIOS if v41 else _V4_RATIOS
    layers = values["num_hidden_layers"]
    values["compress_ratios"] = ratios = _ratios(text, layers, allowed, where)
    values["dspark"] = _dspark(text, values, v41, where)
    values["v41"] = parse_v41(text, layers, ratios, where) if v41 else None
    return values


def _dspark(text: dict[str, Any], values: dict[str, Any], v41: bool, where: str) -> DSpark | None:
    if "dspark_target_layer_ids" not in text:
        return None
    experts, chosen = values["n_routed_experts"], values["num_experts_per_tok"]
    return DSpark(
        layer_ids(text, "dspark_target_layer_ids", values["num_hidden_layers"], where),
        integer(text, "dspark_markov_rank", where),
        integer(text, "dspark_n_routed_experts", where, default=experts),
        integer(text, "dspark_num_experts_per_tok", where, default=chosen),
        integer(text, "dspark_block_size", where),
        _noise_token(text, values["vocab_size"], where),
        reads_inputs=v41,
    )


def _noise_token(text: dict[str, Any], vocab_size: int, where: str) -> int:
    token = integer(text, "dspark_noise_token_id", where, minimum=0)
    if token >= vocab_size:
        raise ConfigError(
            f"{where}: dspark_noise_token_id {token} is outside the vocabulary of {vocab_size}"
        )
    return token


def _ratios(
    raw: dict[str, Any], layers: int, allowed: tuple[int, ...], where: str
) -> tuple[int, ...]:
    value = raw.get("compress_ratios")
    if not is_integers(value) or len(value) < layers:
        raise ConfigError(f"{where}: 'compress_ratios' must list at least {layers} layers")
    for layer, ratio in enumerate(value):
        if ratio not in allowed:
            raise ConfigError(
                f"{where}: compress_ratios[{layer}] is {short(ratio)}; this release's layers have "
                f"{', '.join(map(str, allowed))}, so it is one v4quant does not know"
            )
    return tuple(value)


def _yarn(value: Any, where: str) -> Yarn | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: 'rope_scaling' is {short(value)}, expected an object or null")
    kind = value.get("type", value.get("rope_type"))
    if value.get("rope_type", kind) != kind:
        raise ConfigError(f"{where}: rope_scaling's 'type' and 'rope_type' say different things")
    check_yarn(value, f"{where}: rope_scaling")
    if kind != "yarn":
        raise ConfigError(f"{where}: rope_scaling type {short(kind)} is not supported (yarn is)")
    return Yarn(
        factor=number(value, "factor", where),
        beta_fast=number(value, "beta_fast", where),
        beta_slow=number(value, "beta_slow", where),
        original_max_position_embeddings=integer(value, "original_max_position_embeddings", where),
    )


def _check_dimensions(c: Dimensions, where: str) -> None:
    problems = [
        (c.num_experts_per_tok > c.n_routed_experts, "num_experts_per_tok > n_routed_experts"),
        (c.num_attention_heads % c.o_groups != 0, "num_attention_heads not divisible by o_groups"),
        (c.num_hash_layers > c.num_hidden_layers, "num_hash_layers > num_hidden_layers"),
        (
            c.dspark is not None and c.dspark.num_experts_per_tok > c.dspark.n_routed_experts,
            "dspark_num_experts_per_tok > dspark_n_routed_experts",
        ),
    ]
    raise_first(problems, where)


def _check_forward(c: ModelConfig, where: str) -> None:
    problems = [
        (c.qk_rope_head_dim > c.head_dim, "qk_rope_head_dim > head_dim"),
        (c.qk_rope_head_dim > c.index_head_dim, "qk_rope_head_dim > index_head_dim"),
        (c.qk_rope_head_dim % 2 != 0, "qk_rope_head_dim is odd"),
        (c.bos_token_id >= c.vocab_size, "bos_token_id is beyond the vocabulary"),
    ]
    raise_first(problems, where)
    if c.v41 is not None:
        check_v41_forward(c.v41, c.vocab_size, c.index_topk, where)
