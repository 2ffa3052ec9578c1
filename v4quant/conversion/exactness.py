"""Which stages' experts a cast would change: decided from the scales, confirmed from the codes.

An engine takes one scheme for all experts of a layer, so a single matrix that does not fit makes
its whole stage stay in the source format. Scales are a seventeenth of the bytes; codes are read
only where the scales alone leave doubt (a far group may be all zeros).
"""

from __future__ import annotations

from collections.abc import Iterable

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PROJECTIONS, expert_module
from v4quant_formats.weight_reading import read_weight
from v4quant_formats.weights import find_weight, scale_part
from v4quant_kernels.cast import cast_mxfp4, top_exponent
from v4quant_kernels.ref import e8m0
from v4quant_kernels.scheme import MXFP4, Scheme


def inexact_stages(
    checkpoint: Checkpoint, scheme: Scheme, experts: Iterable[tuple[str, int]]
) -> tuple[str, ...]:
    """Stages among `experts` ((stage, expert) pairs) that a scheme cannot hold exactly, in order.

    Raises what reading the checkpoint raises. A stage whose experts are not MXFP4 counts as
    inexact.
    """
    assert scheme.mxfp4_octaves is not None, scheme
    found: dict[str, bool] = {}
    for stage, expert in experts:
        if not found.get(stage):
            found[stage] = not _fits(checkpoint, scheme, stage, expert)
    return tuple(stage for stage, inexact in found.items() if inexact)


def _fits(checkpoint: Checkpoint, scheme: Scheme, stage: str, expert: int) -> bool:
    assert scheme.mxfp4_octaves is not None, scheme
    gate, up, down = (find_weight(checkpoint, expert_module(stage, expert, p)) for p in PROJECTIONS)
    for fused in ((gate, up), (down,)):
        if any(stored.scheme != MXFP4 for stored in fused):
            return False
        exponents = [
            e8m0.exponents(checkpoint.read(part.name))
            for stored in fused
            if (part := scale_part(stored))
        ]
        low, high = min(int(e.min()) for e in exponents), max(int(e.max()) for e in exponents)
        if high - low <= scheme.mxfp4_octaves:
            continue
        matrices = [read_weight(checkpoint, stored) for stored in fused]
        top = max(top_exponent(q) for q in matrices)
        if any(cast_mxfp4(q, scheme, top).altered for q in matrices):
            return False
    return True
