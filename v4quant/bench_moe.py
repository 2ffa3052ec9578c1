"""`bench moe`: the routed experts of one layer against the machine's floor and other kernels.

For each number of tokens: the time of the whole mixture (sorting, both GEMMs, combination), how
many experts were active, the bytes that had to be read at least (active weights, activations) and
what share of the floor was reached. The floor is the larger of two times: those bytes at the speed
of the copy, and the products at the matrix rate of the operand type, both measured in the same run.

Routing is uniform, which activates more experts than real text does: the worst case for decode.
Alternatives, on the same inputs: torch with weights dequantized beforehand (grouped matrix
product), the same with the dequantization of the active experts added, and vLLM's fused experts in
BF16 where it is installed. What is not here says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from v4quant.bench_device import Machine, choose_device, measure_machine, time_calls
from v4quant_kernels import dispatch
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.experts import Activations, ExpertWeights, StackedMatrix
from v4quant_kernels.progress import Progress
from v4quant_kernels.ref.codec import dequantize
from v4quant_kernels.runtime import RuntimeExperts
from v4quant_kernels.scheme import Scheme, get_scheme

TOKENS = (1, 8, 32, 128, 4096, 16384)
_LIMIT = 10.0
_SETS = 8


@dataclass(frozen=True)
class MoeShape:
    """Sizes of a release's routed experts."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int


SHAPES = {
    "flash": MoeShape("flash", 4096, 2048, 256, 6),
    "pro": MoeShape("pro", 7168, 3072, 384, 6),
    "tiny": MoeShape("tiny", 256, 128, 8, 2),
}


@dataclass(frozen=True)
class MoeRow:
    """One measurement. Times in seconds; `others` holds seconds, or why there are none."""

    shape: str
    scheme: str
    activations: str
    layout: str
    tokens: int
    active_experts: float
    seconds: float
    spread: float
    bytes: float
    bytes_per_second: float
    flop: float
    flops: float
    floor_seconds: float
    floor_share: float
    others: dict[str, float | str]


@dataclass(frozen=True)
class MoeBench:
    """All rows of one run, and the machine they were measured on."""

    machine: Machine
    rows: tuple[MoeRow, ...]


def bench_moe(
    shapes: Sequence[str],
    schemes: Sequence[str],
    activations: Sequence[Activations],
    tokens: Sequence[int],
    progress: Progress,
    device: str | None = None,
    alternatives: bool = True,
) -> MoeBench:
    """Measure every combination. Raises V4QuantError without a GPU unless `device` is "cpu"."""
    where = choose_device(device)
    machine = measure_machine(where)
    rows = []
    progress.start("Experts", len(shapes) * len(schemes) * len(activations) * len(tokens), "case")
    for shape in (SHAPES[s] for s in shapes):
        for scheme in schemes:
            weights = random_weights(shape, get_scheme(scheme), where)
            for mode in activations:
                prepared = dispatch.prepare(weights, mode)
                for count in tokens:
                    rows.append(
                        _measure(shape, weights, prepared, mode, count, machine, alternatives)
                    )
                    progress.advance(1)
    progress.finish()
    return MoeBench(machine, tuple(rows))


def random_weights(shape: MoeShape, scheme: Scheme, device: str) -> ExpertWeights:
    """Random codes with scales that keep outputs of moderate size; no checkpoint is needed."""
    if scheme.element not in {"e2m1", "e4m3", "int"}:
        raise UnsupportedScheme(f"bench moe: no packed experts of '{scheme.name}'")
    generator = torch.Generator(device).manual_seed(4)

    def matrix(rows: int, columns: int) -> StackedMatrix:
        count = shape.experts
        row_bytes = columns * scheme.bits // 8
        codes = torch.empty(count, rows, row_bytes, dtype=torch.uint8, device=device)
        codes.random_(0, 256, generator=generator)
        if scheme.element == "e4m3":
            codes.bitwise_and_(0xBF)  # below 2: no NaN
        sizes = (count, -(-rows // scheme.block[0]), -(-columns // scheme.block[1]))
        byte = {"e8m0": 121 if scheme.element == "e2m1" else 122, "e4m3": 0x38}.get(scheme.scale)
        if byte is None:
            scale = torch.full(sizes, 2.0**-8, dtype=torch.bfloat16, device=device)
        else:
            scale = torch.full(sizes, byte, dtype=torch.uint8, device=device)
            scale += torch.empty_like(scale).random_(0, 4, generator=generator)
        global_scale = torch.full((count,), 2.0**-6 if scheme.has_global_scale else 1.0)
        return StackedMatrix(scheme, (rows, columns), codes, scale, global_scale.to(device))

    up = (shape.width, shape.hidden)
    return ExpertWeights(matrix(*up), matrix(*up), matrix(shape.hidden, shape.width))


Inputs = tuple[Tensor, Tensor, Tensor]


def random_inputs(shape: MoeShape, tokens: int, seed: int, device: str) -> Inputs:
    """(x, expert ids, routing weights) of so many tokens, routed uniformly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    scores = torch.rand(tokens, shape.experts, generator=generator)
    ids = scores.topk(shape.top_k, dim=-1).indices
    routing = torch.rand(tokens, shape.top_k, generator=generator)
    return x.to(device), ids.to(device), routing.to(device)


def _measure(
    shape: MoeShape,
    weights: ExpertWeights,
    prepared: RuntimeExperts,
    mode: Activations,
    tokens: int,
    machine: Machine,
    alternatives: bool,
) -> MoeRow:
    sets = [
        random_inputs(shape, tokens, s, machine.device)
        for s in range(_SETS if tokens < 1024 else 2)
    ]
    experts = prepared if machine.device == "cuda" else weights
    timing = time_calls([partial(call_moe, s, experts, mode) for s in sets], machine.device)
    active = sum(float(torch.unique(ids).numel()) for _, ids, _ in sets) / len(sets)
    slots = tokens * shape.top_k
    per_expert = (prepared.gate_up.nbytes + prepared.down.nbytes) / shape.experts
    moved = active * per_expert + 2 * 2 * tokens * shape.hidden
    flop = 2.0 * slots * 3 * shape.hidden * shape.width
    eight_bits = prepared.gate_up.operand != "bf16" and machine.fp8_flops
    rate = machine.fp8_flops if eight_bits else machine.bf16_flops
    floor = max(moved / machine.copy_bytes_per_second, flop / rate)
    others: dict[str, float | str] = {}
    if alternatives and machine.device == "cuda":
        others = _alternatives(weights, sets)
    return MoeRow(
        shape.name, prepared.gate_up.scheme.name, mode, prepared.gate_up.tag, tokens, active,
        timing.seconds, timing.spread, moved, moved / timing.seconds, flop, flop / timing.seconds,
        floor, floor / timing.seconds, others,
    )  # fmt: skip


def call_moe(inputs: Inputs, experts: ExpertWeights | RuntimeExperts, mode: Activations) -> Tensor:
    """The whole mixture, as an engine calls it."""
    x, ids, routing = inputs
    return dispatch.moe(x, ids, routing, experts, _LIMIT, activations=mode)


def _alternatives(weights: ExpertWeights, sets: list[Inputs]) -> dict[str, float | str]:
    """Seconds of each alternative, or the reason it was not measured."""
    found: dict[str, float | str] = {}
    try:
        w1, w3, w2 = (_all_dequantized(m) for m in (weights.w1, weights.w3, weights.w2))
    except torch.cuda.OutOfMemoryError:
        return {"torch grouped, weights cached": "n/a: BF16 weights do not fit"}
    gate_up = torch.cat((w1, w3), dim=1)
    del w1, w3
    cached = _try(lambda: time_calls([partial(_grouped, s, gate_up, w2) for s in sets], "cuda"))
    found["torch grouped, weights cached"] = cached
    active = torch.unique(sets[0][1]).tolist()

    def decode() -> None:
        for expert in active:
            for q in weights[expert]:
                dequantize(q).bfloat16()

    extra = _try(lambda: time_calls([decode], "cuda"))
    both = isinstance(cached, float) and isinstance(extra, float)
    found["torch grouped, dequantized each time"] = cached + extra if both else extra  # type: ignore[operator]
    found["vLLM fused experts, BF16"] = _try(lambda: _vllm(sets, gate_up, w2))
    for package in ("triton_kernels", "sglang"):
        found[package] = _try(lambda p=package: _importable(p))  # type: ignore[misc]
    return found


def _try(measure: Callable[[], object]) -> float | str:
    """Seconds, or one line about what went wrong: another package must not stop the bench."""
    try:
        timing = measure()
    except Exception as error:  # noqa: BLE001  # foreign code may fail in any way
        return f"n/a: {type(error).__name__}: {error}".splitlines()[0][:160]
    return float(timing.seconds)  # type: ignore[attr-defined]


def _importable(package: str) -> object:
    __import__(package)
    raise NotImplementedError(f"{package} is installed, but there is no adapter for it")


def _all_dequantized(matrix: StackedMatrix) -> Tensor:
    """bfloat16 `[E, N, K]`."""
    out = torch.empty(matrix.codes.shape[0], *matrix.shape, dtype=torch.bfloat16, device="cuda")
    for expert in range(out.shape[0]):
        out[expert] = dequantize(matrix[expert])
    return out


def _grouped(inputs: Inputs, gate_up: Tensor, down: Tensor) -> Tensor:
    x, ids, routing = inputs
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = counts.cumsum(0).int()
    both = torch._grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends)
    gate, up = both.float().chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate.clamp(max=_LIMIT)) * up.clamp(-_LIMIT, _LIMIT)
    h = (h * routing.flatten()[order].unsqueeze(1)).bfloat16()
    y = torch._grouped_mm(h, down.transpose(1, 2), offs=ends)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return out.index_add_(0, order // ids.shape[1], y.float()).bfloat16()


def _vllm(sets: list[Inputs], gate_up: Tensor, down: Tensor) -> object:
    from vllm.model_executor.layers.fused_moe import fused_experts  # type: ignore[import-not-found]

    def call(inputs: Inputs) -> object:
        x, ids, routing = inputs
        return fused_experts(x, gate_up, down, routing, ids.int())

    return time_calls([partial(call, s) for s in sets], "cuda")
