"""Noise floor: how far two legitimate computations of the same weights are apart.

No two engines round alike, and in a mixture of experts a last bit may choose another expert. So
the reference runs again with one rounding that served models have and this forward pass has not.
The variants differ in kind, because no single one bounds all engines: one rounds what is carried
from layer to layer, the other what every product but the router's and the head's reads, and so
reaches into attention, experts and the indexer's scores (where the run itself rounds products, it
is the variant that does not). Either may come out larger. The floor is the larger of those that
ran.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from v4quant_calibration.defaults import MOST_FLOORS
from v4quant_calibration.model.options import ForwardOptions

STREAMS = "the reference again, residual streams rounded to BF16 after every layer"
PRODUCTS = "the reference again, operands of matrix products rounded to BF16"
EXACT = "the reference again, operands of matrix products in float32"


def floor_options(options: ForwardOptions, count: int) -> list[tuple[str, ForwardOptions]]:
    """Descriptions and options of the first `count` variants, 1 <= count <= MOST_FLOORS."""
    assert 1 <= count <= MOST_FLOORS
    coarse = options.matmul_dtype == torch.bfloat16
    other = torch.float32 if coarse else torch.bfloat16
    exact = replace(options, matmul_dtype=other, expert_kernels=False)
    variants = [
        (STREAMS, replace(options, round_streams=True)),
        (EXACT if coarse else PRODUCTS, exact),
    ]
    return variants[:count]
