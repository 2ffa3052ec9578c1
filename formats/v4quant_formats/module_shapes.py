"""The logical shape of every DeepSeek-V4 module, from the numbers of config.json."""

from __future__ import annotations

from functools import lru_cache

from v4quant_formats.deepseek_v4 import EXPERT, STAGE
from v4quant_formats.model_config import Dimensions, LayerFacts


def module_shape(config: Dimensions, module: str) -> tuple[int, ...] | None:
    """Logical shape of a known module ([out, in] for matrices); None if not tabled."""
    match = STAGE.fullmatch(module)
    if match is None:
        return _top_shapes(config).get(module)
    draft, below = match[1] == "mtp", match[3]
    if not draft and int(match[2]) >= config.num_hidden_layers:
        return None
    facts = config.facts(f"{match[1]}.{match[2]}")
    if expert := EXPERT.fullmatch(below):
        below = f"ffn.shared_experts.{expert[2]}"
    if config.v41 is None and ".compressor." in below:
        return _compressor_shape(config, below, facts)
    if below == "engram.embed":
        return _engram_shape(config, facts)
    return _stage_shapes(config, draft).get(below)


@lru_cache(maxsize=8)
def _stage_shapes(c: Dimensions, draft: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a stage's modules that do not depend on the layer."""
    streams, mixes = c.hc_mult * c.hidden_size, c.hc_mult * (2 + c.hc_mult)
    experts = c.facts("mtp.0" if draft else "layers.0").experts
    d, heads, inner = c.hidden_size, c.num_attention_heads * c.head_dim, c.moe_intermediate_size
    table: dict[str, tuple[int, ...]] = {
        "attn.wq_a": (c.q_lora_rank, d),
        "attn.wq_b": (heads, c.q_lora_rank),
        "attn.wkv": (c.head_dim, d),
        "attn.wo_a": (c.o_groups * c.o_lora_rank, heads // c.o_groups),
        "attn.wo_b": (d, c.o_groups * c.o_lora_rank),
        "attn.attn_sink": (c.num_attention_heads,),
        "attn.q_norm": (c.q_lora_rank,),
        "attn.kv_norm": (c.head_dim,),
        "attn.indexer.wq_b": (c.index_n_heads * c.index_head_dim, c.q_lora_rank),
        "attn.indexer.weights_proj": (c.index_n_heads, d),
        "ffn.gate": (experts, d),
        "ffn.gate.bias": (experts,),
        "ffn.gate.bias_vl": (experts,),
        "ffn.gate.tid2eid": (c.vocab_size, c.num_experts_per_tok),
        "ffn.shared_experts.w1": (inner, d),
        "ffn.shared_experts.w3": (inner, d),
        "ffn.shared_experts.w2": (d, inner),
    }
    for sub in ("attn", "ffn"):
        table |= {
            f"{sub}_norm": (d,),
            f"hc_{sub}_fn": (mixes, streams),
            f"hc_{sub}_base": (mixes,),
            f"hc_{sub}_scale": (3,),
        }
    return table | _v41_shapes(c) | (_draft_shapes(c) if draft else {})


def _v41_shapes(c: Dimensions) -> dict[str, tuple[int, ...]]:
    if c.v41 is None:
        return {}
    d, gates = c.hidden_size, (c.hc_mult, c.hidden_size)
    return {
        "attn.compressor.wkv": (c.head_dim, d),
        "attn.compressor.wgate": (c.head_dim, d),
        "attn.compressor.norm": (c.head_dim,),
        "attn.indexer.wk": (c.index_head_dim, c.head_dim),
        "attn.indexer.k_norm": (c.index_head_dim,),
        "engram.wkv": ((c.hc_mult + 1) * d, c.v41.engram_columns * c.v41.engram_head_dim),
        "engram.q_weight": gates,
        "engram.k_weight": gates,
    }


def _draft_shapes(c: Dimensions) -> dict[str, tuple[int, ...]]:
    d, embedding = c.hidden_size, (c.vocab_size, c.hidden_size)
    table: dict[str, tuple[int, ...]] = {"e_proj": (d, d), "h_proj": (d, d)}
    table |= {"emb.tok_emb": embedding, "head": embedding}
    table |= dict.fromkeys(("enorm", "hnorm", "norm", "main_norm"), (d,))
    table |= {k: v for k, v in _top_shapes(c).items() if k.startswith("hc_head_")}
    if c.dspark is not None:
        rank = c.dspark.markov_rank
        table["main_proj"] = (d, len(c.dspark.target_layer_ids) * d)
        table["confidence_head.proj"] = (1, d + rank)
        markov = ("markov_w1", "markov_w2", "embed", "head")
        table |= dict.fromkeys((f"markov_head.{m}" for m in markov), (c.vocab_size, rank))
    return table


@lru_cache(maxsize=8)
def _top_shapes(c: Dimensions) -> dict[str, tuple[int, ...]]:
    images = ("image_start", "image_end", "image_newline", "image_pad")
    return {
        "embed": (c.vocab_size, c.hidden_size),
        "head": (c.vocab_size, c.hidden_size),
        "norm": (c.hidden_size,),
        "hc_head_fn": (c.hc_mult, c.hc_mult * c.hidden_size),
        "hc_head_base": (c.hc_mult,),
        "hc_head_scale": (1,),
        **dict.fromkeys(images, (c.hidden_size,)),
    }


def _engram_shape(c: Dimensions, facts: LayerFacts) -> tuple[int, ...] | None:
    if c.v41 is None or facts.engram is None:
        return None
    return (c.v41.engram_num_embeddings[facts.engram], c.v41.engram_head_dim)


def _compressor_shape(c: Dimensions, below: str, facts: LayerFacts) -> tuple[int, ...] | None:
    if facts.draft:
        return None
    width = c.index_head_dim if below.startswith("attn.indexer.") else c.head_dim
    channels = 2 * width if facts.overlaps else width
    return {
        "ape": (facts.ratio, channels),
        "wkv": (channels, c.hidden_size),
        "wgate": (channels, c.hidden_size),
        "norm": (width,),
    }.get(below.rpartition(".")[2])
