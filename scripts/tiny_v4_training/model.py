"""The trunk, and the two parts of it that the language-model loss leaves untouched.

The lightning indexer only chooses which compressed entries attention may see; choosing has no
gradient. It is taught beside the model to predict the attention those entries get: KL divergence
from the attention weights, summed over heads, to softmax(indexer scores). First every entry stays
visible (there is more to learn from), then only the chosen ones, as in use.

The routers' correction bias is a buffer: after each step it moves a little towards the experts that
were given fewer tokens than the average. And the hash layers' token table, which starts as zeros
(every token to expert 0, twice), is filled with distinct experts so that their loads come out even.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4CSACompressor,
    DeepseekV4HashRouter,
    DeepseekV4Indexer,
    DeepseekV4TopKRouter,
)

BIAS_STEP = 0.01
_NOT_FOR_TRAINING = ("quantization_config", "expert_dtype", "torch_dtype", "architectures")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json in the release's field names."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def library_config(raw: Mapping[str, Any], extra_layers: int = 0) -> DeepseekV4Config:
    """transformers' configuration for a release config, with `extra_layers` window layers behind.

    Weights are trained in float32; the quantization section describes only the written files.
    """
    # A deep copy: transformers rewrites nested sections in place.
    kept = copy.deepcopy({k: v for k, v in raw.items() if k not in _NOT_FOR_TRAINING})
    layers = raw["num_hidden_layers"]
    kept["compress_ratios"] = [*raw["compress_ratios"][:layers], *[0] * extra_layers]
    kept["num_hidden_layers"] = layers + extra_layers
    config = DeepseekV4Config.from_dict(kept)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def build_trunk(raw: Mapping[str, Any], counts: Tensor, seed: int) -> DeepseekV4ForCausalLM:
    """A freshly initialised float32 trunk whose hash tables suit the token counts `[vocab]`."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(library_config(raw)).float()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, DeepseekV4HashRouter):
            table = hash_table(counts, module.num_experts, module.top_k, generator)
            module.tid2eid.copy_(table)
    return model


def hash_table(counts: Tensor, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """int64 `[vocab, top_k]` of distinct experts, by decreasing count to the least loaded ones."""
    table = torch.empty(counts.numel(), top_k, dtype=torch.int64)
    load = torch.rand(experts, generator=generator, dtype=torch.float64)  # breaks ties
    for token in counts.argsort(descending=True, stable=True).tolist():
        chosen = load.topk(top_k, largest=False).indices
        table[token] = chosen
        load[chosen] += float(counts[token]) + torch.rand(
            top_k, generator=generator, dtype=torch.float64
        )
    return table


class RouterBalance:
    """Counts the tokens each expert is given and nudges the routers' bias after each step."""

    def __init__(self, model: nn.Module) -> None:
        self._counts: dict[DeepseekV4TopKRouter, Tensor] = {}
        for module in model.modules():
            if isinstance(module, DeepseekV4TopKRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: DeepseekV4TopKRouter, _: Any, output: tuple[Tensor, ...]) -> None:
        if router.training:
            seen = torch.bincount(output[2].reshape(-1), minlength=router.num_experts)
            self._counts[router] = self._counts.get(router, torch.zeros_like(seen)) + seen

    def step(self) -> float:
        """Move every bias; returns the largest load over the mean load, 1 where all are even."""
        worst = 1.0
        for router, counts in self._counts.items():
            mean = counts.double().mean()
            worst = max(worst, float(counts.max() / mean))
            router.e_score_correction_bias += BIAS_STEP * torch.sign(mean - counts).float()
        self._counts.clear()
        return worst


class IndexerDistillation:
    """Teaches the indexers of all CSA layers what attention attends to."""

    def __init__(self, model: nn.Module) -> None:
        self._losses: list[Tensor] = []
        self._scores: dict[nn.Module, Tensor] = {}
        self._indexers: list[DeepseekV4Indexer] = []
        for attention in model.modules():
            if not isinstance(attention, DeepseekV4Attention):
                continue
            if isinstance(attention.compressor, DeepseekV4CSACompressor):
                indexer = attention.compressor.indexer
                self._indexers.append(indexer)
                indexer.register_forward_pre_hook(_detach_inputs)
                indexer.scorer.register_forward_hook(self._keep_scores)
                attention.register_forward_hook(self._compare)

    def see_everything(self, everything: bool, index_topk: int) -> None:
        """Let attention see every complete entry, or only the `index_topk` chosen ones."""
        for indexer in self._indexers:
            indexer.index_topk = 2**40 if everything else index_topk

    def take_loss(self) -> Tensor:
        """Sum over layers of the mean KL per query since the last call."""
        total = torch.stack(self._losses).sum() if self._losses else torch.zeros(())
        self._losses.clear()
        return total

    def _keep_scores(self, scorer: nn.Module, _: Any, scores: Tensor) -> None:
        if scorer.training:
            self._scores[scorer] = scores

    def _compare(
        self, attention: DeepseekV4Attention, _: Any, output: tuple[Tensor, Tensor]
    ) -> None:
        scores = self._scores.pop(attention.compressor.indexer.scorer, None)
        if scores is not None and scores.shape[-1]:
            weights = output[1].detach()[..., -scores.shape[-1] :].float().sum(dim=1)
            self._losses.append(attention_kl(weights, scores))


def attention_kl(weights: Tensor, scores: Tensor) -> Tensor:
    """Mean over queries of KL(weights normalised || softmax(scores)), over entries with weight.

    weights, scores: float `[batch, queries, entries]`. Entries without weight are hidden from the
    query; queries without any entry do not count.
    """
    rows = weights.sum(-1) > 0
    if not rows.any():
        return scores.sum() * 0
    weights, scores = weights[rows], scores[rows]
    seen = weights > 0
    target = weights / weights.sum(-1, keepdim=True)
    predicted = F.log_softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    terms = torch.xlogy(target, target) - target * predicted.masked_fill(~seen, 0.0)
    return terms.sum(-1).mean()


def _detach_inputs(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The indexer learns from the trunk, and the trunk learns nothing from the indexer."""
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
