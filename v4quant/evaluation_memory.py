"""What `evaluate --max-memory` does: how much fits, and what goes to disk or in smaller pieces.

An evaluation needs the interpreter, the weights of one sublayer, the rows it is working on, and the
streams of all tokens under every model. First the streams leave for files; then fewer tokens go
through the experts at once, which reads the experts' weights more than once a layer; then pieces
become smaller, which costs speed. The estimate is made of shapes alone, never of what the process
happens to hold, so that the same command plans the same run again, and a run that was killed can be
continued. It is meant to be too high rather than too low: a test measures it from outside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from v4quant.sizes import SizeError
from v4quant_calibration.corpus import Corpus
from v4quant_calibration.logits import TILE_ROWS
from v4quant_calibration.model.attention import DENSE_FACTOR, indexer_matters
from v4quant_calibration.model.experts import ROWS
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.scoring import TileSize
from v4quant_formats.model_config import CSA_RATIO, HCA_RATIO, ModelConfig

# Interpreter, torch and the other libraries, threads' stacks, allocator slack.
_BASE_BYTES = 400 * 2**20
_SLACK = 1.15
# float32, and what decoding a matrix needs beside its result, as multiples of it.
_F32 = 4
_DECODING = 2.5
# Fewer tokens through the experts at once would read them over and over.
_LEAST_TOKENS = 512
# Pieces from comfortable to small: rows of streams, queries, positions and entries of a logit tile.
_PIECES = (
    (4096, 128, TILE_ROWS, 16384),
    (1024, 128, TILE_ROWS, 8192),
    (256, 64, 128, 4096),
    (128, 16, 64, 2048),
)


@dataclass(frozen=True)
class Work:
    """What is to be run: models in all, how many of them candidates, and the text.

    drafts: models whose draft stages run, one after the other, if the release is a DSpark one.
    scored: whether logits are computed. together: whether all tokens of a layer must go through its
    experts at once. held: bytes that somebody keeps beside the run.
    """

    models: int
    candidates: int
    lengths: tuple[int, ...]
    weights: bool
    drafts: int = 0
    scored: bool = True
    together: bool = False
    held: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)


@dataclass(frozen=True)
class MemoryPlan:
    """How an evaluation keeps within its cap; `nbytes` is the estimated peak."""

    spill: bool
    row_chunk: int
    query_chunk: int
    expert_tokens: int | None
    tile: TileSize
    nbytes: int

    def apply(self, options: ForwardOptions) -> ForwardOptions:
        """Options that work in the plan's pieces."""
        return replace(
            options,
            row_chunk=self.row_chunk,
            query_chunk=self.query_chunk,
            expert_tokens=self.expert_tokens,
        )


def plan_evaluation(
    config: ModelConfig, work: Work, cap: int | None, on_disk: bool = False
) -> MemoryPlan:
    """The fastest way within `cap` bytes (None: no cap). on_disk: streams go to files anyway.

    Raises SizeError when even the smallest pieces do not fit.
    """
    plans = [
        _plan(config, work, cap, spill, pieces)
        for spill in ([True] if on_disk else [False, True])
        for pieces in _PIECES
    ]
    if cap is None:
        return plans[0]
    for plan in plans:
        if plan.nbytes <= cap:
            return plan
    least = min(plan.nbytes for plan in plans)
    raise SizeError(
        f"--max-memory {cap / 1e9:.2f} GB is too little: this run needs {least / 1e9:.2f} GB"
    )


def work_of(
    corpus: Corpus, candidates: int, floors: int, weights: bool, draft: bool = False
) -> Work:
    """The work of an evaluation: a reference's with candidates, or a checkpoint's, and floors."""
    models, lengths = 1 + candidates + floors, tuple(len(w) for w in corpus.windows)
    drafts = 1 + candidates + min(floors, 1)
    return Work(models, candidates, lengths, weights, drafts if draft else 0)


def _plan(
    config: ModelConfig,
    work: Work,
    cap: int | None,
    spill: bool,
    pieces: tuple[int, int, int, int],
) -> MemoryPlan:
    rows, queries, tile_rows, tile_columns = pieces
    tile = TileSize(tile_rows, min(tile_columns, config.vocab_size))
    fixed = _BASE_BYTES + _SLACK * (
        work.held
        + _records(config, work)
        + (0 if spill else _streams(config, work))
        + max(
            _attention(config, work, min(rows, max(work.lengths)), queries),
            _logits(config, work, tile) if work.scored else 0,
            _comparison(config) if work.weights and work.candidates else 0,
        )
    )
    # The experts' turn comes after attention's is over.
    base = _BASE_BYTES + _SLACK * (
        work.held
        + _records(config, work)
        + (0 if spill else _streams(config, work))
        + _experts(config, min(rows, work.tokens))
    )
    each = _SLACK * _token(config)
    tokens = work.tokens
    if cap is not None and not work.together and base + each * tokens > cap:
        fitting = int((cap - base) // each)
        tokens = max(fitting, min(_LEAST_TOKENS, work.tokens)) if spill else tokens
    nbytes = int(max(fixed, base + each * tokens))
    through = None if tokens == work.tokens else tokens
    return MemoryPlan(spill, rows, queries, through, tile, nbytes)


def _row(config: ModelConfig) -> int:
    return _F32 * config.hc_mult * config.hidden_size


def _streams(config: ModelConfig, work: Work) -> int:
    """All models' streams; the reference's twice, and a candidate's beside it.

    A DSpark draft reads a vector a target layer and model, and adds rows of its own: one model's
    after the other's, or with propagation all models' at once.
    """
    rows = work.models + (2 if work.candidates else 0)
    if not work.drafts or config.dspark is None:
        return rows * work.tokens * _row(config)
    live = work.models if work.together else 1
    vectors = work.drafts * len(config.dspark.target_layer_ids) + live
    return work.tokens * ((rows + live) * _row(config) + vectors * _F32 * config.hidden_size)


def _records(config: ModelConfig, work: Work) -> int:
    """What is kept of every token: ids, chosen experts and entries, scores."""
    each = 64 + 150 * work.models
    if work.candidates:
        each += 3 * 8 * config.num_experts_per_tok
        if indexer_matters(CSA_RATIO, max(work.lengths), config):
            each += 2 * 4 * config.index_topk
    if work.drafts and config.dspark is not None:
        each += 100 + _F32 * config.dspark.markov_rank
    return work.tokens * each


def _attention(config: ModelConfig, work: Work, rows: int, queries: int) -> int:
    """One layer's attention with its weights, a sequence's entries and a block of queries."""
    c, longest = config, max(work.lengths)
    heads, grouped = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    matrices = [
        c.q_lora_rank * c.hidden_size,
        heads * c.q_lora_rank,
        heads * c.o_lora_rank,
        c.hidden_size * grouped,
        c.index_n_heads * c.index_head_dim * c.q_lora_rank,
        3 * 2 * (c.head_dim + c.index_head_dim) * c.hidden_size,
    ]
    weights = _F32 * (sum(matrices) + _DECODING * max(matrices))
    # Window, CSA entries and index keys.
    entries = _F32 * longest * (c.head_dim * 1.5 + c.index_head_dim * 0.5)
    work_rows = rows * (4 * _row(c) + _F32 * (6 * c.hidden_size + 12 * c.head_dim))
    dense = min(longest // CSA_RATIO, DENSE_FACTOR * c.index_topk)
    keys = c.sliding_window + queries + max(dense, longest // HCA_RATIO)
    scores = 3 * c.num_attention_heads * keys + 2 * keys
    gathered = 0
    if indexer_matters(CSA_RATIO, longest, c):
        index = longest // CSA_RATIO
        scores += 6 * index + c.index_n_heads * min(4096, index)
        if index > DENSE_FACTOR * c.index_topk:
            gathered = 2 * c.index_topk * (c.head_dim + c.num_attention_heads)
    block = _F32 * queries * (scores + gathered + 6 * heads + 3 * grouped)
    return int(weights + entries + work_rows + block)


def _experts(config: ModelConfig, rows: int) -> int:
    """One expert's weights, its rows, and a piece of the streams."""
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    weights = _F32 * inner * hidden * (3 + _DECODING)
    products = _F32 * min(ROWS, 4 * rows) * (4 * inner + 3 * hidden)
    return int(weights + products + rows * 4 * _row(config))


def _token(config: ModelConfig) -> int:
    """A token on its way through the experts: input, its rounded copy, output, mixing, routing."""
    mixing = 3 * config.hc_mult * (config.hc_mult + 2)
    routing = 5 * config.n_routed_experts + 8 * config.num_experts_per_tok
    return _F32 * (4 * config.hidden_size + mixing + routing)


def _logits(config: ModelConfig, work: Work, tile: TileSize) -> int:
    """A tile of every model's logits, what scoring makes of it, and a piece of the head."""
    columns = tile.columns or config.vocab_size
    pieces = work.models if columns >= config.vocab_size else 1
    rank = config.dspark.markov_rank if work.drafts and config.dspark else 0
    head = _F32 * columns * (config.hidden_size + rank) * (pieces + 1)
    tiles = _F32 * tile.rows * columns * (work.models + 6)
    return head + tiles + 3 * tile.rows * _row(config)


def _comparison(config: ModelConfig) -> int:
    """Two dense matrices and the decoding of one."""
    heads = config.num_attention_heads * config.head_dim
    largest = max(
        heads * config.q_lora_rank,
        config.hidden_size * config.o_groups * config.o_lora_rank,
        config.moe_intermediate_size * config.hidden_size,
    )
    return int(_F32 * largest * (2 + 2 * _DECODING))
