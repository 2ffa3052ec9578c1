"""The one file that knows DeepSeek-V4's tensor names, roles and releases.

Official names carry no `model.` prefix. A *stage* is a trunk layer (`layers.N`) or a draft stage
(`mtp.N`). A *module* (or base name) is a tensor name without its part: `layers.3.attn.wq_a` has the
parts `weight` and `scale`. Tensors without a part (`attn_sink`, `ape`, `tid2eid`, `gate.bias`,
`hc_*`) are modules of their own. To teach v4quant a new release, add its modules to the tables here
and its mark to `detect_release`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from v4quant_formats.model_config import CSA_RATIO, HCA_RATIO, ModelConfig

Role = Literal[
    "routed experts",
    "shared experts",
    "attention",
    "compressor",
    "indexer",
    "router",
    "hyper-connection",
    "norm",
    "embedding and head",
    "draft",
    "vision",
    "engram",
]

# Suffixes that are parts of a module, across the layouts v4quant reads and writes.
PARTS = (
    "weight",
    "scale",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_shape",
    "weight_scale_2",
    "input_scale",
    "weight_global_scale",
    "input_global_scale",
)
PROJECTIONS = ("w1", "w3", "w2")

_LINEAR = "linear"
_PLAIN = "plain"

# Modules of a stage: pattern below `layers.N.` / `mtp.N.` -> (role, linear or plain).
_STAGE_MODULES: list[tuple[str, Role, str]] = [
    (r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b)", "attention", _LINEAR),
    (r"attn\.attn_sink", "attention", _PLAIN),
    (r"attn\.(q_norm|kv_norm)", "norm", _PLAIN),
    (r"attn\.compressor\.(ape|wkv|wgate|norm)", "compressor", _PLAIN),
    (r"attn\.indexer\.wq_b", "indexer", _LINEAR),
    (r"attn\.indexer\.(weights_proj|compressor\.(ape|wkv|wgate|norm))", "indexer", _PLAIN),
    (r"ffn\.gate(\.tid2eid|\.bias|\.bias_vl)?", "router", _PLAIN),
    (r"ffn\.experts\.\d+\.w[123]", "routed experts", _LINEAR),
    (r"ffn\.shared_experts\.w[123]", "shared experts", _LINEAR),
    (r"(attn_norm|ffn_norm)", "norm", _PLAIN),
    (r"hc_(attn|ffn)_(fn|base|scale)", "hyper-connection", _PLAIN),
]
# Further modules only draft stages have (classic MTP, DSpark, Base copies of embedding and head).
_DRAFT_MODULES: list[tuple[str, Role, str]] = [
    (r"(e_proj|h_proj|main_proj)", "draft", _LINEAR),
    (r"(enorm|hnorm|norm|main_norm)", "draft", _PLAIN),
    (r"hc_head_(fn|base|scale)", "draft", _PLAIN),
    (r"markov_head\.markov_w[12]", "draft", _PLAIN),
    (r"confidence_head\.proj", "draft", _PLAIN),
    (r"(emb\.tok_emb|head)", "draft", _PLAIN),
]
_TOP_MODULES: list[tuple[str, Role, str]] = [
    (r"(embed|head)", "embedding and head", _PLAIN),
    (r"norm", "norm", _PLAIN),
    (r"hc_head_(fn|base|scale)", "hyper-connection", _PLAIN),
    (r"(vision|aligner)\..+", "vision", _PLAIN),
    (r"image_\w+", "vision", _PLAIN),
]

_STAGE = re.compile(r"(layers|mtp)\.(\d{1,4})\.(.+)")
_EXPERT = re.compile(r"(.+\.ffn\.experts)\.(\d{1,5})\.(w[123])")
_STAGE_TABLE = [(re.compile(p), r, k) for p, r, k in _STAGE_MODULES]
_DRAFT_TABLE = [(re.compile(p), r, k) for p, r, k in _DRAFT_MODULES]
_TOP_TABLE = [(re.compile(p), r, k) for p, r, k in _TOP_MODULES]


@dataclass(frozen=True)
class TensorName:
    """A tensor name taken apart. `stage` is `layers.N`, `mtp.N` or "" for the model itself."""

    module: str
    part: str
    stage: str
    role: Role
    is_linear: bool
    expert: int | None = None
    projection: str | None = None

    @property
    def is_draft(self) -> bool:
        """Whether the tensor belongs to an MTP or DSpark stage."""
        return self.stage.startswith("mtp.")


def split_part(name: str) -> tuple[str, str]:
    """`layers.0.attn.wq_a.scale` -> (`layers.0.attn.wq_a`, `scale`); no part gives ""."""
    module, dot, part = name.rpartition(".")
    return (module, part) if dot and part in PARTS else (name, "")


def parse_name(name: str) -> TensorName | None:
    """Take an official tensor name apart; None when no V4 release has such a tensor."""
    module, part = split_part(name)
    stage, tables, below = "", (_TOP_TABLE,), module
    if match := _STAGE.fullmatch(module):
        stage, below = f"{match[1]}.{int(match[2])}", match[3]
        tables = (_STAGE_TABLE, _DRAFT_TABLE) if match[1] == "mtp" else (_STAGE_TABLE,)
    for table in tables:
        for pattern, role, kind in table:
            if pattern.fullmatch(below):
                expert = _EXPERT.fullmatch(module)
                return TensorName(
                    module,
                    part,
                    stage,
                    role,
                    kind == _LINEAR,
                    int(expert[2]) if expert else None,
                    expert[3] if expert else None,
                )
    return None


def expert_module(stage: str, expert: int, projection: str) -> str:
    """Base name of one routed expert's projection (w1 gate, w3 up, w2 down)."""
    return f"{stage}.ffn.experts.{expert}.{projection}"


def trunk_stages(config: ModelConfig) -> list[str]:
    """Stage names of the trunk's layers."""
    return [f"layers.{i}" for i in range(config.num_hidden_layers)]


def draft_stages(names: Iterable[str]) -> list[str]:
    """Stage names of the draft stages present, in order (config's count is unreliable)."""
    found = {int(m[2]) for n in names if (m := _STAGE.match(n)) and m[1] == "mtp"}
    return [f"mtp.{i}" for i in sorted(found)]


def stage_modules(config: ModelConfig, stage: str) -> Iterator[str]:
    """Modules every trunk layer (and the common part of every draft stage) must have."""
    attention = ["wq_a", "wq_b", "wkv", "wo_a", "wo_b", "attn_sink", "q_norm", "kv_norm"]
    compressor = ["ape", "wkv", "wgate", "norm"]
    draft = stage.startswith("mtp.")
    layer = int(stage.rpartition(".")[2])
    ratio = 0 if draft else config.compress_ratios[layer]
    yield from (f"{stage}.attn.{m}" for m in attention)
    if ratio in (CSA_RATIO, HCA_RATIO):
        yield from (f"{stage}.attn.compressor.{m}" for m in compressor)
    if ratio == CSA_RATIO:
        yield f"{stage}.attn.indexer.wq_b"
        yield f"{stage}.attn.indexer.weights_proj"
        yield from (f"{stage}.attn.indexer.compressor.{m}" for m in compressor)
    yield f"{stage}.ffn.gate"
    hashed = not draft and layer < config.num_hash_layers
    yield f"{stage}.ffn.gate.{'tid2eid' if hashed else 'bias'}"
    for expert in range(config.n_routed_experts):
        yield from (expert_module(stage, expert, p) for p in PROJECTIONS)
    yield from (f"{stage}.ffn.shared_experts.{p}" for p in PROJECTIONS)
    yield from (f"{stage}.{m}" for m in ("attn_norm", "ffn_norm"))
    yield from (f"{stage}.hc_{s}_{p}" for s in ("attn", "ffn") for p in ("fn", "base", "scale"))


def expected_modules(config: ModelConfig, names: Iterable[str]) -> Iterator[str]:
    """Modules a checkpoint of this configuration must hold, for the draft stages it holds."""
    yield from ("embed", "head", "norm", "hc_head_fn", "hc_head_base", "hc_head_scale")
    for stage in [*trunk_stages(config), *draft_stages(names)]:
        yield from stage_modules(config, stage)


def detect_release(names: Iterable[str], expert_dtypes: set[str], model_type: str) -> str:
    """Which release this is, by tensor names and dtypes; config strings only break ties.

    `expert_dtypes` are the safetensors dtypes of the routed experts' stored weights.
    """
    names = set(names)
    if model_type == "deepseek_v41" or any(".engram." in n for n in names):
        return "V4.1"
    if any(n.startswith("vision.") for n in names):
        return "V4 Vision-Exp"
    if any(".main_proj." in n for n in names):
        return "V4 with DSpark"
    if expert_dtypes == {"F8_E4M3"}:
        return "V4 with FP8 experts (Base or converted)"
    if expert_dtypes == {"I8"}:
        return "V4"
    return "V4, converted"


def module_shape(config: ModelConfig, module: str) -> tuple[int, ...] | None:
    """Logical shape of a known trunk or MTP module ([out, in] for matrices); None if not tabled."""
    match = _STAGE.fullmatch(module)
    if match is None:
        return _top_shape(config, module)
    below = match[3]
    if expert := _EXPERT.fullmatch(module):
        below = f"ffn.shared_experts.{expert[3]}"
    if ".compressor." in below:
        return _compressor_shape(config, below, int(match[2]))
    c, streams = config, config.hc_mult * config.hidden_size
    mixes = config.hc_mult * (2 + config.hc_mult)
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
        "ffn.gate": (c.n_routed_experts, d),
        "ffn.gate.bias": (c.n_routed_experts,),
        "ffn.gate.tid2eid": (c.vocab_size, c.num_experts_per_tok),
        "ffn.shared_experts.w1": (inner, d),
        "ffn.shared_experts.w3": (inner, d),
        "ffn.shared_experts.w2": (d, inner),
        "e_proj": (d, d),
        "h_proj": (d, d),
        "hc_head_fn": (c.hc_mult, streams),
        "hc_head_base": (c.hc_mult,),
        "hc_head_scale": (1,),
    }
    for sub in ("attn", "ffn"):
        table |= {
            f"{sub}_norm": (d,),
            f"hc_{sub}_fn": (mixes, streams),
            f"hc_{sub}_base": (mixes,),
            f"hc_{sub}_scale": (3,),
        }
    table |= dict.fromkeys(("enorm", "hnorm", "norm", "main_norm"), (d,))
    return table.get(below)


def _top_shape(c: ModelConfig, module: str) -> tuple[int, ...] | None:
    return {
        "embed": (c.vocab_size, c.hidden_size),
        "head": (c.vocab_size, c.hidden_size),
        "norm": (c.hidden_size,),
        "hc_head_fn": (c.hc_mult, c.hc_mult * c.hidden_size),
        "hc_head_base": (c.hc_mult,),
        "hc_head_scale": (1,),
    }.get(module)


def _compressor_shape(c: ModelConfig, below: str, layer: int) -> tuple[int, ...] | None:
    width = c.index_head_dim if below.startswith("attn.indexer.") else c.head_dim
    ratio = c.compress_ratios[layer] if layer < c.num_hidden_layers else 0
    channels = 2 * width if ratio == CSA_RATIO else width
    return {
        "ape": (ratio, channels),
        "wkv": (channels, c.hidden_size),
        "wgate": (channels, c.hidden_size),
        "norm": (width,),
    }.get(below.rpartition(".")[2])
