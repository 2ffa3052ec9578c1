"""The routed experts of a layer as ONNX: three ways to multiply, one way to store.

Inputs are tokens x `[T, hidden]`, the experts of each `[T, top_k]` and their routing weights; the
output is the weighted sum. Routing happens outside, in standard operators (onnx_moe.py), because
no fused operator knows square roots of softplus or tables from token ids.

* `qmoe`, for 4-bit integers: onnxruntime's fused operator. It wants to choose experts itself, so it
  is given ones at the chosen experts to choose by, and the true weights in a matrix of zeros to
  multiply with. A table that names an expert twice is then right as well.
* `matmulnbits`, for 2, 4 and 8-bit integers: a loop over the experts that some token chose. Each
  turn gathers that expert's codes and its tokens' rows and multiplies by MatMulNBits, in float32.
  (QMoE rounds activations to 8 bits for widths other than 4, so it is not used for them.)
* `lookup`, for MXFP4: the same loop with the release's own bytes decoded by table (onnx_decode.py).
  Standard operators only.

Stored are the bytes of our QTensors, stacked by expert, gate and up rows interleaved (g0, u0, g1,
u1, ...) as QMoE wants them; only integer scales are widened, from bfloat16 to float32. An expert is
a contiguous slab of each tensor, so experts are written one at a time, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.onnx.decode import GROUP, mx_values
from v4quant_formats.onnx.graph import MICROSOFT, Graph
from v4quant_formats.onnx.kernels import KERNELS, Kernel
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref.pack import packed_bytes
from v4quant_kernels.scheme import Scheme, get_scheme

CODES13, SCALES13 = "experts.w13.codes", "experts.w13.scales"
CODES2, SCALES2 = "experts.w2.codes", "experts.w2.scales"


@dataclass(frozen=True)
class ExpertBlock:
    """The experts of one layer. `limit` is the SwiGLU clamp, 0 for none."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    limit: float
    scheme: Scheme
    kernel: Kernel


def choose_kernel(scheme: str, kernel: str | None) -> Kernel:
    """The kernel for a scheme, checked. Raises UnsupportedScheme or UnsupportedPair."""
    get_scheme(scheme)
    allowed = KERNELS.get(scheme)
    if allowed is None:
        raise UnsupportedPair(
            f"scheme '{scheme}' has no kernel in onnxruntime on a CPU; choose one of "
            f"{', '.join(KERNELS)}"
        )
    for known in allowed:
        if kernel in (None, known):
            return known
    raise UnsupportedPair(
        f"scheme '{scheme}' does not run by kernel '{kernel}'; choose {' or '.join(allowed)}"
    )


def check_block(block: ExpertBlock, where: str) -> None:
    """Raise UnsupportedPair when channels do not form whole groups of the scheme."""
    for channels in (block.hidden, block.intermediate):
        if channels % block.scheme.group_size:
            raise UnsupportedPair(
                f"{where}: {channels} input channels are not a multiple of {block.scheme.name}'s "
                f"group_size {block.scheme.group_size}; choose a smaller group"
            )


def expert_specs(block: ExpertBlock) -> list[TensorSpec]:
    """The stored tensors, without their places."""
    e, group = block.experts, block.scheme.group_size
    wide, scale = 2 * block.intermediate, "U8" if block.kernel == "lookup" else "F32"
    width = {k: packed_bytes(k, block.scheme.bits) for k in (block.hidden, block.intermediate)}
    return [
        TensorSpec(CODES13, "U8", (e, wide, width[block.hidden])),
        TensorSpec(SCALES13, scale, (e, wide, block.hidden // group)),
        TensorSpec(CODES2, "U8", (e, block.hidden, width[block.intermediate])),
        TensorSpec(SCALES2, scale, (e, block.hidden, block.intermediate // group)),
    ]


def expert_pieces(
    expert: int, w1: QTensor, w3: QTensor, w2: QTensor
) -> Iterator[tuple[str, int, Tensor]]:
    """(tensor name, first byte, data) of one expert's four slabs."""
    for name, data in (
        (CODES13, torch.stack((w1.codes, w3.codes), 1)),
        (SCALES13, torch.stack((_scale(w1), _scale(w3)), 1)),
        (CODES2, w2.codes),
        (SCALES2, _scale(w2)),
    ):
        yield name, expert * data.numel() * data.element_size(), data


def _scale(q: QTensor) -> Tensor:
    assert q.scale is not None
    return q.scale.view(torch.uint8) if q.scheme.scale == "e8m0" else q.scale.float()


def add_experts(
    graph: Graph,
    block: ExpertBlock,
    stored: Mapping[str, TensorSpec],
    x: str,
    expert_ids: str,
    expert_weights: str,
) -> str:
    """Add the block's nodes; x float32 [T, hidden], ids int64 and weights float32 [T, top_k]."""
    names = {name: graph.stored(stored[name]) for name in (CODES13, SCALES13, CODES2, SCALES2)}
    if block.kernel == "qmoe":
        return _fused(graph, block, names, x, expert_ids, expert_weights)
    return _loop(graph, block, x, expert_ids, expert_weights)


def _fused(
    graph: Graph, block: ExpertBlock, names: Mapping[str, str], x: str, ids: str, weights: str
) -> str:
    tokens = graph.node("Shape", x, start=0, end=1)
    shape = graph.node("Concat", tokens, graph.constant([block.experts]), axis=0)
    zeros = graph.node("Expand", graph.constant([[0.0]], np.float32), shape)
    ones = graph.node("Expand", graph.constant([[1.0]], np.float32), graph.node("Shape", ids))
    chosen = graph.node("ScatterElements", zeros, ids, ones, axis=1)
    spread = graph.node("ScatterElements", zeros, ids, weights, axis=1, reduction="add")
    limit = {"swiglu_limit": float(block.limit)} if block.limit else {}
    return graph.node(
        "QMoE", x, chosen, names[CODES13], names[SCALES13], "", names[CODES2], names[SCALES2],
        "", "", "", "", "", "", "", spread,
        domain=MICROSOFT, k=block.top_k, expert_weight_bits=block.scheme.bits,
        block_size=block.scheme.group_size, activation_type="swiglu", swiglu_fusion=1,
        activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=0, **limit,
    )  # fmt: skip


def _loop(graph: Graph, block: ExpertBlock, x: str, ids: str, weights: str) -> str:
    """y = 0; for each expert e that occurs in ids: y[its tokens] += weighted FFN of e."""
    active = graph.nodes("Unique", 1, graph.node("Reshape", ids, graph.constant([-1])))[0]
    count = graph.node("Squeeze", graph.node("Shape", active))
    zeros = graph.node("Expand", graph.constant([[0.0]], np.float32), graph.node("Shape", x))
    body = Graph("expert", prefix="body_")
    turn = body.input("body_turn", "I64", [])
    body.input("body_go", "BOOL", [])
    total = body.input("body_total", "F32", ["tokens", block.hidden])
    expert = body.node("Gather", active, turn)
    places = body.node("Transpose", body.node("NonZero", body.node("Equal", ids, expert)))
    tokens = body.node("Gather", places, body.constant([0]), axis=1)
    scale = body.node("Unsqueeze", body.node("GatherND", weights, places), body.constant([1]))
    rows = body.node("GatherND", x, tokens)
    gate, up = _gate_and_up(body, block, rows, expert)
    hidden = body.node("Mul", add_swiglu(body, gate, up, block.limit), scale)
    shape = (block.hidden, block.intermediate)
    added = _product(body, block, hidden, CODES2, SCALES2, expert, shape)
    summed = body.node("ScatterND", total, tokens, added, reduction="add")
    body.output("body_still", body.constant(True, np.bool_), "BOOL", [])
    body.output("body_sum", summed, "F32", ["tokens", block.hidden])
    return graph.node("Loop", count, "", zeros, body=body.proto())


def _gate_and_up(graph: Graph, block: ExpertBlock, rows: str, expert: str) -> list[str]:
    shape = (2 * block.intermediate, block.hidden)
    both = _product(graph, block, rows, CODES13, SCALES13, expert, shape)
    pairs = graph.node("Reshape", both, graph.constant([-1, block.intermediate, 2]))
    return [graph.node("Gather", pairs, graph.constant(i), axis=2) for i in (0, 1)]


def add_swiglu(graph: Graph, gate: str, up: str, limit: float) -> str:
    """silu(min(gate, limit)) * clamp(up, -limit, limit); a limit of 0 means no clamp."""
    if limit:
        high, low = (graph.constant(v, np.float32) for v in (limit, -limit))
        gate = graph.node("Clip", gate, "", high)
        up = graph.node("Clip", up, low, high)
    return graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)


def _product(
    graph: Graph,
    block: ExpertBlock,
    rows: str,
    codes: str,
    scales: str,
    expert: str,
    shape: tuple[int, int],
) -> str:
    """rows [n, K] times one expert's matrix [N, K] transposed."""
    codes, scales = (graph.node("Gather", name, expert) for name in (codes, scales))
    if block.kernel == "lookup":
        assert block.scheme.group_size == GROUP
        return graph.node("Gemm", rows, mx_values(graph, codes, scales, shape), transB=1)
    n, k = shape
    group, bits = block.scheme.group_size, block.scheme.bits
    blob = graph.constant([n, k // group, group * bits // 8])
    return graph.node(
        "MatMulNBits", rows, graph.node("Reshape", codes, blob), scales,
        domain=MICROSOFT, K=k, N=n, bits=bits, block_size=group,
    )  # fmt: skip
