"""solvers: who turns a matrix into codes and scales, behind one signature.

rtn: each group's scale is its largest magnitude over the largest integer, each weight goes to the
nearest point. What everybody else's converter does without data.
optimal: the group's best scale, exactly (`scale_search`): MXFP4 values are few, so every assignment
of values to integers can be listed. Uses the inputs' second moments when they are known. For GGUF's
blocks it is the encoder's search, weighted in the same way. Rows get their gain back (`gain`).
gptq: codes chosen together, by the full second moments of the inputs (`gptq`, then `refine`). It
sees a layer's inputs while they stream past, so it runs inside `calibrate --solve` (`solve.py`) and
leaves a `Solution`; a conversion packs that.

The function below is what GPTQ does to one batch of matrices once their inputs are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from v4quant_calibration.defaults import SOLVER_NAMES
from v4quant_calibration.rounding.coders import coder_of
from v4quant_calibration.rounding.descent import DEFAULT_SWEEPS, rough_errors
from v4quant_calibration.rounding.gain import solved_gain, with_gain
from v4quant_calibration.rounding.measure import measured
from v4quant_kernels import codec
from v4quant_kernels.native.threads import side_by_side
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scale_search import QuantizedMatrix
from v4quant_kernels.scheme import Scheme

Solver = Callable[[QTensor | Tensor, Scheme, Tensor | None], QuantizedMatrix]
"""Codes a matrix, coded or float32 `[N, K]`; where known, by its inputs' second moments [K]."""


def rtn(
    matrix: QTensor | Tensor, scheme: Scheme, importance: Tensor | None = None
) -> QuantizedMatrix:
    """Largest magnitude over largest integer, round to nearest; `importance` is not used.

    GGUF's blocks have no such plain rounding: theirs is the encoder's search without importance.
    """
    del importance
    values = matrix if isinstance(matrix, Tensor) else codec.dequantize(matrix)
    return measured(values, codec.quantize(values, scheme))


def optimal(
    matrix: QTensor | Tensor, scheme: Scheme, importance: Tensor | None = None
) -> QuantizedMatrix:
    """The best scale of every group, weighted by `importance` where it is given, gain restored."""
    return with_gain(matrix, coder_of(scheme).search(matrix, importance), importance)


SOLVERS: dict[str, Solver] = {"rtn": rtn, "optimal": optimal}
"""Solvers that need no more than the matrix and moments; "gptq" is solved beforehand."""

assert (*SOLVERS, "gptq") == SOLVER_NAMES


def solve_batch(
    sources: Sequence[Sequence[QTensor]],
    grams: Tensor,
    corrections: Tensor | None,
    scheme: Scheme,
    sweeps: int = DEFAULT_SWEEPS,
) -> list[list[QTensor]]:
    """GPTQ and refinement of several experts' matrices at once.

    sources: for each expert, the matrices that multiply the same rows (w1 with w3, or w2 alone).
    grams: damped second moments of those rows, float32 `[B, K, K]`. corrections: M of `gram`,
    `[B, K, K]`, added as W + W M to the target; None aims at the source itself. sweeps: the most
    passes of refinement. The work is done, and the result left, where the moments are.

    Where the optimal plain scales leave a row a lower Gram-weighted error than GPTQ does,
    refinement starts from them instead: the result is never worse than uncalibrated codes on the
    moments it was given.
    """
    sources = [[q.to(grams.device) for q in matrices] for matrices in sources]
    target = torch.stack([_columns(matrices) for matrices in sources])
    if corrections is not None:
        target += corrections.mT @ target
    coder = coder_of(scheme)
    codes = coder.gptq(target, grams)
    moments = grams.diagonal(dim1=1, dim2=2).cpu()
    jobs = [
        partial(_optimal_each, matrices, scheme, own)
        for matrices, own in zip(sources, moments, strict=True)
    ]
    fallback = coder.read(side_by_side(jobs), grams.device)
    first, second = (rough_errors(target - coder.values(c), grams) for c in (codes, fallback))
    codes = coder.refine(target, grams, coder.choose(second < first, fallback, codes), sweeps)
    codes = coder.scaled(codes, solved_gain(target, coder.values(codes), grams))
    return [
        coder.write(codes, i, [q.shape[0] for q in matrices]) for i, matrices in enumerate(sources)
    ]


def _optimal_each(matrices: Sequence[QTensor], scheme: Scheme, moments: Tensor) -> list[QTensor]:
    return [coder_of(scheme).search(q, moments).tensor for q in matrices]


def _columns(matrices: Sequence[QTensor]) -> Tensor:
    """Values of stacked matrices, transposed: float32 `[K, sum of N]`."""
    return torch.cat([codec.dequantize(q) for q in matrices]).mT.contiguous()
