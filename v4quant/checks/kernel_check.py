"""verify --kernels: run the Triton kernels on tensors of the checkpoint that was produced.

Slices of a few experts from the first, a middle and the last stage are taken as stored, cropped to
what an interpreter can chew, and multiplied by the Triton kernel, its torch twin and float64.
"""

from __future__ import annotations

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PROJECTIONS, expert_module, parse_name
from v4quant_formats.weight_reading import read_weight
from v4quant_formats.weights import find_weight
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.experts import ExpertWeights, stack_experts
from v4quant_kernels.progress import Progress
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.selfcheck import KernelCheck, crop, run_isolated

_EXPERTS = 3
_WIDTH = 256  # a multiple of every scheme's block


def check_kernels(checkpoint: Checkpoint, progress: Progress) -> list[KernelCheck]:
    """Check kernels on sampled experts of a checkpoint; one entry per kernel and stage.

    Raises BackendUnavailable without Triton, and what reading the checkpoint raises.
    """
    stages = _stages(checkpoint)
    progress.start("Kernels", len(stages), "stage")
    checks = []
    for seed, stage in enumerate(stages):
        checks += run_isolated(_sample(checkpoint, stage), seed)
        progress.advance(1)
    progress.finish()
    return checks


def _stages(checkpoint: Checkpoint) -> list[str]:
    found = {
        n.stage for spec in checkpoint if (n := parse_name(spec.name)) and n.expert is not None
    }
    order = sorted(found, key=lambda s: (s.startswith("mtp."), int(s.rpartition(".")[2])))
    return sorted({order[0], order[len(order) // 2], order[-1]})


def _sample(checkpoint: Checkpoint, stage: str) -> ExpertWeights:
    """The first experts of a stage, cropped."""
    experts = []
    for expert in range(_EXPERTS):
        if f"{expert_module(stage, expert, 'w1')}.weight" not in checkpoint and (
            f"{expert_module(stage, expert, 'w1')}.weight_packed" not in checkpoint
        ):
            break
        gate, up, down = (_crop(checkpoint, expert_module(stage, expert, p)) for p in PROJECTIONS)
        experts.append((gate, up, down))
    return stack_experts(experts)


def _crop(checkpoint: Checkpoint, module: str) -> QTensor:
    stored = find_weight(checkpoint, module)
    if stored.scheme is None:
        raise UnsupportedScheme(f"'{module}' is not quantized: there is no kernel to check")
    q = read_weight(checkpoint, stored)
    rows, columns = (min(size, _WIDTH) for size in q.shape)
    return crop(q, rows, columns) if (rows, columns) != q.shape else q
