"""Observer: what calibration and evaluation may watch while a layer runs.

The hooks sit where a conversion leaves marks: the rows each expert matrix multiplies (second
moments for scale search and GPTQ), the experts the router chose and the blocks the indexer chose
(two discontinuities that turn a small error into a different computation). A hook sees tensors of
the running computation and must not change them. Hooks for one layer may be called several times;
rows arrive in a fixed order, so records of two models over the same tokens can be laid side by
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from v4quant_calibration.model.caches import SharedCaches
from v4quant_calibration.model.streams import Streams


class Observer(Protocol):
    """Receives intermediate tensors of one model; `layer` is "layers.3" or "mtp.0"."""

    def on_layer(self, layer: str, before: Streams, caches: SharedCaches | None) -> None:
        """A layer's attention is about to run on the rows of `before`, and on what earlier layers
        left in `caches`; none of its weights, an Engram's apart, was asked for yet.

        Not called for DSpark's stages.
        """

    def on_linear(self, module: str, x: Tensor) -> None:
        """Rows that a dense matrix multiplies, `[n, K]` (wo_a: `[groups, n, K]`), piece by piece.

        Called once for matrices that share their rows (`sharing.SHARING`): attention's wkv, wq_b,
        wo_a and wo_b, and the shared expert's w1 and w2.
        """

    def on_route(self, layer: str, expert_ids: Tensor, weights: Tensor) -> None:
        """Chosen experts, int64 `[T, top_k]`, and their float32 weights `[T, top_k]`.

        T counts the tokens of all sequences, in order; one call a layer, or one for each
        `ForwardOptions.expert_tokens` of them.
        """

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """All rows the routed experts are about to read: x `[T, hidden_size]`, with the routing.

        Called once a layer, before any expert's weights, the shared one's too, are asked for: a
        solver may decide here
        what the provider will answer.
        """

    def on_expert_input(self, layer: str, expert: int, x: Tensor) -> None:
        """Rows `[n, hidden_size]` that w1 and w3 of a routed expert multiply."""

    def on_expert_hidden(self, layer: str, expert: int, h: Tensor) -> None:
        """Rows `[n, moe_intermediate_size]` that w2 multiplies (routing weight included)."""

    def on_expert_output(self, layer: str, expert: int, tokens: Tensor, y: Tensor) -> None:
        """Rows y `[n, hidden_size]` an expert adds to `tokens`, int64 `[n]`, ascending.

        Tokens are counted over all sequences, in order, from the first of the last `on_route`;
        the routing weight is included.
        """

    def on_index(self, layer: str, picks: Tensor) -> None:
        """Compressed entries an indexer chose for consecutive queries, int64 `[q, top_k]`.

        Not called for layers that read another's choice. Ascending; -1 fills the places of a query
        that sees fewer entries. Called sequence by sequence, block of queries by block, and only
        for blocks in which some query has more entries to choose from than index_topk (before that
        the choice is "all of them").
        """


class SilentObserver:
    """An observer that ignores everything: inherit from it and override what you want to see."""

    def on_layer(self, layer: str, before: Streams, caches: SharedCaches | None) -> None:
        """Ignore the layer."""

    def on_linear(self, module: str, x: Tensor) -> None:
        """Ignore the rows."""

    def on_route(self, layer: str, expert_ids: Tensor, weights: Tensor) -> None:
        """Ignore the routing."""

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Ignore the experts' rows."""

    def on_expert_input(self, layer: str, expert: int, x: Tensor) -> None:
        """Ignore an expert's input."""

    def on_expert_hidden(self, layer: str, expert: int, h: Tensor) -> None:
        """Ignore an expert's hidden rows."""

    def on_expert_output(self, layer: str, expert: int, tokens: Tensor, y: Tensor) -> None:
        """Ignore an expert's output."""

    def on_index(self, layer: str, picks: Tensor) -> None:
        """Ignore the indexer's choice."""


class Observers:
    """Several observers of one model, told in their order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Each is told everything."""
        self._each = tuple(observers)

    def on_layer(self, layer: str, before: Streams, caches: SharedCaches | None) -> None:
        """Pass it on."""
        for one in self._each:
            one.on_layer(layer, before, caches)

    def on_linear(self, module: str, x: Tensor) -> None:
        """Pass it on."""
        for one in self._each:
            one.on_linear(module, x)

    def on_route(self, layer: str, expert_ids: Tensor, weights: Tensor) -> None:
        """Pass it on."""
        for one in self._each:
            one.on_route(layer, expert_ids, weights)

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Pass it on."""
        for one in self._each:
            one.on_experts(layer, x, expert_ids, weights)

    def on_expert_input(self, layer: str, expert: int, x: Tensor) -> None:
        """Pass it on."""
        for one in self._each:
            one.on_expert_input(layer, expert, x)

    def on_expert_hidden(self, layer: str, expert: int, h: Tensor) -> None:
        """Pass it on."""
        for one in self._each:
            one.on_expert_hidden(layer, expert, h)

    def on_expert_output(self, layer: str, expert: int, tokens: Tensor, y: Tensor) -> None:
        """Pass it on."""
        for one in self._each:
            one.on_expert_output(layer, expert, tokens, y)

    def on_index(self, layer: str, picks: Tensor) -> None:
        """Pass it on."""
        for one in self._each:
            one.on_index(layer, picks)
