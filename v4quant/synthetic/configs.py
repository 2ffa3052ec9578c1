"""config.json of every release, with the released field names and values, at full or tiny scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4quant.synthetic.errors import RequestError
from v4quant.synthetic.tokenizer import compressed_size, special_tokens
from v4quant_formats.engram import engram_tables

V4_RELEASES = (
    "flash",
    "pro",
    "flash-base",
    "pro-base",
    "flash-dspark",
    "pro-dspark",
    "vision",
)
RELEASES = (*V4_RELEASES, "v41")


_COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}
_FLASH: dict[str, Any] = {
    "hidden_size": 4096,
    "index_topk": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_hidden_layers": 43,
    "o_groups": 8,
    "q_lora_rank": 1024,
    "routed_scaling_factor": 1.5,
}
_PRO: dict[str, Any] = {
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}
_VISION: dict[str, Any] = {
    "rms_norm_eps": 1e-20,
    "num_nextn_predict_layers": 3,
    "vision_n_layers": 32,
    "vision_dim": 1024,
    "vision_n_heads": 16,
    "vision_inter_dim": 2816,
    "vision_patch_size": 14,
    "vision_rope_theta": 10000,
    "vision_downsample_ratio": 3,
    "vision_max_n_token": 384,
    "vision_min_pixels": 147456,
    "vision_max_wh_ratio": 8,
}
_V41_TEXT: dict[str, Any] = {
    "model_type": "deepseek_v41_text",
    "vocab_size": 129280,
    "hidden_size": 5120,
    "moe_intermediate_size": 2304,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1280,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "hidden_act": "silu",
    "swiglu_limit": 10.0,
    "rms_norm_eps": 1e-20,
    "initializer_range": 0.02,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "use_cache": True,
    "max_position_embeddings": 1048576,
    "rope_theta": 10000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "sliding_window": 128,
    "compress_ratios": [0, 0] + [2] * 18 + [1] * 20 + [0] * 3,
    "compress_rope_theta": 160000,
    "kv_source_layer_ids": [2, 8, 14, 20],
    "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 512,
    "candidate_source_layer_id": 20,
    "candidate_topk_blocks": 2048,
    "candidate_block_size": 8,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384006168, 384016682],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 16000000,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99092,
    "num_nextn_predict_layers": 3,
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [37, 38, 39],
    "dspark_markov_rank": 256,
    "dspark_n_routed_experts": 128,
    "dspark_num_experts_per_tok": 3,
}
_V41_VISION: dict[str, Any] = {
    "model_type": "deepseek_v41_vision",
    "num_hidden_layers": 32,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 2816,
    "patch_size": 14,
    "rope_theta": 10000,
    "downsample_ratio": 3,
    "max_image_tokens": 1024,
    "min_pixels": 295936,
    "max_wh_ratio": None,
}

# Small, with the odd sizes kept: q_lora_rank 160 leaves ragged 128x128 tiles.
_TINY: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "head_dim": 128,
    "q_lora_rank": 160,
    "o_groups": 2,
    "o_lora_rank": 64,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 16,
    "sliding_window": 32,
    "vocab_size": 512,
}
_TINY_VISION = {
    "vision_n_layers": 2,
    "vision_dim": 64,
    "vision_n_heads": 4,
    "vision_inter_dim": 96,
}
_TINY_V41 = {
    "engram_head_dim": 64,
    "engram_n_heads": 2,
    "engram_vocab_size": 110,
    "dspark_n_routed_experts": 4,
    "dspark_num_experts_per_tok": 2,
    "dspark_markov_rank": 16,
    "dspark_noise_token_id": 500,
    "candidate_topk_blocks": 4,
}


def make_config(
    release: str, tiny: bool, overrides: Mapping[str, int], engram_rows: int | None = None
) -> dict[str, Any]:
    """config.json of a release. `overrides` are integer fields (of `text_config` in V4.1).

    Lists that follow from the number of layers are made to fit it, keeping the first layers' kinds.
    Raises RequestError for a field this release does not have.
    """
    if release == "v41":
        return _v41(tiny, overrides, engram_rows)
    config = {**_COMMON, **(_PRO if release.startswith("pro") else _FLASH)}
    drafts = 1
    if release == "vision" or release.endswith("-dspark"):
        drafts = 3
        rank = 512 if release.startswith("pro") else 256
        config |= {
            "dspark_block_size": 5,
            "dspark_noise_token_id": 128799,
            "dspark_markov_rank": rank,
        }
        if tiny:
            config |= {"dspark_markov_rank": 16, "dspark_noise_token_id": 500}
    if release == "vision":
        config |= _VISION | (_TINY_VISION if tiny else {})
    if release.endswith("-base"):
        config["expert_dtype"] = "fp8"
    config |= (_TINY if tiny else {}) | _known(overrides, config)
    layers = config["num_hidden_layers"]
    config["num_hash_layers"] = min(config["num_hash_layers"], layers)
    config["compress_ratios"] = _ratios(release, layers) + [0] * drafts
    if drafts == 3:
        config["dspark_target_layer_ids"] = list(range(max(0, layers - 3), layers))
        config |= _noise_token(overrides, config)
    return config


def _known(overrides: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, int]:
    for key in overrides:
        if not isinstance(config.get(key), int):
            raise RequestError(f"config.json of this release has no whole number '{key}'")
    return dict(overrides)


def _noise_token(overrides: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, int]:
    """The noise token moves into a smaller vocabulary, unless it was asked for by name."""
    name = "dspark_noise_token_id"
    return {} if name in overrides else {name: min(config[name], config["vocab_size"] - 1)}


def _ratios(release: str, layers: int) -> list[int]:
    """Two window (Flash) or HCA (Pro) layers, then CSA and HCA in turn."""
    first = 128 if release.startswith("pro") else 0
    return [first if i < 2 else (128 if i % 2 else 4) for i in range(layers)]


def _v41(tiny: bool, overrides: Mapping[str, int], engram_rows: int | None) -> dict[str, Any]:
    text = {**_V41_TEXT, **(_TINY | _TINY_V41 if tiny else {}), **_known(overrides, _V41_TEXT)}
    text |= _noise_token(overrides, text)
    layers = text["num_hidden_layers"]
    if layers != 40:
        text |= _v41_schedule(layers)
    image = min(129264, text["vocab_size"] - 2)
    if text["vocab_size"] != _V41_TEXT["vocab_size"]:
        specials = special_tokens(text["vocab_size"], text["dspark_noise_token_id"], image)
        text["engram_compressed_vocab_size"] = compressed_size(text["vocab_size"], specials)
    text |= _engram(text, engram_rows)
    vision = dict(_V41_VISION)
    if tiny:
        vision |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "image_token_id": image,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
            "scale_fmt": "ue8m0",
            "expert_dtype": "fp4",
        },
        "text_config": text,
        "vision_config": vision,
    }


def _engram(text: Mapping[str, Any], rows: int | None) -> dict[str, Any]:
    """Sizes of the n-gram tables: of about `rows` rows each, or as `engram_vocab_size` says."""
    layers, heads = tuple(text["engram_layer_ids"]), text["engram_n_heads"]
    grams, size = text["engram_max_ngram_size"], text["engram_vocab_size"]
    if rows is not None:
        size = max(2, rows // (heads * (grams - 1)))
    tables = engram_tables(layers, size, heads, grams, text["engram_compressed_vocab_size"])
    return {"engram_vocab_size": size, "engram_num_embeddings": [t.rows for t in tables]}


def _v41_schedule(layers: int) -> dict[str, Any]:
    """Fewer layers than released: two window layers, half ratio 2, half ratio 1."""
    pooled = max(0, layers - 1) // 2
    ratios = ([0, 0] + [2] * pooled + [1] * layers)[:layers]
    sources = [i for i in (2, 2 + pooled) if i < layers]
    indexers = sorted({*sources, layers - 1} if sources else set())
    return {
        "compress_ratios": [*ratios, 0, 0, 0],
        "kv_source_layer_ids": sources,
        "index_source_layer_ids": indexers,
        "candidate_source_layer_id": sources[-1] if sources else -1,
        "engram_layer_ids": [i for i in (1, 14) if i < layers],
        "dspark_target_layer_ids": list(range(max(0, layers - 3), layers)),
    }
