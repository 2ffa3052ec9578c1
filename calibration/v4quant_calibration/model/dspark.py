"""DSpark: three draft stages that guess a block of tokens at once.

When the trunk has run position a and token a + 1 is chosen, the stages are given a block: that
token and, for the places behind it, a noise token. Row k of the block, at position a + 1 + k,
guesses the token of position a + 2 + k. All rows of a block see each other, in both directions;
none sees what another guesses. Of the text they see only what the trunk made of it: the mean over
streams behind a few target layers (in V4.1 before them, the Engram's part among it), side by side
through `main_proj` and `main_norm`, is one vector a position, and every stage makes the window's
entries of it with its own `wkv`. A block reads those of positions a - window + 1 .. a, the same for
all its rows, and its own rows' entries made of the stage's input. Beyond that a stage is a window
layer routed by bias; streams begin as copies of the embedding.

The last stage has the collapse (in V4.1 the last sublayer's reading weights) and the norm before
the trunk's head. What a row guesses also depends on the token before it, by a table of low rank
(`markov_head`): w2 . w1[token] is added to the logits. A further row (`confidence_head`), on the
collapsed streams before the norm and w1[token], gives the logit of "this guess will be accepted".

A text is drafted from many places in one pass: blocks are not part of each other's context, so all
of them lie end to end like sequences of their own. The arithmetic is that of the inference code
that came with the 0731 release; DeepSpec, which trains such stages, agrees on positions and on what
a block sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.attention import (
    AttentionLayer,
    attend,
    head_queries,
    load_attention,
    low_rank_queries,
    project,
    window_entries,
)
from v4quant_calibration.model.block import Sublayer, expert_sublayer, load_sublayer
from v4quant_calibration.model.hyper_connection import collapse, load_collapse
from v4quant_calibration.model.numerics import linear, quantized_input, require_finite, rms_norm
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.rope import rope_table, rotate_tail_
from v4quant_calibration.model.streams import Streams, spans
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.errors import V4QuantError

# Position 0 has nothing before it to be drafted from: the release begins one later.
FIRST_ANCHOR = 1


class DraftError(V4QuantError):
    """Text in which nothing can be drafted."""


@dataclass(frozen=True)
class DraftBlocks:
    """Where blocks are drafted, and what they are given.

    size: rows of a block. anchors: by sequence, int64 `[n_i]`, ascending positions of the last
    token the trunk has run. token_ids: int64 `[rows]` of all blocks end to end, as the stages are
    given them. previous: int64 `[rows]`, the text's token before the one a row guesses.
    """

    size: int
    anchors: tuple[Tensor, ...]
    token_ids: Tensor
    previous: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each sequence's blocks."""
        return tuple(self.size * len(anchors) for anchors in self.anchors)


def require_blocks(blocks: DraftBlocks) -> None:
    """Raise DraftError when there is nothing to draft."""
    if not len(blocks.token_ids):
        raise DraftError(
            f"no window has {FIRST_ANCHOR + blocks.size + 2} tokens, which a DSpark draft of "
            f"{blocks.size} needs; give a longer --seq-len or more text"
        )


def draft_blocks(sequences: Sequence[Tensor], config: ModelConfig) -> DraftBlocks:
    """A block behind another through each sequence, as far as the text goes.

    Of every row the text knows the token before the one it guesses, and that one. Short sequences
    have no block.
    """
    assert config.dspark is not None
    size, noise = config.dspark.block_size, config.dspark.noise_token_id
    anchors = tuple(
        torch.arange(FIRST_ANCHOR, max(len(ids) - 1 - size, FIRST_ANCHOR), size)
        for ids in sequences
    )
    previous = [
        ids[(a.unsqueeze(1) + 1 + torch.arange(size)).flatten()]
        for ids, a in zip(sequences, anchors, strict=True)
    ]
    before = torch.cat(previous)
    given = torch.full_like(before, noise)
    given[::size] = before[::size]
    return DraftBlocks(size, anchors, given, before)


def project_trunk(
    params: Params,
    config: ModelConfig,
    stage: str,
    taps: Sequence[Streams],
    out: Streams,
    options: ForwardOptions,
) -> None:
    """What the stages see of the text, rows `[T, 1, hidden]` into `out`.

    stage: the first. taps: at each target layer, the mean over streams, rows `[T, 1, hidden]`.
    """
    weight, norm = params(f"{stage}.main_proj"), params(f"{stage}.main_norm")
    for start, stop in spans(0, out.shape.tokens, options.row_chunk):
        joined = torch.cat([tap.read(start, stop)[:, 0] for tap in taps], -1)
        rows = linear(quantized_input(joined, config, options), weight, options)
        rows = rms_norm(rows, norm, config.rms_norm_eps)
        require_finite(rows, f"{stage}.main_proj")
        out.write(start, rows.unsqueeze(1))


def stage_forward(
    params: Params,
    config: ModelConfig,
    stage: str,
    trunk: Streams,
    streams: Streams,
    blocks: DraftBlocks,
    options: ForwardOptions,
    observer: Observer | None,
) -> None:
    """One stage on the rows of all blocks, in place; trunk: what `project_trunk` made."""
    longest = max(trunk.shape.lengths) + blocks.size
    facts = config.facts(stage)
    weights = load_attention(params, facts, use_indexer=False)
    table = rope_table(config, facts.ratio, longest, trunk.shape.device)
    layer = AttentionLayer(facts, weights, table, config, options, observer)
    sublayer = load_sublayer(params, config, stage, "attn")
    for text, rows, anchors in zip(trunk.spans, streams.spans, blocks.anchors, strict=True):
        if len(anchors):
            context = _context(trunk, text, layer)
            there = anchors.to(context.device)
            _sequence(streams, rows[0], there, blocks.size, context, sublayer, layer)
    ids = blocks.token_ids.to(streams.shape.device)
    expert_sublayer(params, config, stage, streams, ids, options, observer)


def _context(trunk: Streams, text: tuple[int, int], layer: AttentionLayer) -> Tensor:
    """Window entries of a sequence's positions, `[S, D]`."""
    first, last = text
    pieces = []
    for start, stop in spans(first, last, layer.options.row_chunk):
        rows = trunk.read(start, stop)[:, 0]
        pieces.append(window_entries(rows, layer.table[start - first : stop - first], layer))
    return torch.cat(pieces)


def _sequence(
    streams: Streams,
    first: int,
    anchors: Tensor,
    size: int,
    context: Tensor,
    sublayer: Sublayer,
    layer: AttentionLayer,
) -> None:
    """The attention half on one sequence's blocks, whose rows begin at `first`."""
    options = layer.options
    for start, stop in spans(0, len(anchors), max(1, options.row_chunk // size)):
        row = first + start * size
        mixing, x = sublayer.read(streams, row, first + stop * size)
        output = torch.empty_like(x)
        for begin, end in spans(start, stop, max(1, options.query_chunk // size)):
            piece = slice((begin - start) * size, (end - start) * size)
            output[piece] = _attention(x[piece], anchors[begin:end], size, context, layer)
        require_finite(output, f"{layer.facts.name}.attn")
        sublayer.write(streams, row, sublayer.mixed(streams, row, output, mixing), mixing)


def _attention(
    x: Tensor, anchors: Tensor, size: int, context: Tensor, layer: AttentionLayer
) -> Tensor:
    """Attention output of some blocks: x normalised `[blocks * size, hidden]`, same out."""
    inside = torch.arange(size, device=x.device)
    table = layer.table[(anchors.unsqueeze(1) + 1 + inside).flatten()]
    low_rank = low_rank_queries(quantized_input(x, layer.config, layer.options), layer)
    queries = head_queries(low_rank, table, layer)
    window = layer.config.sliding_window
    first, last = max(0, int(anchors[0]) - window + 1), int(anchors[-1]) + 1
    keys = torch.cat([context[first:last], window_entries(x, table, layer)])
    mask = _mask(anchors, size, first, last, window)
    output = attend(queries, keys, mask, None, layer.weights.sink, layer.options)
    return project(rotate_tail_(output, table.conj()), layer)


def _mask(anchors: Tensor, size: int, first: int, last: int, window: int) -> Tensor:
    """Bool `[rows, keys]`: positions first .. last - 1 of the text, then the rows of all blocks."""
    text = torch.arange(first, last, device=anchors.device)
    ends = anchors.unsqueeze(1)
    seen = (text <= ends) & (text > ends - window)
    own = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    whole = torch.cat([seen, own.repeat_interleave(size, 1)], 1)
    return whole.repeat_interleave(size, 0)


def confidence(
    params: Params, config: ModelConfig, stage: str, streams: Streams, markov: Tensor, rows: int
) -> Tensor:
    """Logit `[n]` of each guess being accepted; markov: w1 rows `[n, rank]` of the tokens before.

    stage: the last. rows: how many are collapsed at once.
    """
    weight = params(f"{stage}.confidence_head.proj")
    hyper = load_collapse(params, f"{stage}.", config)
    found = []
    for start, stop in spans(0, streams.shape.tokens, rows):
        x = collapse(streams, start, stop, hyper, config)
        found.append(torch.cat([x, markov[start:stop]], -1) @ weight[0])
    return torch.cat(found)
