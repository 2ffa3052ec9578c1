"""What llama.cpp calls the tensors of a V4 or V4.1 model, and where official tensors lie inside its
own.

llama.cpp's architecture `deepseek4` has three habits the release has not. Every tensor ends in
`.weight` (the routing bias in `.bias`), also where the release has no suffix. The routed experts
of a layer are one tensor [E, N, K] for each projection, so an expert is a slice of it. The draft
stage is the block behind the trunk's last, its `e_proj` and `h_proj` are the left and right half of
one matrix `eh_proj` [d, 2d], and its own hc_head and final norm take the model's names, which is
why it has a file of its own: in the trunk's file those names are the trunk's. DSpark's stages are a
small model of architecture `dflash`, whose blocks begin at 0.

V4.1 is architecture `deepseek41`: V4's names and a few more. No draft stage has a place there.

Source: llama.cpp's src/llama-arch.cpp (names), src/models/deepseek4.cpp and dflash.cpp (which of
them it reads); for V4.1 src/models/deepseek41.cpp and the converter of pull request 28696.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ARCHITECTURE = "deepseek4"
V41_ARCHITECTURE = "deepseek41"
DSPARK_ARCHITECTURE = "dflash"

_HC = ("fn", "base", "scale")

# Official module -> (name without suffix, suffix), for the model itself and below a stage.
_TOP: dict[str, str] = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    **{f"hc_head_{p}": f"output_hc_{p}.weight" for p in _HC},
}
_STAGE: dict[str, str] = {
    "attn_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    **{f"hc_{s}_{p}": f"hc_{s}_{p}.weight" for s in ("attn", "ffn") for p in _HC},
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a": "attn_q_a.weight",
    "attn.q_norm": "attn_q_a_norm.weight",
    "attn.wq_b": "attn_q_b.weight",
    "attn.wkv": "attn_kv.weight",
    "attn.kv_norm": "attn_kv_a_norm.weight",
    "attn.wo_a": "attn_output_a.weight",
    "attn.wo_b": "attn_output_b.weight",
    "attn.compressor.wkv": "attn_compressor_kv.weight",
    "attn.compressor.wgate": "attn_compressor_gate.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.norm": "attn_compressor_norm.weight",
    "attn.indexer.wq_b": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj": "indexer.proj.weight",
    "attn.indexer.compressor.wkv": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.norm": "indexer_compressor_norm.weight",
    # V4.1 only.
    "attn.indexer.wk": "indexer.attn_k.weight",
    "attn.indexer.k_norm": "indexer.k_norm.weight",
    "engram.embed": "engram_embd.weight",
    "engram.wkv": "engram_wkv.weight",
    "engram.q_weight": "engram_q.weight",
    "engram.k_weight": "engram_k.weight",
    "ffn.gate": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.bias_vl": "exp_probs_b_vl.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w3": "ffn_up_shexp.weight",
    "ffn.shared_experts.w2": "ffn_down_shexp.weight",
}
# Below a draft stage only.
_DRAFT: dict[str, str] = {
    "enorm": "nextn.enorm.weight",
    "hnorm": "nextn.hnorm.weight",
    "norm": "nextn.shared_head_norm.weight",
    "emb.tok_emb": "nextn.embed_tokens.weight",
    "head": "nextn.shared_head_head.weight",
}
# DSpark: what its first stage (reads the trunk) and its last one (predicts) have for the model.
_DSPARK_FIRST: dict[str, str] = {"main_proj": "fc.weight", "main_norm": "enc.output_norm.weight"}
_DSPARK_LAST: dict[str, str] = {
    "norm": "output_norm.weight",
    "markov_head.markov_w1": "markov_w1.weight",
    "markov_head.markov_w2": "markov_w2.weight",
    "confidence_head.proj": "conf_proj.weight",
    **{f"hc_head_{p}": f"output_hc_{p}.weight" for p in _HC},
}
_EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
_HALVES = ("e_proj", "h_proj")
_EH_PROJ = "nextn.eh_proj.weight"

# Official modules whose tensor has no `.weight` of its own.
_BARE = re.compile(
    r".*(hc_\w+_(fn|base|scale)|attn_sink|\.ape|\.bias|\.bias_vl|\.tid2eid|\.[qk]_weight)"
)
_OFFICIAL = re.compile(r"(layers|mtp)\.(\d{1,4})\.(.+)")
_EXPERT = re.compile(r"ffn\.experts\.(\d{1,5})\.(w[123])")
_BLOCK = re.compile(r"blk\.(\d{1,4})\.(.+)")


@dataclass(frozen=True)
class Place:
    """Where an official tensor lies: `slice_` of `tensor`.

    expert: the tensor is a stack [E, N, K] and this is its E-th part.
    half: 0 or 1, the tensor is [N, 2K] and this is its left or right half.
    """

    tensor: str
    expert: int | None = None
    half: int | None = None


def place_of(module: str, layers: int) -> Place | None:
    """Where a module of a model with `layers` trunk layers lies; None if llama.cpp has no place."""
    if module in _TOP:
        return Place(_TOP[module])
    match = _OFFICIAL.fullmatch(module)
    if match is None:
        return None
    draft, below = match[1] == "mtp", match[3]
    block = int(match[2]) + (layers if draft else 0)
    if expert := _EXPERT.fullmatch(below):
        return Place(f"blk.{block}.{_EXPERTS[expert[2]]}.weight", expert=int(expert[1]))
    if draft and below in _HALVES:
        return Place(f"blk.{block}.{_EH_PROJ}", half=_HALVES.index(below))
    if draft and below.startswith("hc_head_"):
        return Place(_TOP[below])
    name = (_DRAFT.get(below) if draft else None) or _STAGE.get(below)
    return Place(f"blk.{block}.{name}") if name else None


def dspark_place_of(module: str) -> Place | None:
    """Where a DSpark stage's module lies in the stages' own file; None if it has no place."""
    match = _OFFICIAL.fullmatch(module)
    if match is None or match[1] != "mtp":
        return None
    stage, below = match[2], match[3]
    top = _DSPARK_FIRST.get(below) or _DSPARK_LAST.get(below)
    return Place(top) if top else place_of(f"layers.{stage}.{below}", 0)


@dataclass(frozen=True)
class Meaning:
    """What a tensor of a GGUF file is: one module, or the modules it holds.

    stacked: `modules[0]` has `{}` where an expert's number stands. halves: two modules.
    """

    modules: tuple[str, ...]
    stacked: bool = False


_TOP_BACK = {v: k for k, v in _TOP.items()}
_STAGE_BACK = {v: k for k, v in _STAGE.items()}
_DRAFT_BACK = {v: k for k, v in _DRAFT.items()}
_EXPERTS_BACK = {f"{v}.weight": k for k, v in _EXPERTS.items()}


def meaning_of(tensor: str, layers: int, draft_file: bool = False) -> Meaning | None:
    """The official modules in a tensor of llama.cpp's; None if V4 has none such.

    `draft_file`: the model's own names are a draft stage's there (hc_head) or copies.
    """
    if tensor in _TOP_BACK:
        module = _TOP_BACK[tensor]
        return Meaning((f"mtp.0.{module}" if draft_file and module.startswith("hc_") else module,))
    match = _BLOCK.fullmatch(tensor)
    if match is None:
        return None
    block, below = int(match[1]), match[2]
    draft = block >= layers
    stage = f"mtp.{block - layers}" if draft else f"layers.{block}"
    if below in _EXPERTS_BACK:
        return Meaning((f"{stage}.ffn.experts.{{}}.{_EXPERTS_BACK[below]}",), stacked=True)
    if draft and below == _EH_PROJ:
        return Meaning(tuple(f"{stage}.{half}" for half in _HALVES))
    name = (_DRAFT_BACK.get(below) if draft else None) or _STAGE_BACK.get(below)
    return Meaning((f"{stage}.{name}",)) if name else None


def dspark_meaning_of(tensor: str, stages: int) -> Meaning | None:
    """The official modules in a tensor of a `dflash` file of so many stages."""
    for table, stage in ((_DSPARK_FIRST, 0), (_DSPARK_LAST, stages - 1)):
        for below, name in table.items():
            if name == tensor:
                return Meaning((f"mtp.{stage}.{below}",))
    found = meaning_of(tensor, stages)
    if found is None or not found.modules[0].startswith("layers."):
        return None
    return Meaning(tuple(f"mtp.{m.removeprefix('layers.')}" for m in found.modules), found.stacked)


def tensor_name(module: str) -> str:
    """The official tensor of a module: most end in `.weight`."""
    return module if _BARE.fullmatch(module) else f"{module}.weight"
