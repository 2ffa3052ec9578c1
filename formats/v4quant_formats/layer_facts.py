"""LayerFacts: what kind of layer a stage is, decided once for every release.

A layer reads a window of recent tokens and, where its ratio is not 0, compressed entries that stand
for `ratio` tokens each. In V4 every such layer makes its own entries, and CSA layers choose among
theirs. In V4.1 few layers do: the others read the entries, and mostly the choice, of an earlier
one. The forward pass, the memory planners and the table of names read these facts; none of them
looks at ratios or lists of layers itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CSA_RATIO = 4
HCA_RATIO = 128
_V4_KINDS = {0: "swa", CSA_RATIO: "csa", HCA_RATIO: "hca"}


@dataclass(frozen=True)
class LayerFacts:
    """One stage.

    name: "layers.3" or "mtp.0"; number: 3 or 0. kind: swa (window only), csa, hca; csa2/1 and
    csa2/2 in V4.1. ratio: tokens an entry stands for, 0 for a window layer; it also decides the
    rope parameters. hashed: whether experts come from a table of token ids.
    kv_source, index_source: numbers of the layers whose entries (with their index keys) and whose
    choice of entries this one reads, its own number where it makes them; None where it reads none,
    or all visible entries. candidate_source: of a layer that makes a choice, the layer whose best
    blocks bound it; its own number where it determines them.
    lends_entries, lends_choice: whether later layers read what this one makes.
    engram: which of the n-gram tables is read before the layer, None for none.
    experts, experts_per_token: routed experts, and how many of them a token visits.
    """

    name: str
    number: int
    kind: str
    ratio: int
    hashed: bool
    kv_source: int | None
    index_source: int | None
    candidate_source: int | None
    lends_entries: bool
    lends_choice: bool
    engram: int | None
    draft: bool
    experts: int
    experts_per_token: int

    @property
    def makes_entries(self) -> bool:
        """Whether the layer has a compressor."""
        return self.kv_source == self.number

    @property
    def makes_choice(self) -> bool:
        """Whether the layer has an indexer."""
        return self.index_source == self.number

    @property
    def gates_entries(self) -> bool:
        """Whether its compressor weighs the tokens of a block: not where a block is one token."""
        return self.makes_entries and self.ratio > 1

    @property
    def places_entries(self) -> bool:
        """Whether its compressor's gates have a positional term (V4)."""
        return self.makes_entries and self.kind in _V4_KINDS.values()

    @property
    def has_key_compressor(self) -> bool:
        """Whether index keys come from a compressor of their own (V4), not from latents."""
        return self.makes_choice and self.kind in _V4_KINDS.values()

    @property
    def overlaps(self) -> bool:
        """Whether an entry also pools the block before its own (CSA)."""
        return self.ratio == CSA_RATIO

    @property
    def roles(self) -> tuple[str, ...]:
        """What the layer does for others, or takes from them, in words; empty for V4's layers."""
        found = []
        if self.engram is not None:
            found.append("Engram")
        if self.kind.startswith("csa2"):
            if self.makes_entries:
                found.append("source")
            else:
                found.append("reindex" if self.makes_choice else "reuse")
            if self.candidate_source == self.number:
                found.append("candidate source")
        return tuple(found)


def v4_layers(
    ratios: Sequence[int], hash_layers: int, experts: int, experts_per_token: int
) -> tuple[LayerFacts, ...]:
    """Facts of V4's trunk layers, one for each of `ratios` (0, 4 or 128).

    The first `hash_layers` route by token id.
    """
    return tuple(
        LayerFacts(
            name=f"layers.{number}",
            number=number,
            kind=_V4_KINDS[ratio],
            ratio=ratio,
            hashed=number < hash_layers,
            kv_source=number if ratio else None,
            index_source=number if ratio == CSA_RATIO else None,
            candidate_source=None,
            lends_entries=False,
            lends_choice=False,
            engram=None,
            draft=False,
            experts=experts,
            experts_per_token=experts_per_token,
        )
        for number, ratio in enumerate(ratios)
    )


def v41_layers(
    ratios: Sequence[int],
    kv_sources: Sequence[int],
    index_sources: Sequence[int],
    candidate_source: int | None,
    engram_layers: Sequence[int],
    experts: int,
    experts_per_token: int,
) -> tuple[LayerFacts, ...]:
    """Facts of V4.1's trunk layers, one for each of `ratios` (0, 1 or 2).

    A layer whose ratio is not 0 reads the last KV source and the last index source up to it; a
    source that is missing is None here, and refused where the config is checked.
    """
    kv, index = _last(kv_sources, ratios), _last(index_sources, ratios)
    lenders = [{s for n, s in enumerate(found) if s != n} for found in (kv, index)]
    tables = {layer: number for number, layer in enumerate(engram_layers)}
    return tuple(
        LayerFacts(
            name=f"layers.{number}",
            number=number,
            kind=f"csa2/{ratio}" if ratio else "swa",
            ratio=ratio,
            hashed=False,
            kv_source=kv[number],
            index_source=index[number],
            candidate_source=_bound(number, index[number], candidate_source),
            lends_entries=number in lenders[0],
            lends_choice=number in lenders[1],
            engram=tables.get(number),
            draft=False,
            experts=experts,
            experts_per_token=experts_per_token,
        )
        for number, ratio in enumerate(ratios)
    )


def draft_facts(number: int, experts: int, experts_per_token: int) -> LayerFacts:
    """A draft stage, of whatever design: a window layer routed by bias."""
    return LayerFacts(
        name=f"mtp.{number}",
        number=number,
        kind="swa",
        ratio=0,
        hashed=False,
        kv_source=None,
        index_source=None,
        candidate_source=None,
        lends_entries=False,
        lends_choice=False,
        engram=None,
        draft=True,
        experts=experts,
        experts_per_token=experts_per_token,
    )


def _last(sources: Sequence[int], ratios: Sequence[int]) -> list[int | None]:
    """Of every layer with a ratio, the last source up to it."""
    chosen, found, last = set(sources), [], None
    for number, ratio in enumerate(ratios):
        last = number if number in chosen else last
        found.append(last if ratio else None)
    return found


def _bound(number: int, index_source: int | None, candidate_source: int | None) -> int | None:
    """The candidate source of a layer that makes a choice at or behind it."""
    if candidate_source is None or index_source != number or number < candidate_source:
        return None
    return candidate_source
