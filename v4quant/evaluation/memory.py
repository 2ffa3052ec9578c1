"""What `evaluate --max-memory` does: how much fits, and what goes to disk or in smaller pieces.

An evaluation needs the interpreter, the weights of one sublayer, the rows it is working on, and the
streams of all tokens under every model. First the streams leave for files; then fewer tokens go
through the experts at once, which reads the experts' weights more than once a layer; then pieces
become smaller, which costs speed. The estimate is made of shapes alone, never of what the process
happens to hold, so that the same command plans the same run again, and a run that was killed can be
continued. It is meant to be too high rather than too low: a test measures it from outside.

With the arithmetic on a GPU, weights of a sublayer and the pieces in work are there, the streams
stay with the host, and a cap holds for either memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from v4quant.memory import Limits
from v4quant.sizes import SizeError
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.scoring import TileSize
from v4quant_calibration.forward.logits import TILE_ROWS
from v4quant_calibration.model.attention import DENSE_FACTOR, indexer_matters
from v4quant_calibration.model.experts import ROWS
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.packed_experts import GROUP
from v4quant_formats.model_config import ModelConfig

# Interpreter, torch and the other libraries, threads' stacks, allocator slack.
_BASE_BYTES = 400 * 2**20
_SLACK = 1.15
# What CUDA and its libraries take of a GPU before the first tensor.
_CONTEXT_BYTES = 700 * 2**20
# float32, and what decoding a matrix needs beside its result, as multiples of it.
_F32 = 4
_DECODING = 2.5
# Bytes a weight of a group of coded experts takes: read, stacked and arranged, BF16 at the worst.
_ARRANGING = 6
# Rows of logits that are encoded at once for a file, with what that needs, as float32 rows.
_ENCODED = 16 * 8
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
    experts at once. held: bytes that somebody keeps beside the run, with the host. working: bytes
    that somebody needs during it where the arithmetic is. kernels: whether routed experts are
    multiplied as they are stored. whole_rows: a tile's rows of logits are gathered over the
    vocabulary before they are written.
    """

    models: int
    candidates: int
    lengths: tuple[int, ...]
    weights: bool
    drafts: int = 0
    scored: bool = True
    together: bool = False
    held: int = 0
    working: int = 0
    kernels: bool = False
    whole_rows: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)


@dataclass(frozen=True)
class MemoryPlan:
    """How an evaluation keeps within its limits: `nbytes` and `device_bytes` are the estimated
    peaks."""

    spill: bool
    row_chunk: int
    query_chunk: int
    expert_tokens: int | None
    tile: TileSize
    nbytes: int
    device_bytes: int = 0

    def apply(self, options: ForwardOptions) -> ForwardOptions:
        """Options that work in the plan's pieces."""
        return replace(
            options,
            row_chunk=self.row_chunk,
            query_chunk=self.query_chunk,
            expert_tokens=self.expert_tokens,
        )


def plan_evaluation(
    config: ModelConfig, work: Work, limits: Limits, on_disk: bool = False
) -> MemoryPlan:
    """The fastest way within the limits. on_disk: streams go to files anyway.

    Raises SizeError when even the smallest pieces do not fit.
    """
    plans = [
        _plan(config, work, limits, spill, pieces)
        for spill in ([True] if on_disk else [False, True])
        for pieces in _PIECES
    ]
    for plan in plans:
        host = limits.host is None or plan.nbytes <= limits.host
        if host and (limits.device is None or plan.device_bytes <= limits.device):
            return plan
    least = min(plan.device_bytes for plan in plans)
    if limits.device is not None and least > limits.device:
        raise SizeError(
            f"{limits.device / 1e9:.2f} GB of the GPU's memory are too little: this run needs "
            f"{least / 1e9:.2f} GB there"
        )
    least, cap = min(plan.nbytes for plan in plans), limits.host or 0
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
    limits: Limits,
    spill: bool,
    pieces: tuple[int, int, int, int],
) -> MemoryPlan:
    rows, queries, tile_rows, tile_columns = pieces
    tile = TileSize(tile_rows, min(tile_columns, config.vocab_size))
    comparison = _comparison(config) if work.weights and work.candidates else 0
    records = _records(config, work)
    kept = work.held + records + (0 if spill else _streams(config, work))
    fixed = max(
        _attention(config, work, min(rows, max(work.lengths)), queries),
        _engram(config, min(rows, work.tokens)),
        _logits(config, work, tile) if work.scored else 0,
    )
    if limits.device is None:
        cap, base = limits.host, _BASE_BYTES + _SLACK * (kept + work.working)
        fixed = max(fixed, comparison)
    else:
        cap, base = limits.device, _CONTEXT_BYTES + _SLACK * (records + work.working)
    # The experts' turn comes after attention's is over.
    through = base + _SLACK * _experts(config, min(rows, work.tokens), work.kernels)
    each, tokens = _SLACK * _token(config), work.tokens
    if cap is not None and not work.together and through + each * tokens > cap:
        fitting = int((cap - through) // each)
        may = spill or limits.device is not None
        tokens = max(fitting, min(_LEAST_TOKENS, work.tokens)) if may else tokens
    nbytes = int(max(base + _SLACK * fixed, through + each * tokens))
    at_once = None if tokens == work.tokens else tokens
    if limits.device is None:
        return MemoryPlan(spill, rows, queries, at_once, tile, nbytes)
    beside = max(comparison, _widest(config)) + 2 * rows * _row(config)
    host = int(_BASE_BYTES + _SLACK * (kept + beside))
    return MemoryPlan(spill, rows, queries, at_once, tile, host, nbytes)


def _row(config: ModelConfig) -> int:
    return _F32 * config.hc_mult * (config.hidden_size + config.delayed_mixing)


def _streams(config: ModelConfig, work: Work) -> int:
    """All models' streams; the reference's twice, and a candidate's beside it.

    A DSpark draft reads a vector a target layer and model, and adds rows of its own: one model's
    after the other's, or with propagation all models' at once.
    """
    rows = work.models + (2 if work.candidates else 0)
    caches = work.models * _shared_caches(config, work)
    if not work.drafts or config.dspark is None:
        return rows * work.tokens * _row(config) + caches
    live = work.models if work.together else 1
    vectors = work.drafts * len(config.dspark.target_layer_ids) + live
    streams = (rows + live) * _row(config) + vectors * _F32 * config.hidden_size
    return work.tokens * streams + caches


def _shared_caches(config: ModelConfig, work: Work) -> int:
    """What one model's layers leave for later ones: entries and keys of every ratio, a choice, and
    candidate blocks where there are more than are kept."""
    lent = {f.ratio: f for f in config.layers if f.lends_entries}
    if not lent or config.v41 is None:
        return 0
    each = sum(_F32 * (config.head_dim + config.index_head_dim) / ratio for ratio in lent)
    longest = max(work.lengths)
    if any(indexer_matters(f, longest, config) for f in lent.values()):
        each += 4 * config.index_topk
    blocks = longest // min(lent) // config.v41.candidate_block_size
    if blocks > config.v41.candidate_topk_blocks:
        each += 4 * config.v41.candidate_topk_blocks
    return int(work.tokens * each)


def _engram(config: ModelConfig, rows: int) -> int:
    """A piece of text's rows of an n-gram table, what one block of the matrix makes of them, and
    that block; the hashes of all tokens are among `_records`."""
    if config.v41 is None or not config.v41.engram_layer_ids:
        return 0
    width = config.v41.engram_columns * config.v41.engram_head_dim
    block = _F32 * config.hidden_size * width * (1 + _DECODING)
    gathered = rows * (3 * _F32 * width + 16 * config.v41.engram_columns)
    return int(block + gathered + rows * (3 * _row(config) + 4 * _F32 * config.hidden_size))


def _records(config: ModelConfig, work: Work) -> int:
    """What is kept of every token: ids, chosen experts and entries, scores."""
    each = 64 + 150 * work.models
    if config.v41 is not None:
        each += 3 * 8 * config.v41.engram_columns  # hashes, and what they are put together from
    if work.candidates:
        each += 3 * 8 * config.num_experts_per_tok
        longest = max(work.lengths)
        if any(indexer_matters(f, longest, config) for f in config.layers if f.makes_choice):
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
    # Window, entries with their latents, and index keys.
    ratio = min((f.ratio for f in c.layers if f.ratio), default=longest)
    entries = _F32 * longest * (c.head_dim * (1 + 2 / ratio) + c.index_head_dim * 2 / ratio)
    work_rows = rows * (4 * _row(c) + _F32 * (6 * c.hidden_size + 12 * c.head_dim))
    chosen = [f for f in c.layers if f.index_source is not None]
    dense = min(longest // ratio, DENSE_FACTOR * c.index_topk) if chosen else 0
    whole = [longest // f.ratio for f in c.layers if f.ratio and f.index_source is None]
    keys = c.sliding_window + queries + max(dense, *whole, 0)
    scores = 3 * c.num_attention_heads * keys + 2 * keys
    gathered = 0
    if any(indexer_matters(f, longest, c) for f in chosen):
        index = longest // ratio
        scores += 6 * index + c.index_n_heads * min(4096, index)
        if index > DENSE_FACTOR * c.index_topk:
            gathered = 2 * c.index_topk * (c.head_dim + c.num_attention_heads)
    block = _F32 * queries * (scores + gathered + 6 * heads + 3 * grouped)
    return int(weights + entries + work_rows + block)


def _experts(config: ModelConfig, rows: int, kernels: bool) -> int:
    """One expert's weights, its rows, and a piece of the streams; or a group's, coded."""
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    weights = _F32 * inner * hidden * (3 + _DECODING)
    if kernels:
        weights += _ARRANGING * GROUP * 3 * inner * hidden
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
    gathered = _F32 * config.vocab_size * (tile.rows + _ENCODED) if work.whole_rows else 0
    return head + tiles + gathered + 3 * tile.rows * _row(config)


def _comparison(config: ModelConfig) -> int:
    """Two dense matrices and the decoding of one."""
    return int(_widest(config) * (2 + 2 * _DECODING))


def _widest(config: ModelConfig) -> int:
    """The largest matrix but the vocabulary's, in float32."""
    heads = config.num_attention_heads * config.head_dim
    return _F32 * max(
        heads * config.q_lora_rank,
        config.hidden_size * config.o_groups * config.o_lora_rank,
        config.moe_intermediate_size * config.hidden_size,
    )
