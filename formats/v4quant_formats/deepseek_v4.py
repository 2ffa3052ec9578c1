"""The one file that knows DeepSeek-V4's tensor names, roles and releases.

Official names carry no `model.` prefix. A *stage* is a trunk layer (`layers.N`) or a draft stage
(`mtp.N`). A *module* (or base name) is a tensor name without its part: `layers.3.attn.wq_a` has the
parts `weight` and `scale`. Tensors without a part (`attn_sink`, `ape`, `tid2eid`, `gate.bias`,
`hc_*`) are modules of their own. To teach v4quant a new release, add its modules to the tables
here, their shapes to `module_shapes.py` and its mark to `detect_release`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from v4quant_formats.model_config import Dimensions, LayerFacts

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
    "engram tables",
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
    # Of other tools' packs: zero points, group indices, GPTQ's and AWQ's names.
    "weight_zero_point",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)
PROJECTIONS = ("w1", "w3", "w2")

_LINEAR = "linear"
_PLAIN = "plain"
_HC = ("fn", "base", "scale")

# Modules of a stage: pattern below `layers.N.` / `mtp.N.` -> (role, linear or plain).
# Experts lead because nearly all names are theirs and the first match ends the search.
_STAGE_MODULES: list[tuple[str, Role, str]] = [
    (r"ffn\.experts\.(0|[1-9][0-9]{0,4})\.w[123]", "routed experts", _LINEAR),
    (r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b)", "attention", _LINEAR),
    (r"attn\.attn_sink", "attention", _PLAIN),
    (r"attn\.(q_norm|kv_norm)", "norm", _PLAIN),
    (r"attn\.compressor\.(ape|wkv|wgate|norm)", "compressor", _PLAIN),
    (r"attn\.indexer\.wq_b", "indexer", _LINEAR),
    (r"attn\.indexer\.(weights_proj|compressor\.(ape|wkv|wgate|norm))", "indexer", _PLAIN),
    (r"attn\.indexer\.(wk|k_norm)", "indexer", _PLAIN),
    (r"ffn\.gate(\.tid2eid|\.bias|\.bias_vl)?", "router", _PLAIN),
    (r"ffn\.shared_experts\.w[123]", "shared experts", _LINEAR),
    (r"(attn_norm|ffn_norm)", "norm", _PLAIN),
    (r"hc_(attn|ffn)_(fn|base|scale)", "hyper-connection", _PLAIN),
    # V4.1: the tables are looked up, not multiplied, so no layout ever re-encodes them.
    (r"engram\.wkv", "engram", _LINEAR),
    (r"engram\.embed", "engram tables", _PLAIN),
    (r"engram\.(q_weight|k_weight)", "engram", _PLAIN),
]
# Further modules only draft stages have (classic MTP, DSpark, Base copies of embedding and head).
_DRAFT_MODULES: list[tuple[str, Role, str]] = [
    (r"(e_proj|h_proj|main_proj)", "draft", _LINEAR),
    (r"(enorm|hnorm|norm|main_norm)", "draft", _PLAIN),
    (r"hc_head_(fn|base|scale)", "draft", _PLAIN),
    (r"markov_head\.(markov_w[12]|embed|head)", "draft", _PLAIN),
    (r"confidence_head\.proj", "draft", _PLAIN),
    (r"(emb\.tok_emb|head)", "draft", _PLAIN),
]
_TOP_MODULES: list[tuple[str, Role, str]] = [
    (r"(embed|head)", "embedding and head", _PLAIN),
    (r"norm", "norm", _PLAIN),
    (r"hc_head_(fn|base|scale)", "hyper-connection", _PLAIN),
    (r"(vision|aligner)\..+", "vision", _PLAIN),
    (r"image_(start|end|newline|pad)", "vision", _PLAIN),
]

STAGE = re.compile(r"(layers|mtp)\.(0|[1-9][0-9]{0,3})\.(.+)")
EXPERT = re.compile(r"ffn\.experts\.(0|[1-9][0-9]{0,4})\.(w[123])")
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
    stage, kind, below = "", "", module
    if match := STAGE.fullmatch(module):
        stage, kind, below = f"{match[1]}.{match[2]}", match[1], match[3]
    found = _classify(kind, below)
    return TensorName(module, part, stage, *found) if found else None


def is_linear(module: str) -> bool:
    """Whether a module of a release is a matrix that inputs are multiplied by."""
    name = parse_name(f"{module}.weight")
    return name is not None and name.is_linear


@lru_cache(maxsize=1 << 14)
def _classify(kind: str, below: str) -> tuple[Role, bool, int | None, str | None] | None:
    """Role, linear or not, expert and projection of a module below a stage of a kind.

    Remembered: 384 experts have the same names in every layer.
    """
    tables = {"mtp": [_STAGE_TABLE, _DRAFT_TABLE], "layers": [_STAGE_TABLE], "": [_TOP_TABLE]}
    for table in tables[kind]:
        for pattern, role, form in table:
            if pattern.fullmatch(below):
                expert = EXPERT.fullmatch(below)
                number, projection = (int(expert[1]), expert[2]) if expert else (None, None)
                return role, form == _LINEAR, number, projection
    return None


def expert_module(stage: str, expert: int, projection: str) -> str:
    """Base name of one routed expert's projection (w1 gate, w3 up, w2 down)."""
    return f"{stage}.ffn.experts.{expert}.{projection}"


def trunk_stages(config: Dimensions) -> list[str]:
    """Stage names of the trunk's layers."""
    return [f"layers.{i}" for i in range(config.num_hidden_layers)]


def draft_stages(names: Iterable[str]) -> list[str]:
    """Stage names of the draft stages present, in order (config's count is unreliable)."""
    found = {int(m[2]) for n in names if (m := STAGE.match(n)) and m[1] == "mtp"}
    return [f"mtp.{i}" for i in sorted(found)]


def wrong_draft_count(config: Mapping[str, Any], stages: int) -> bool:
    """Whether config.json's number of draft stages is not that of the tensors. DSpark's releases
    say 1 for their three."""
    said = config.get("num_nextn_predict_layers", stages)
    return said == 0 or ("dspark_target_layer_ids" not in config and said != stages)


def stage_modules(config: Dimensions, stage: str, vision: bool = False) -> Iterator[str]:
    """Modules a trunk layer (or the part draft stages share with one) must have.

    `vision`: the release also routes image tokens, by `gate.bias_vl` in every layer.
    """
    attention = ["wq_a", "wq_b", "wkv", "wo_a", "wo_b", "attn_sink", "q_norm", "kv_norm"]
    facts = config.facts(stage)
    yield from (f"{stage}.attn.{m}" for m in attention)
    long_range = _v41_modules if config.v41 else _v4_modules
    yield from (f"{stage}.{m}" for m in long_range(facts))
    yield f"{stage}.ffn.gate"
    if facts.hashed:
        yield f"{stage}.ffn.gate.tid2eid"
    if vision or not facts.hashed:
        yield f"{stage}.ffn.gate.bias"
    if vision:
        yield f"{stage}.ffn.gate.bias_vl"
    for expert in range(facts.experts):
        yield from (expert_module(stage, expert, p) for p in PROJECTIONS)
    yield from (f"{stage}.ffn.shared_experts.{p}" for p in PROJECTIONS)
    yield from (f"{stage}.{m}" for m in ("attn_norm", "ffn_norm"))
    yield from (f"{stage}.hc_{s}_{p}" for s in ("attn", "ffn") for p in _HC)


def _v4_modules(facts: LayerFacts) -> Iterator[str]:
    """Compressor and indexer of a V4 layer."""
    compressor = ["ape", "wkv", "wgate", "norm"]
    if facts.makes_entries:
        yield from (f"attn.compressor.{m}" for m in compressor)
    if facts.makes_choice:
        yield from ("attn.indexer.wq_b", "attn.indexer.weights_proj")
        yield from (f"attn.indexer.compressor.{m}" for m in compressor)


def _v41_modules(facts: LayerFacts) -> Iterator[str]:
    """Compressor, indexer and Engram of a V4.1 layer."""
    if facts.makes_entries:
        yield from ("attn.compressor.wkv", "attn.compressor.norm")
        if facts.gates_entries:
            yield "attn.compressor.wgate"
        yield from ("attn.indexer.wk", "attn.indexer.k_norm")
    if facts.makes_choice:
        yield from ("attn.indexer.wq_b", "attn.indexer.weights_proj")
    if facts.engram is not None:
        yield from (f"engram.{m}" for m in ("embed", "wkv", "q_weight", "k_weight"))


def markov_modules(config: Dimensions, stage: str) -> tuple[str, str]:
    """DSpark's low-rank table in its last stage: read by token, and multiplied for the logits."""
    names = ("embed", "head") if config.v41 else ("markov_w1", "markov_w2")
    return f"{stage}.markov_head.{names[0]}", f"{stage}.markov_head.{names[1]}"


def draft_modules(config: Dimensions, stages: list[str], dspark: bool) -> Iterator[str]:
    """Modules of draft stages beyond a layer's: one classic MTP stage, or DSpark's chain.

    DSpark reads the trunk in its first stage and predicts in its last.
    """
    if not stages:
        return
    first, last = stages[0], stages[-1]
    if dspark:
        yield from (f"{first}.{m}" for m in ("main_proj", "main_norm"))
        yield from markov_modules(config, last)
        yield f"{last}.confidence_head.proj"
    else:
        yield from (f"{first}.{m}" for m in ("e_proj", "h_proj", "enorm", "hnorm"))
    yield f"{last}.norm"
    if not config.v41:
        yield from (f"{last}.hc_head_{p}" for p in _HC)


def expected_modules(config: Dimensions, names: Collection[str]) -> Iterator[str]:
    """Modules a checkpoint of this configuration must hold, for the draft stages it holds."""
    yield from ("embed", "head", "norm")
    if not config.v41:
        yield from (f"hc_head_{p}" for p in _HC)
    vision = any(n.startswith("vision.") for n in names)
    if vision:
        yield from ("vision.patch_embed.proj", "vision.norm", "aligner.w1", "aligner.w2")
        yield from ("image_start", "image_end", "image_newline")
    drafts = draft_stages(names)
    for stage in [*trunk_stages(config), *drafts]:
        yield from stage_modules(config, stage, vision)
    # Released DSpark configs say so; a config that lost the keys is told by the tensors.
    dspark = config.dspark is not None or any(f"{s}.main_norm.weight" in names for s in drafts)
    yield from draft_modules(config, drafts, dspark)


def other_release(config: Dimensions, names: Collection[str]) -> list[str]:
    """What to say, if anything, about a config of V4 beside tensors of V4.1, or the reverse."""
    if config.v41 is None and any(".engram." in name for name in names):
        return ["config.json is V4's, but the tensors are V4.1's (they have an Engram)"]
    if config.v41 is not None and "hc_head_fn" in names:
        return ["config.json is V4.1's, but the tensors are V4's (they have hc_head_fn)"]
    return []


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
    if "mtp.0.emb.tok_emb.weight" in names:
        return "V4 Base"
    if expert_dtypes == {"F8_E4M3"}:
        return "V4 with FP8 experts (Base or converted)"
    if expert_dtypes == {"I8"}:
        return "V4"
    return "V4, converted"


def role_of(parsed: TensorName | None) -> str:
    """The class of bytes a tensor belongs to, for tables."""
    if parsed is None:
        return "unknown"
    if parsed.is_draft:
        return "draft: routed experts" if parsed.expert is not None else "draft: rest"
    return parsed.role
