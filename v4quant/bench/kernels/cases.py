"""What the kernel benches multiply: random weights and tokens of the releases' own shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4quant.bench.choices import INDEX_CASES, MoeShape
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.experts import ExpertWeights, StackedMatrix
from v4quant_kernels.scheme import Scheme
from v4quant_kernels.twins.indexer import TOKENS_PER_KEY, visible_keys

LIMIT = 10.0
HEADS, CHANNELS = 64, 128


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
"""(x, expert ids, routing weights)."""


def random_inputs(shape: MoeShape, tokens: int, seed: int, device: str) -> Inputs:
    """So many tokens, routed uniformly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    scores = torch.rand(tokens, shape.experts, generator=generator)
    ids = scores.topk(shape.top_k, dim=-1).indices
    routing = torch.rand(tokens, shape.top_k, generator=generator)
    return x.to(device), ids.to(device), routing.to(device)


@dataclass(frozen=True)
class IndexCase:
    """Queries and packed keys, arguments of `dispatch.index_top_k`.

    keys: of one request; `first` is each token's first row among all, None for one request.
    """

    name: str
    context: int
    q_codes: Tensor
    q_scale: Tensor
    packed: Tensor
    weights: Tensor
    positions: Tensor
    first: Tensor | None
    keys: int

    @property
    def tokens(self) -> int:
        """Tokens of all requests."""
        return self.q_codes.shape[0]

    @property
    def ends(self) -> Tensor:
        """int32 `[tokens]`: keys each token sees."""
        return visible_keys(self.positions, self.keys)

    def piece(self, tokens: int) -> IndexCase:
        """The first tokens only."""
        first = None if self.first is None else self.first[:tokens]
        return replace(
            self,
            q_codes=self.q_codes[:tokens],
            q_scale=self.q_scale[:tokens],
            weights=self.weights[:tokens],
            positions=self.positions[:tokens],
            first=first,
        )


def index_case(name: str, context: int, device: str) -> IndexCase:
    """Random codes, all scales 1/2, at the end of the context."""
    requests, each = INDEX_CASES[name]
    tokens, keys = requests * each, context // TOKENS_PER_KEY
    generator = torch.Generator(device).manual_seed(7)

    def bytes_(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=torch.uint8, device=device)
        return empty.random_(0, 256, generator=generator)

    q_codes = bytes_(tokens, HEADS, CHANNELS // 2)
    q_scale = torch.full((tokens, HEADS, CHANNELS // 32), 126, dtype=torch.uint8, device=device)
    packed = bytes_(requests * keys, CHANNELS // 2 + CHANNELS // 32)
    packed[:, CHANNELS // 2 :] = 126
    weights = torch.randn(tokens, HEADS, device=device, generator=generator)
    positions = torch.full((tokens,), context - 1, device=device)
    if each > 1:
        positions = torch.arange(context - each, context, device=device)
    first = torch.arange(requests, device=device) * keys if requests > 1 else None
    return IndexCase(
        name, context, q_codes, q_scale, packed, weights, positions, first, keys
    )  # fmt: skip
