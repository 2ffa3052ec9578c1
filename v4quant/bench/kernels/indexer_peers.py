"""Other people's indexer kernels, called on the bench's inputs where their packages are installed.

Scores: `deep_gemm` takes the packed codes as they are on sm_100, and E4M3 with one scale a vector
on sm_90; SGLang and vLLM call the same two. The first is what we compute; the second gets numbers
that were widened before its time is taken. Selection: `torch.topk`, and SGLang's kernel, neither of
which promises an order among equal scores.

Scores are held against the torch twin's for a few tokens; a selection against the k-th score.
Nothing here has been run on a GPU; see `moe_peers.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from v4quant.bench.kernels.cases import CHANNELS, IndexCase, index_case
from v4quant.bench.kernels.cells import Cells, Once, told
from v4quant.bench.kernels.device import Timing, time_foreign
from v4quant.bench.kernels.peers import package_version
from v4quant_kernels import dispatch
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.ref import e2m1, e8m0
from v4quant_kernels.twins.indexer import WORKSPACE

_HALF = CHANNELS // 2
_CHECKED = 2


@dataclass(frozen=True)
class IndexerPeerRow:
    """One measurement of another kernel; seconds. deviation: of scores from the twin's, of their
    norm; of a selection, the share of tokens whose k-th score is another."""

    case: str
    context: int
    tokens: int
    k: int
    peer: str
    version: str
    seconds: float
    graph: bool
    deviation: float


@dataclass(frozen=True)
class Scorer:
    """A kernel that scores: what makes a call that returns `[tokens, keys]`."""

    name: str
    package: str
    call: Callable[[IndexCase], Callable[[], Tensor]]


@dataclass(frozen=True)
class Selector:
    """A kernel that selects: scores, int32 ends and k give indices `[tokens, k]`."""

    name: str
    package: str
    select: Callable[[Tensor, Tensor, int], Tensor]


def measure_peers(name: str, context: int, k: int, cells: Cells) -> list[IndexerPeerRow]:
    """A row for each kernel that can be imported."""

    def make() -> IndexCase:
        case = index_case(name, context, cells.machine.device)
        return case.piece(max(1, min(case.tokens, WORKSPACE // case.keys)))

    small = Once(make)
    kernels = [(p.name, p.package, partial(_score, p)) for p in SCORERS]
    kernels += [(p.name, p.package, partial(_select, p, k=k)) for p in SELECTORS]
    rows = []
    for kernel, package, measure in kernels:
        cell = f"{name} {context}: {kernel}"
        try:
            version = package_version(package)
        except Exception as error:  # noqa: BLE001  # importing foreign code may fail in any way
            cells.skip(cell, told(error))
            continue

        def row(
            kernel: str = kernel, version: str = version, measure: _Measure = measure
        ) -> IndexerPeerRow:
            case = small()
            timing, deviation = measure(case, device=cells.machine.device)
            return IndexerPeerRow(
                name, context, case.tokens, k, kernel, version, timing.seconds, timing.graph,
                deviation,
            )  # fmt: skip

        rows.append(cells.run(cell, "peer", row))
    return [row for row in rows if row is not None]


_Measure = Callable[..., tuple[Timing, float]]


def _score(peer: Scorer, case: IndexCase, device: str) -> tuple[Timing, float]:
    call = peer.call(case)
    few, found = case.piece(_CHECKED), call()[:_CHECKED].float()
    expected = dispatch.indexer_logits(
        few.q_codes, few.q_scale, few.packed, few.weights, few.positions,
        first_key=few.first, num_keys=few.keys, backend="torch",
    )  # fmt: skip
    seen = expected != -torch.inf
    deviation = float((found - expected)[seen].norm() / expected[seen].norm())
    return time_foreign([call], device), deviation


def _select(peer: Selector, case: IndexCase, device: str, k: int) -> tuple[Timing, float]:
    ends = case.ends
    scores = torch.randn(case.tokens, case.keys, device=case.packed.device)
    hidden = torch.arange(case.keys, device=scores.device) >= ends.unsqueeze(1)
    scores.masked_fill_(hidden, -torch.inf)
    found = peer.select(scores, ends, k)[:_CHECKED].long()
    expected = dispatch.top_k(scores[:_CHECKED], k, backend="torch")
    least = [scores[:_CHECKED].gather(1, i.clamp(min=0)).amin(1) for i in (found, expected)]
    deviation = float((least[0] != least[1]).float().mean())
    return time_foreign([partial(peer.select, scores, ends, k)], device), deviation


def _spans(case: IndexCase) -> tuple[Tensor, Tensor, int]:
    """(first key, end key int32 `[tokens]`, keys of one request if they are not all's)."""
    ends = case.ends
    if case.first is None:
        return torch.zeros_like(ends), ends, 0
    first = case.first.int()
    return first, first + ends, case.keys


def _deep_gemm_fp4(case: IndexCase) -> Callable[[], Tensor]:
    """Codes and scales as they are: four scale bytes of a vector are one int32."""
    kernel = importlib.import_module("deep_gemm").fp8_fp4_mqa_logits
    tokens, heads = case.q_codes.shape[:2]
    scales = case.q_scale.contiguous().view(torch.int32).view(tokens, heads)
    keys = case.packed[:, :_HALF].contiguous().view(torch.int8)
    key_scales = case.packed[:, _HALF:].contiguous().view(torch.int32).view(-1)
    start, end, longest = _spans(case)
    query = case.q_codes.contiguous().view(torch.int8), scales
    return partial(
        kernel, query, (keys, key_scales), case.weights, start, end,
        clean_logits=False, max_seqlen_k=longest,
    )  # fmt: skip


def _deep_gemm_fp8(case: IndexCase) -> Callable[[], Tensor]:
    """E4M3 with one power of two a vector; a query's goes into its head's weight."""
    kernel = importlib.import_module("deep_gemm").fp8_mqa_logits
    query, query_scale = widened(case.q_codes, case.q_scale)
    keys, key_scale = widened(case.packed[:, :_HALF], case.packed[:, _HALF:])
    start, end, longest = _spans(case)
    return partial(
        kernel, query, (keys, key_scale), case.weights * query_scale, start, end,
        clean_logits=False, max_seqlen_k=longest,
    )  # fmt: skip


def widened(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 `[..., D]`, float32 scale `[...]`) of E2M1 codes with E8M0 scales per 32.

    Raises V4QuantError where the scales of a vector are too far apart for eight bits.
    """
    exponent = e8m0.exponents(scales.contiguous())
    most, least = exponent.amax(-1), exponent.amin(-1)
    if bool((most - least > 11).any()):
        raise V4QuantError("E4M3 cannot hold a vector of these scales")
    reference = most - 6  # the largest product is then 6 * 2^6, and the least 2^-6
    steps = e8m0.power_of_two(exponent - reference.unsqueeze(-1)).unsqueeze(-1)
    groups = e2m1.decode_packed(codes.contiguous()).view(*scales.shape, -1)
    return (groups * steps).flatten(-2).to(torch.float8_e4m3fn), e8m0.power_of_two(reference)


def _torch_top_k(scores: Tensor, ends: Tensor, k: int) -> Tensor:
    return scores.topk(min(k, scores.shape[1]), dim=-1).indices


def _sgl_top_k(scores: Tensor, ends: Tensor, k: int) -> Tensor:
    found: Tensor = importlib.import_module("sgl_kernel").fast_topk_v2(scores, ends, k)
    return found


SCORERS = (
    Scorer("deep_gemm, FP4 as stored", "deep_gemm", _deep_gemm_fp4),
    Scorer("deep_gemm, FP8 widened before", "deep_gemm", _deep_gemm_fp8),
)
SELECTORS = (
    Selector("torch.topk", "", _torch_top_k),
    Selector("sgl_kernel fast_topk_v2", "sgl_kernel", _sgl_top_k),
)
