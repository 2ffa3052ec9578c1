"""Other people's packages as far as the bench calls them: their public signatures, on record.

Each stands for versions of 2025 and 2026 and computes in float64 from what it is given, in its own
layout, with the checks of its own contract that matter for the layout. So an adapter that exchanges
gate and up, nibbles, scales or rows gives another result here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

_E2M1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), dtype=torch.float64)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module that can be imported, with its parents."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    module = sys.modules[name]
    for key, value in content.items():
        monkeypatch.setattr(module, key, value, raising=False)
    return module


def engine64(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The mixture as vLLM and SGLang define it: gate over up, weights behind the down product."""
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    x, half = x.double(), w1.shape[1] // 2
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for choice, expert in enumerate(ids[token].tolist()):
            both = w1[expert] @ x[token]
            h = torch.nn.functional.silu(both[:half]) * both[half:]
            out[token] += weights[token, choice] * (w2[expert] @ h)
    return out.bfloat16()


def tiled(codes: Tensor, scale: Tensor) -> Tensor:
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    spread = scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    return codes.double() * spread[:, : codes.shape[1], : codes.shape[2]]


def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_experts(
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        inplace: bool = False,
        activation: str = "silu",
        apply_router_weight_on_input: bool = False,
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        quant_config: Any = None,
    ) -> Tensor:
        if quant_config is not None:
            assert quant_config.block_shape == [128, 128]
            w1, w2 = tiled(w1, quant_config.w1_scale), tiled(w2, quant_config.w2_scale)
        return engine64(hidden_states, w1.double(), w2.double(), topk_weights, topk_ids)

    def fp8_w8a8_moe_quant_config(
        w1_scale: Tensor,
        w2_scale: Tensor,
        a1_scale: Tensor | None = None,
        a2_scale: Tensor | None = None,
        per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False,
        block_shape: list[int] | None = None,
    ) -> Any:
        return SimpleNamespace(w1_scale=w1_scale, w2_scale=w2_scale, block_shape=block_shape)

    layers = "vllm.model_executor.layers.fused_moe"
    install(monkeypatch, layers, fused_experts=fused_experts)
    install(monkeypatch, f"{layers}.config", fp8_w8a8_moe_quant_config=fp8_w8a8_moe_quant_config)


def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    def outplace_fused_experts(
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        b1: Tensor | None = None,
        b2: Tensor | None = None,
        activation: str = "silu",
        apply_router_weight_on_input: bool = False,
        use_fp8_w8a8: bool = False,
        use_int8_w8a8: bool = False,
        w1_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        block_shape: list[int] | None = None,
    ) -> Tensor:
        if use_fp8_w8a8:
            assert w1_scale is not None and w2_scale is not None and block_shape == [128, 128]
            w1, w2 = tiled(w1, w1_scale), tiled(w2, w2_scale)
        return engine64(hidden_states, w1.double(), w2.double(), topk_weights, topk_ids)

    name = "sglang.srt.layers.moe.fused_moe_triton.fused_moe"
    install(monkeypatch, name, outplace_fused_experts=outplace_fused_experts)


def mxfp4(weight: Any, scale: Any) -> Tensor:
    """float64 `[E, K, N]` of bytes `[E, K/2, N]`, low nibble first, and scales `[E, K/32, N]`."""
    codes, scales = weight.data, scale.data
    assert codes.stride(-2) == 1, "K is the contiguous dimension"
    assert (weight.layout, scale.layout) == ("values", "scales")
    nibbles = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1, 2).long()
    values = _E2M1[nibbles & 7] * (1.0 - 2.0 * (nibbles >> 3))
    return values * torch.exp2(scales.double() - 127).repeat_interleave(32, 1)


def rows64(rows: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    """Rows sorted by expert times their matrix."""
    pieces = torch.split(rows.double(), counts.tolist())
    return torch.cat([part @ w for part, w in zip(pieces, weight, strict=True)]).bfloat16()


def triton_kernels(monkeypatch: pytest.MonkeyPatch, newer: bool) -> None:
    """Of Triton 3.5 (`matmul_ogs`, layouts as class and arguments), or behind it."""
    fp4 = object()

    def wrap_torch_tensor(data: Tensor, dtype: Any = None) -> Any:
        return SimpleNamespace(data=data, dtype=dtype or data.dtype)

    def convert_layout(tensor: Any, layout: Any, **how: Any) -> Any:
        assert how == ({} if newer else {"mx_axis": 1})
        assert (tensor.dtype is fp4) == (layout == "values")
        return SimpleNamespace(data=tensor.data, layout=layout)

    def value_layout(mx_axis: int) -> Any:
        return "values" if newer else ("values", {"mx_axis": mx_axis})

    def scale_layout(mx_axis: int, num_warps: int = 8) -> Any:
        return "scales" if newer else ("scales", {"mx_axis": mx_axis})

    def make_ragged_tensor_metadata(slice_sizes: Tensor, n_total_rows: int) -> Tensor:
        assert slice_sizes.dtype == torch.int32 and int(slice_sizes.sum()) == n_total_rows
        return slice_sizes

    @dataclass
    class New:
        b_mx_scale: Any = None
        out_dtype: Any = None

    @dataclass
    class Old:
        weight_scale: Any = None
        out_dtype: Any = None

    def matmul(
        a: Tensor,
        b: Any,
        bias: Tensor | None,
        a_ragged_metadata: Any = None,
        b_ragged_metadata: Any = None,
        gather_indx: Any = None,
        scatter_indx: Any = None,
        precision_config: Any = None,
    ) -> Tensor:
        return rows64(a, a_ragged_metadata, mxfp4(b, precision_config.b_mx_scale))

    @dataclass
    class RoutingData:
        gate_scal: Tensor
        expt_hist: Tensor
        n_expts_tot: int
        n_expts_act: int
        expt_data: Any = None

    def compute_expt_data(expt_hist: Tensor, n_expts_tot: int, n_gates: int) -> str:
        assert expt_hist.shape == (n_expts_tot,) and int(expt_hist.sum()) == n_gates
        return "tiles"

    def matmul_ogs(
        x: Tensor,
        w: Any,
        bias: Tensor | None,
        routing_data: RoutingData | None = None,
        gather_indx: Any = None,
        scatter_indx: Any = None,
        precision_config: Any = None,
    ) -> Tensor:
        assert routing_data is not None and routing_data.expt_data == "tiles"
        return rows64(x, routing_data.expt_hist, mxfp4(w, precision_config.weight_scale))[None]

    install(
        monkeypatch, "triton_kernels.tensor", wrap_torch_tensor=wrap_torch_tensor, FP4=fp4,
        convert_layout=convert_layout, make_ragged_tensor_metadata=make_ragged_tensor_metadata,
    )  # fmt: skip
    install(
        monkeypatch, "triton_kernels.tensor_details.layout",
        make_default_matmul_mxfp4_w_layout=value_layout,
        make_default_matmul_mxfp4_w_scale_layout=scale_layout,
    )  # fmt: skip
    if newer:
        install(monkeypatch, "triton_kernels.matmul", matmul=matmul, PrecisionConfig=New)
        return
    monkeypatch.setattr(sys.modules["triton_kernels"], "__path__", [], raising=False)
    install(
        monkeypatch, "triton_kernels.matmul_ogs", matmul_ogs=matmul_ogs, PrecisionConfig=Old
    )  # fmt: skip
    install(
        monkeypatch, "triton_kernels.routing", RoutingData=RoutingData,
        compute_expt_data=compute_expt_data,
    )  # fmt: skip


def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    Pair = tuple[Tensor, Tensor]

    def m_grouped_fp8_gemm_nt_contiguous(
        a: Pair, b: Pair, d: Tensor, m_indices: Tensor, compiled_dims: str = "nk"
    ) -> None:
        assert a[0].dtype == torch.float8_e4m3fn and a[1].dtype == torch.float32
        assert m_indices.dtype == torch.int32 and a[0].shape[0] % 128 == 0
        x = a[0].double() * a[1].double().repeat_interleave(128, 1)
        weight = tiled(*b)
        for block in range(0, x.shape[0], 128):
            owners = m_indices[block : block + 128]
            found = torch.unique(owners[owners >= 0]).tolist()
            assert len(found) <= 1, "a block of 128 rows belongs to one expert"
            if found:
                rows = owners == found[0]
                d[block : block + 128][rows] = (x[block : block + 128] @ weight[found[0]].T)[
                    rows
                ].to(d.dtype)

    def logits(
        q: Tensor, k: Tensor, weights: Tensor, start: Tensor, end: Tensor, longest: int
    ) -> Tensor:
        assert weights.dtype == torch.float32
        assert start.dtype == end.dtype == torch.int32
        dots = torch.einsum("thd,sd->ths", q, k).clamp(min=0)
        scores = (weights.double().unsqueeze(-1) * dots).sum(1)
        if not longest:
            return scores.float()
        out = torch.full((q.shape[0], longest), torch.nan)
        for token, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
            out[token, : last - first] = scores[token, first:last].float()
        return out

    def fp8_mqa_logits(
        q: Tensor,
        kv: Pair,
        weights: Tensor,
        cu_seq_len_k_start: Tensor,
        cu_seq_len_k_end: Tensor,
        clean_logits: bool = True,
        max_seqlen_k: int = 0,
    ) -> Tensor:
        assert q.dtype == kv[0].dtype == torch.float8_e4m3fn and kv[1].dtype == torch.float32
        assert kv[1].shape == kv[0].shape[:1] and not (clean_logits and max_seqlen_k)
        keys = kv[0].double() * kv[1].double().unsqueeze(-1)
        spans = cu_seq_len_k_start, cu_seq_len_k_end
        return logits(q.double(), keys, weights, *spans, max_seqlen_k)

    def fp4(codes: Tensor, scales: Tensor) -> Tensor:
        assert codes.dtype == torch.int8 and scales.dtype == torch.int32
        assert scales.shape == codes.shape[:-1]
        bytes_ = codes.view(torch.uint8).long()
        nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(-2)
        values = _E2M1[nibbles & 7] * (1.0 - 2.0 * (nibbles >> 3))
        exponents = torch.stack([(scales >> (8 * i)) & 255 for i in range(4)], dim=-1)
        return values * torch.exp2(exponents.double() - 127).repeat_interleave(32, -1)

    def fp8_fp4_mqa_logits(
        q: Pair,
        kv: Pair,
        weights: Tensor,
        cu_seq_len_k_start: Tensor,
        cu_seq_len_k_end: Tensor,
        clean_logits: bool = True,
        max_seqlen_k: int = 0,
        logits_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        assert not (clean_logits and max_seqlen_k)
        spans = cu_seq_len_k_start, cu_seq_len_k_end
        return logits(fp4(*q), fp4(*kv), weights, *spans, max_seqlen_k)

    install(
        monkeypatch, "deep_gemm", fp8_mqa_logits=fp8_mqa_logits,
        fp8_fp4_mqa_logits=fp8_fp4_mqa_logits,
        m_grouped_fp8_gemm_nt_contiguous=m_grouped_fp8_gemm_nt_contiguous,
    )  # fmt: skip


def sgl_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fast_topk_v2(
        score: Tensor, lengths: Tensor, topk: int, row_starts: Tensor | None = None
    ) -> Tensor:
        assert lengths.dtype == torch.int32
        return score.topk(topk, dim=-1).indices.int()

    install(monkeypatch, "sgl_kernel", fast_topk_v2=fast_topk_v2)
