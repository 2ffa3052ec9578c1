"""Adapters to other people's kernels, held to what their packages are on record to want."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support import fake_peers
from v4quant.bench.choices import INDEX_CASES, SHAPES
from v4quant.bench.kernels import indexer_peers
from v4quant.bench.kernels.cases import IndexCase, index_case, random_weights
from v4quant.bench.kernels.cells import Cells
from v4quant.bench.kernels.device import Machine
from v4quant.bench.kernels.moe_peers import PEERS
from v4quant.bench.kernels.peers import PeerRow, PeerWeights, measure_peer
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import get_scheme
from v4quant_kernels.twins import indexer as ref_indexer

TINY = SHAPES["tiny"]
HERE = Machine("cpu", "a processor", "none", torch.__version__, "none", 1e9, 1e9, 0.0)


def cells() -> Cells:
    return Cells("moe", HERE, SilentProgress())


def rows(name: str, scheme: str, ran: Cells) -> list[PeerRow]:
    (peer,) = (p for p in PEERS if p.name.startswith(name))
    weights = PeerWeights(random_weights(TINY, get_scheme(scheme), "cpu"))
    found = measure_peer(peer, TINY, scheme, weights, (1, 9), ran)
    return [row for row in found if row is not None]


@pytest.mark.parametrize(
    ("name", "scheme", "install"),
    [
        ("torch grouped, weights", "int4-g32", lambda patch: None),
        ("torch grouped, decoded", "nvfp4", lambda patch: None),
        ("vLLM fused experts, BF16", "mxfp4", fake_peers.vllm),
        ("vLLM fused experts, FP8", "fp8", fake_peers.vllm),
        ("SGLang fused experts, BF16", "mxfp4", fake_peers.sglang),
        ("SGLang fused experts, FP8", "fp8", fake_peers.sglang),
        ("triton_kernels", "mxfp4", lambda patch: fake_peers.triton_kernels(patch, True)),
        ("triton_kernels", "mxfp4", lambda patch: fake_peers.triton_kernels(patch, False)),
        ("deep_gemm", "fp8", fake_peers.deep_gemm),
    ],
)
def test_every_adapter_gives_the_mixture(
    name: str, scheme: str, install: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    ran = cells()
    found = rows(name, scheme, ran)
    assert not ran.missing and [r.tokens for r in found] == [1, 9]
    for row in found:
        # E4M3 activations are 4 bits wide; all else is BF16.
        bar = 0.06 if name == "deep_gemm" else 0.02
        assert row.seconds > 0 and row.deviation < bar, row
        assert row.scheme == (scheme if "BF16" not in row.peer else "bf16")


def test_what_is_absent_or_other_than_expected_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = cells()
    for name in ("vLLM fused experts, BF16", "SGLang fused experts, BF16", "deep_gemm"):
        assert rows(name, "fp8", ran) == []
    assert [m.cell for m in ran.missing] == [
        "tiny bf16: vLLM fused experts, BF16, no clamp",
        "tiny bf16: SGLang fused experts, BF16, no clamp",
        "tiny fp8: deep_gemm, FP8, the two products alone",
    ]
    assert all(m.reason.startswith("ModuleNotFoundError: No module named") for m in ran.missing)
    fake_peers.install(monkeypatch, "deep_gemm", m_grouped_fp8_gemm_nt_contiguous=lambda a, b: 0)
    fake_peers.install(monkeypatch, "sglang.srt.layers.moe.fused_moe_triton.fused_moe")
    ran = cells()
    assert rows("deep_gemm", "fp8", ran) == [] == rows("SGLang fused experts, FP8", "fp8", ran)
    reasons = [m.reason.partition(":")[0] for m in ran.missing]
    assert reasons == ["TypeError", "TypeError", "AttributeError", "AttributeError"]


@pytest.mark.parametrize("name", ["one", "requests"])
def test_indexer_peers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INDEX_CASES, "requests", (5, 1))
    fake_peers.deep_gemm(monkeypatch)
    fake_peers.sgl_kernel(monkeypatch)
    ran = cells()
    found = indexer_peers.measure_peers(name, 120, 7, ran)
    assert not ran.missing
    kernels = [*indexer_peers.SCORERS, *indexer_peers.SELECTORS]
    assert [row.peer for row in found] == [k.name for k in kernels]
    assert all(row.deviation < 1e-6 and row.seconds > 0 for row in found), found


def test_widening_keeps_every_vector(generator: torch.Generator) -> None:
    codes = torch.randint(256, (50, 64), generator=generator, dtype=torch.uint8)
    scales = torch.randint(60, 72, (50, 4), generator=generator, dtype=torch.uint8)
    wide, factor = indexer_peers.widened(codes, scales)
    exact = ref_indexer._decode(codes, scales)
    assert torch.equal(wide.float() * factor.unsqueeze(-1), exact)
    scales[3] = torch.tensor([60, 72, 60, 60])
    with pytest.raises(V4QuantError, match="E4M3 cannot hold"):
        indexer_peers.widened(codes, scales)


def test_a_wrong_answer_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of another vector: the adapter is right, the kernel is not."""
    fake_peers.deep_gemm(monkeypatch)
    import deep_gemm  # type: ignore[import-not-found]

    genuine = deep_gemm.fp8_mqa_logits

    def wrong(q: Any, kv: Any, *rest: Any, **more: Any) -> Any:
        return genuine(q, (kv[0], kv[1] * torch.linspace(1, 2, len(kv[1]))), *rest, **more)

    monkeypatch.setattr(deep_gemm, "fp8_mqa_logits", wrong)
    found = {r.peer: r for r in indexer_peers.measure_peers("one", 120, 7, cells())}
    assert found["deep_gemm, FP8 widened before"].deviation > 0.1
    case: IndexCase = index_case("one", 120, "cpu")
    assert case.keys == 30 and case.ends.tolist() == [30]
