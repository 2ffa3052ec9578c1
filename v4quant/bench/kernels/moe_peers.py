"""Other people's expert kernels, called on the bench's inputs where their packages are installed.

An adapter turns the stacked codes into what a package wants and returns one call an input set. What
it knows of a package is its public signatures, of which the tests keep a record; none of them has
been run on a GPU here. A package that is absent, or of a version that wants something else, becomes
a row that says so.

Where a kernel does less than ours, the row flatters it, and the name says what is missing: the
engines' fused experts apply no clamp, `triton_kernels` and `deep_gemm` are given sorted rows, and
of `deep_gemm` only the two products are timed, on inputs that were quantized and padded before.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from v4quant.bench.kernels.cases import Inputs
from v4quant.bench.kernels.peers import (
    Call,
    Calls,
    MoePeer,
    PeerWeights,
    calls_of,
    fp8_tiles,
    grouped,
    sorted_slots,
    summed,
    swiglu,
)
from v4quant_kernels.codec import dequantize
from v4quant_kernels.experts import StackedMatrix
from v4quant_kernels.ref import e8m0
from v4quant_kernels.scheme import SCHEMES as SCHEME_TABLE
from v4quant_kernels.twins.activation import fake_quant_e4m3

SCHEMES = tuple(s.name for s in SCHEME_TABLE.values() if s.element in {"e2m1", "e4m3", "int"})
_ALIGNED = 128  # deep_gemm's rows of an expert, in its contiguous layout


def _torch_cached(weights: PeerWeights, sets: Sequence[Inputs]) -> Calls:
    return calls_of([partial(grouped, s, *weights.dense) for s in sets])


def _torch_decoding(weights: PeerWeights, sets: Sequence[Inputs]) -> Calls:
    """The same, the active experts decoded before each time."""

    def call(inputs: Inputs, active: list[int]) -> Tensor:
        for expert in active:
            for q in weights.stacked[expert]:
                dequantize(q).bfloat16()
        return grouped(inputs, *weights.dense)

    return calls_of([partial(call, s, torch.unique(s[1]).tolist()) for s in sets])


# -- engines' fused experts -----------------------------------------------------------------------


def _vllm_bf16(weights: PeerWeights, sets: Sequence[Inputs]) -> Calls:
    module = importlib.import_module("vllm.model_executor.layers.fused_moe")
    return calls_of([_engine_call(module.fused_experts, s, *weights.dense) for s in sets])


def _vllm_fp8(weights: PeerWeights, sets: Sequence[Inputs]) -> Calls:
    module = importlib.import_module("vllm.model_executor.layers.fused_moe")
    config = importlib.import_module("vllm.model_executor.layers.fused_moe.config")
    gate_up, scale_1, down, scale_2 = fp8_tiles(weights)
    quantized = config.fp8_w8a8_moe_quant_config(
        w1_scale=scale_1, w2_scale=scale_2, block_shape=[128, 128]
    )
    how = {"quant_config": quantized}
    return calls_of([_engine_call(module.fused_experts, s, gate_up, down, **how) for s in sets])


_SGLANG = "sglang.srt.layers.moe.fused_moe_triton.fused_moe"


def _sglang_bf16(weights: PeerWeights, sets: Sequence[Inputs]) -> Calls:
    kernel = importlib.import_module(_SGLANG).outplace_fused_experts
    return calls_of([_engine_call(kernel, s, *weights.dense) for s in sets])


def _sglang_fp8(weights: PeerWeights, sets: Sequence[Inputs]) -> Calls:
    kernel = importlib.import_module(_SGLANG).outplace_fused_experts
    gate_up, scale_1, down, scale_2 = fp8_tiles(weights)
    how = {
        "use_fp8_w8a8": True, "w1_scale": scale_1, "w2_scale": scale_2, "block_shape": [128, 128],
    }  # fmt: skip
    return calls_of([_engine_call(kernel, s, gate_up, down, **how) for s in sets])


def _engine_call(kernel: Any, inputs: Inputs, w1: Tensor, w2: Tensor, **how: Any) -> Call:
    """vLLM's and SGLang's functions share these names."""
    x, ids, routing = inputs
    named = {"hidden_states": x, "w1": w1, "w2": w2, "topk_weights": routing}
    return partial(kernel, **named, topk_ids=ids.int(), **how)


# -- triton_kernels: MXFP4 with BF16 activations ---------------------------------------------------


def _triton_kernels(weights: PeerWeights, sets: Sequence[Inputs]) -> Calls:
    stacked = weights.stacked
    up = _mxfp4_weight(stacked.w1, stacked.w3)
    down = _mxfp4_weight(stacked.w2)
    multiply = _ragged_product()

    def call(inputs: Inputs) -> Tensor:
        x, ids, routing = inputs
        order, counts = sorted_slots(ids, stacked.num_experts)
        top_k = ids.shape[1]
        both = multiply(x[order // top_k], counts, *up)
        y = multiply(swiglu(both, routing.flatten()[order]), counts, *down)
        return summed(y, order, x.shape[0], top_k)

    return calls_of([partial(call, s) for s in sets])


def _mxfp4_weight(*parts: StackedMatrix) -> tuple[Any, Any]:
    """(weight, precision config): K outermost, in the package's layout for this GPU."""
    tensor = importlib.import_module("triton_kernels.tensor")
    layout = importlib.import_module("triton_kernels.tensor_details.layout")
    codes = torch.cat([p.codes for p in parts], dim=1).transpose(1, 2)
    scales = torch.cat([p.scale for p in parts], dim=1).transpose(1, 2)

    def laid_out(wrapped: Any, chosen: Any) -> Any:
        # Older versions answer (class, its arguments), newer ones an instance.
        how = chosen if isinstance(chosen, tuple) else (chosen, {})
        return tensor.convert_layout(wrapped, how[0], **how[1])

    value = laid_out(
        tensor.wrap_torch_tensor(codes, dtype=tensor.FP4),
        layout.make_default_matmul_mxfp4_w_layout(mx_axis=1),
    )
    scale = laid_out(
        tensor.wrap_torch_tensor(scales),
        layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8),
    )
    try:
        kernels = importlib.import_module("triton_kernels.matmul")
        return value, kernels.PrecisionConfig(b_mx_scale=scale, out_dtype=torch.bfloat16)
    except ModuleNotFoundError:
        kernels = importlib.import_module("triton_kernels.matmul_ogs")
        return value, kernels.PrecisionConfig(weight_scale=scale, out_dtype=torch.bfloat16)


def _ragged_product() -> Callable[[Tensor, Tensor, Any, Any], Tensor]:
    """Rows sorted by expert times their expert's matrix: `matmul`, or `matmul_ogs` before it."""
    try:
        kernels = importlib.import_module("triton_kernels.matmul")
    except ModuleNotFoundError:
        return _ragged_product_ogs()
    ragged = importlib.import_module("triton_kernels.tensor").make_ragged_tensor_metadata

    def multiply(rows: Tensor, counts: Tensor, weight: Any, precision: Any) -> Tensor:
        about = ragged(counts, rows.shape[0])
        found: Tensor = kernels.matmul(
            rows, weight, None, a_ragged_metadata=about, precision_config=precision
        )
        return found.view(rows.shape[0], -1)

    return multiply


def _ragged_product_ogs() -> Callable[[Tensor, Tensor, Any, Any], Tensor]:
    kernels = importlib.import_module("triton_kernels.matmul_ogs")
    routing = importlib.import_module("triton_kernels.routing")

    def multiply(rows: Tensor, counts: Tensor, weight: Any, precision: Any) -> Tensor:
        experts, slots = counts.shape[0], rows.shape[0]
        tiles = routing.compute_expt_data(counts, experts, slots)
        one = torch.ones(slots, dtype=rows.dtype, device=rows.device)
        about = routing.RoutingData(one, counts, experts, 1, tiles)
        found: Tensor = kernels.matmul_ogs(rows, weight, None, about, precision_config=precision)
        return found.view(slots, -1)

    return multiply


# -- deep_gemm: grouped FP8 products alone --------------------------------------------------------


def padded_rows(counts: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(row of each sorted slot, int32 expert of each row, -1 for none) where every expert begins at
    a multiple of 128 rows; as many rows as any routing may need."""
    experts = counts.shape[0]
    whole = (counts + _ALIGNED - 1) // _ALIGNED * _ALIGNED
    owner = torch.repeat_interleave(torch.arange(experts, device=counts.device), counts)
    begin = whole.cumsum(0) - whole
    before = counts.cumsum(0) - counts
    slot = torch.arange(slots, device=counts.device)
    place = begin[owner] + slot - before[owner]
    rows = -(-slots // _ALIGNED) * _ALIGNED + min(experts, slots) * _ALIGNED
    owners = torch.full((rows,), -1, dtype=torch.int32, device=counts.device)
    owners[place] = owner.int()
    return place, owners


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 `[rows, K]`, float32 scales `[rows, K / 128]`), rounded as the release does."""
    blocks = fake_quant_e4m3(x, 128).float().view(x.shape[0], -1, 128)
    amax = blocks.abs().amax(-1).clamp(min=1e-4)
    scale = e8m0.power_of_two(e8m0.ceil_exponent(amax / 448.0))
    return (blocks / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).view(x.shape), scale


def _deep_gemm(weights: PeerWeights, sets: Sequence[Inputs]) -> Calls:
    kernel = importlib.import_module("deep_gemm").m_grouped_fp8_gemm_nt_contiguous
    gate_up, scale_1, down, scale_2 = fp8_tiles(weights)

    def ready(inputs: Inputs) -> tuple[Callable[[], object], Call]:
        """What is timed, and the mixture of which it is part."""
        x, ids, routing = inputs
        order, counts = sorted_slots(ids, gate_up.shape[0])
        place, owner = padded_rows(counts, order.shape[0])
        slots = torch.zeros(owner.shape[0], dtype=torch.long, device=x.device)
        slots[place] = order
        first = e4m3_rows(x[slots // ids.shape[1]])
        both = x.new_zeros(owner.shape[0], gate_up.shape[1])
        kernel(first, (gate_up, scale_1), both, owner)
        second = e4m3_rows(swiglu(both, routing.flatten()[slots]))
        y = x.new_zeros(owner.shape[0], down.shape[1])

        def products() -> None:
            kernel(first, (gate_up, scale_1), both, owner)
            kernel(second, (down, scale_2), y, owner)

        def mixture() -> Tensor:
            products()
            return summed(y[place], order, x.shape[0], ids.shape[1])

        return products, mixture

    made = [ready(s) for s in sets]
    return Calls([timed for timed, _ in made], made[0][1])


PEERS = (
    MoePeer("torch grouped, weights cached in BF16", "", (), _torch_cached),
    MoePeer("vLLM fused experts, BF16, no clamp", "vllm", (), _vllm_bf16, math.inf),
    MoePeer("SGLang fused experts, BF16, no clamp", "sglang", (), _sglang_bf16, math.inf),
    MoePeer("torch grouped, decoded each time", "", SCHEMES, _torch_decoding),
    MoePeer("vLLM fused experts, FP8, no clamp", "vllm", ("fp8",), _vllm_fp8, math.inf),
    MoePeer("SGLang fused experts, FP8, no clamp", "sglang", ("fp8",), _sglang_fp8, math.inf),
    MoePeer("triton_kernels, MXFP4, sorted rows", "triton_kernels", ("mxfp4",), _triton_kernels),
    MoePeer("deep_gemm, FP8, the two products alone", "deep_gemm", ("fp8",), _deep_gemm),
)
