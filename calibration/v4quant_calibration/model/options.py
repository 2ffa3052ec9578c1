"""ForwardOptions: which of the model's several truths to compute.

The same weights have more than one "correct" output. `plain` computes the weights' meaning in
float32 and shows the damage of a conversion alone. `official` adds the roundings of activations,
KV entries and indexer vectors with which the release was trained and is served. The remaining
switches exist because public engines differ there, or because a slightly different but equally
legitimate computation is the noise floor against which a damage must be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Activations = Literal["plain", "kv", "official"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)


@dataclass(frozen=True)
class ForwardOptions:
    """How to run the forward pass.

    activations: "plain" rounds nothing; "kv" rounds what is cached, as the release does (see
        `numerics.Roundings`): KV entries and indexer vectors; "official" also the inputs of FP8
        and FP4 linears.
    kv_rounding: in the other modes, whether KV entries are rounded (July 2026 code) or left alone
        (the April kernels cast to BF16 and so rounded nothing).
    shared_clamp: clamp the shared expert like the routed ones (all code but April's).
    matmul_dtype: what the operands of products are rounded to that the release runs in FP8, FP4 or
        BF16: float32 or bfloat16. Sums and results are float32 (`dispatch.bf16_product`).
    expert_kernels: multiply the routed experts as they are stored, by the kernels that serve them
        (`packed_experts.py`).
    round_streams: round the residual streams to BF16 after every layer, as served models do.
    query_chunk: queries handled at once by attention; bounds memory, does not change the meaning.
    row_chunk: tokens of a sequence whose streams are in use at once, a multiple of 128; as above.
    expert_tokens: tokens that go through the experts at once (None: all). Fewer take less memory
        and read the experts' weights more often.
    """

    activations: Activations = "plain"
    kv_rounding: bool = True
    shared_clamp: bool = True
    matmul_dtype: torch.dtype = torch.float32
    expert_kernels: bool = False
    round_streams: bool = False
    query_chunk: int = 128
    row_chunk: int = 4096
    expert_tokens: int | None = None

    @property
    def official(self) -> bool:
        """Whether inputs of linears are rounded."""
        return self.activations == "official"

    @property
    def products(self) -> str:
        """What products multiply, by its short name: "f32", "bf16" or "kernels"."""
        if self.expert_kernels:
            return "kernels"
        return "bf16" if self.matmul_dtype == torch.bfloat16 else "f32"

    @property
    def rounds_kv(self) -> bool:
        """Whether KV entries are rounded."""
        return self.activations != "plain" and self.kv_rounding

    @property
    def rounds_index(self) -> bool:
        """Whether the indexer's queries and keys are rounded."""
        return self.activations != "plain"
