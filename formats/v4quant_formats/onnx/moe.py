"""A whole mixture-of-experts layer as ONNX: router, routed experts, shared expert.

The layer takes the FFN's normalised input `x` float32 [T, hidden] and, where it routes by table,
`token_ids` int64 [T]; `y` is float32 [T, hidden], before hyper-connections. The arithmetic is the
weights' own meaning in float32, without the release's rounding of activations.

The router is float32: square root of softplus of the gate's products. A layer with a table looks
its experts up; the others take the top_k of score + bias, equal scores to the lower index, as ONNX
defines TopK. The weights are the scores without bias, made to sum to `routed_scaling_factor`.

The shared expert keeps the numbers it has: FP8 tiles as E4M3 with repeated scales, BF16 as BF16,
anything else as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from v4quant_formats.onnx.decode import tile_values
from v4quant_formats.onnx.experts import ExpertBlock, add_experts, add_swiglu
from v4quant_formats.onnx.graph import Graph
from v4quant_formats.spec import TensorSpec

GATE, BIAS, TABLE = "gate", "gate.bias", "gate.tid2eid"
SHARED = ("shared.w1", "shared.w3", "shared.w2")


@dataclass(frozen=True)
class MoeLayer:
    """One layer. `hashed`: experts come from a table of token ids instead of biased scores."""

    stage: str
    block: ExpertBlock
    hashed: bool
    routed_scaling_factor: float


def experts_model(
    layer: MoeLayer, stored: Mapping[str, TensorSpec], facts: Mapping[str, str]
) -> bytes:
    """The routed experts alone: x, expert_ids, expert_weights to y."""
    block = layer.block
    graph = Graph("experts")
    x = graph.input("x", "F32", ["tokens", block.hidden])
    ids = graph.input("expert_ids", "I64", ["tokens", block.top_k])
    weights = graph.input("expert_weights", "F32", ["tokens", block.top_k])
    y = add_experts(graph, block, stored, x, ids, weights)
    graph.output("y", y, "F32", ["tokens", block.hidden])
    text = f"Routed experts of {layer.stage}: y = sum of weight * expert(x) over expert_ids."
    return graph.model(text, facts)


def moe_model(layer: MoeLayer, stored: Mapping[str, TensorSpec], facts: Mapping[str, str]) -> bytes:
    """The whole layer: x, and token_ids where it is hashed, to y."""
    block = layer.block
    graph = Graph("moe")
    x = graph.input("x", "F32", ["tokens", block.hidden])
    token_ids = graph.input("token_ids", "I64", ["tokens"]) if layer.hashed else None
    ids, weights = _route(graph, layer, stored, x, token_ids)
    routed = add_experts(graph, block, stored, x, ids, weights)
    shared = _shared(graph, block.limit, stored, x)
    graph.output("y", graph.node("Add", routed, shared), "F32", ["tokens", block.hidden])
    text = f"Mixture of experts of {layer.stage}, shared expert included, on normalised input."
    return graph.model(text, facts)


def _route(
    graph: Graph, layer: MoeLayer, stored: Mapping[str, TensorSpec], x: str, token_ids: str | None
) -> tuple[str, str]:
    logits = graph.node("Gemm", x, graph.stored(stored[GATE]), transB=1)
    scores = graph.node("Sqrt", graph.node("Softplus", logits))
    if token_ids is not None:
        ids = graph.node("Gather", graph.stored(stored[TABLE]), token_ids)
    else:
        biased = graph.node("Add", scores, graph.stored(stored[BIAS]))
        ids = graph.nodes("TopK", 2, biased, graph.constant([layer.block.top_k]))[1]
    chosen = graph.node("GatherElements", scores, ids, axis=1)
    total = graph.node("ReduceSum", chosen, graph.constant([1]), keepdims=1)
    factor = graph.constant(layer.routed_scaling_factor, np.float32)
    return ids, graph.node("Mul", graph.node("Div", chosen, total), factor)


def _shared(graph: Graph, limit: float, stored: Mapping[str, TensorSpec], x: str) -> str:
    w1, w3, w2 = (_dense(graph, stored, name) for name in SHARED)
    gate, up = (graph.node("Gemm", x, w, transB=1) for w in (w1, w3))
    return graph.node("Gemm", add_swiglu(graph, gate, up, limit), w2, transB=1)


def _dense(graph: Graph, stored: Mapping[str, TensorSpec], name: str) -> str:
    """A dense matrix in float32, from the form its stored tensors have."""
    if name in stored:
        value = graph.stored(stored[name])
        return value if stored[name].dtype == "F32" else graph.node("Cast", value, to=1)
    codes, scales = (graph.stored(stored[f"{name}.{part}"]) for part in ("codes", "scales"))
    return tile_values(graph, codes, scales)
