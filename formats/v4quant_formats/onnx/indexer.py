"""The FP4 lightning indexer's scores as a graph of standard operators.

It computes what `v4quant_kernels.twins.indexer.indexer_logits` does, from the same packed bytes:
queries and keys in E2M1 with one power of two per 32 channels are decoded by table, and

    score[t, s] = sum over heads h of  w[t, h] * relu(q[t, h] . k[s]),   -inf unless s is visible.

A key stands for four tokens and is visible once they are complete: s < (position + 1) // 4. There
are no weights in it, so one graph serves every layer and both the numbers of tokens and of keys are
free.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.onnx.decode import GROUP, mx_values
from v4quant_formats.onnx.graph import Graph
from v4quant_kernels.twins.indexer import TOKENS_PER_KEY


def indexer_model(
    heads: int, dim: int, facts: Mapping[str, str], round_products: bool = False
) -> bytes:
    """Scores of `heads` heads of `dim` channels.

    Inputs: q_codes uint8 [T, heads, dim/2], q_scale uint8 [T, heads, dim/32], k_packed uint8
    [S, dim/2 + dim/32], head_weights float32 [T, heads], positions int64 [T]. Output: scores
    float32 [T, S]. round_products: q . k passes through bfloat16, as in the published reference.
    Raises UnsupportedPair when dim is not a multiple of 32.
    """
    if heads < 1 or dim < GROUP or dim % GROUP:
        raise UnsupportedPair(
            f"an indexer of {heads} heads of {dim} channels cannot be coded: the FP4 indexer needs "
            f"a multiple of {GROUP} channels"
        )
    half, groups = dim // 2, dim // GROUP
    graph = Graph("indexer")
    q_codes = graph.input("q_codes", "U8", ["tokens", heads, half])
    q_scale = graph.input("q_scale", "U8", ["tokens", heads, groups])
    k_packed = graph.input("k_packed", "U8", ["keys", half + groups])
    weights = graph.input("head_weights", "F32", ["tokens", heads])
    positions = graph.input("positions", "I64", ["tokens"])
    k_codes, k_scale = graph.nodes("Split", 2, k_packed, graph.constant([half, groups]), axis=1)
    queries = mx_values(graph, q_codes, q_scale, (-1, heads, dim))
    keys = mx_values(graph, k_codes, k_scale, (-1, dim))
    products = graph.node("MatMul", queries, graph.node("Transpose", keys, perm=[1, 0]))
    if round_products:
        products = graph.node("Cast", graph.node("Cast", products, to=16), to=1)
    rows = graph.node("Unsqueeze", weights, graph.constant([1]))
    summed = graph.node("MatMul", rows, graph.node("Relu", products))
    scores = graph.node("Squeeze", summed, graph.constant([1]))
    hidden = _hidden(graph, k_packed, positions)
    masked = graph.node("Where", hidden, graph.constant(-np.inf, np.float32), scores)
    graph.output("scores", masked, "F32", ["tokens", "keys"])
    return graph.model("Lightning-indexer scores of packed FP4 queries and keys.", facts)


def _hidden(graph: Graph, k_packed: str, positions: str) -> str:
    """Boolean [T, S]: keys whose four tokens are not complete at a token's position."""
    one = graph.constant(1)
    seen = graph.node("Div", graph.node("Add", positions, one), graph.constant(TOKENS_PER_KEY))
    keys = graph.node("Squeeze", graph.node("Shape", k_packed, start=0, end=1))
    index = graph.node("Range", graph.constant(0), keys, one)
    return graph.node("GreaterOrEqual", index, graph.node("Unsqueeze", seen, graph.constant([1])))
