"""What vLLM 0.33 keeps on each GPU beside DeepSeek-V4's weights.

**KV cache.** Memory is a pool of equal blocks, and a sequence owns whole blocks in several groups
of caches at once. Per layer there are: a window of 64-token pages; with compression, pages of 256
tokens, one entry every 4 (CSA, with the indexer's keys) or 128 (HCA); and what the compressor has
not yet summed up, in float32, in pages of 4 or 8 tokens. A group's pages lie side by side in a
block, so the widest group sets the size of all blocks. Windows and sums are needed for a few tokens
only, but vLLM reserves them for all tokens in flight, two batches of `--max-num-batched-tokens`:
with large batches that, not the context, is most of the cache. All of it is on each GPU, because
one latent serves all heads. The rules of grouping are those of
`v1/core/kv_cache_planning.py`; `scripts/check_vllm_memory.py` compares with vLLM's own planner.

V4.1's layers that own a cache have an entry and an index key every token or two in pages of 64
tokens (sm90) or 128 (sm100), all layers windows in pages of 32, and where two tokens make an entry
a ring of 8 rows in float32, one block a sequence. On sm90 an entry takes 584 bytes and a key 132,
which with padding is 1,827 bytes per token of context; on sm100 528 and 132, which is 1,658. Blocks
are larger there, so that short contexts take more. The larger of the two is counted, since a plan
knows cards by their memory. `--kv-cache-dtype nvfp4_ds_mla` (sm100) takes 288 bytes an entry.

**Buffers.** Rotary tables over the model's whole range, the indexer's choices, and the peak of one
batch: hyper-connection streams, attention with heads padded to 64, or experts' intermediate rows,
whichever is more; logits of sampling. Counted from the shapes vLLM's code allocates. The
allocator's losses, CUDA's context, communication and graphs are estimates from logs that people
have published; their names say so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from v4quant_formats.model_config import CSA_RATIO, HCA_RATIO, ModelConfig

UTILIZATION = 0.92
"""vLLM's default for --gpu-memory-utilization."""

_BLOCK = 256  # tokens of a block of compressed entries
_WINDOW_PAGE, _CSA_PAGE, _HCA_PAGE = 64, 4, 8  # tokens of a page
_V41_WINDOW_PAGE = 32
_V41_RING = 8  # rows, more where more is drafted at once
_PAGE_BYTES = 576  # pages are multiples of this
_SCALED = 64  # channels sharing a scale in an entry
_INDEX_SCALE = 4
_BATCHES = 2  # scheduled while the one before is still settling
_LEAST_HEADS = 64
_PREFILL_CHUNK = 4
_LOGITS_BYTES = 512 * 2**20
_SAMPLER_COPIES = 5  # float32: logits, sorted values, int64 indices, probabilities

# Public logs of V4-Flash tell 0.70 GiB of graphs for up to 8 sequences, and 2.5 for up to 256.
_CONTEXT_ESTIMATE = 800 * 10**6
_GRAPHS_ESTIMATE, _GRAPHS_PER_SEQUENCE = 700 * 10**6, 7 * 10**6
_MOST_GRAPHED = 256
_ALLOCATOR_LOSS = 0.15


@dataclass(frozen=True)
class Serving:
    """How vLLM is started, by its options' names.

    gpus: --tensor-parallel-size; context: --max-model-len; sequences: --max-num-seqs, all of full
    length, one of them being read; batched_tokens: --max-num-batched-tokens.
    """

    gpus: int
    context: int
    batched_tokens: int
    sequences: int = 1
    utilization: float = UTILIZATION
    expert_parallel: bool = False


def default_batch(gpu_bytes: int) -> int:
    """What vLLM's server takes for --max-num-batched-tokens on a GPU of this size."""
    if gpu_bytes >= 160 * 2**30:
        return 16384
    return 8192 if gpu_bytes >= 70 * 2**30 else 2048


@dataclass(frozen=True)
class _Caches:
    """Caches that own blocks together: how many have pages of how many bytes, and for which tokens.

    window: tokens of a sequence they need, 0: all of them. page: tokens of a page, 0: one block
    serves a sequence of any length. stride: what the size of blocks is a multiple of.
    """

    pages: Counter[int]
    page: int
    window: int = 0
    stride: int = 1

    @property
    def balanced(self) -> bool:
        """As many caches of each page size, so that they are a pattern that repeats."""
        return len(set(self.pages.values())) == 1

    @property
    def repeats(self) -> int:
        """The most caches of one page size."""
        return max(self.pages.values())

    def widest(self, parts: int) -> int:
        """Bytes of a block of the largest of so many groups."""
        return sum(-(-count // parts) * nbytes for nbytes, count in self.pages.items())

    def blocks(self, context: int, in_flight: int) -> int:
        """Blocks of a sequence, with so many tokens in flight."""
        if not self.page:
            return 1
        if not self.window:
            return -(-context // self.page)
        # One more, since a window need not begin where a page does.
        return -(-min(self.window - 1 + in_flight, context) // self.page) + 1


def kv_cache_bytes(config: ModelConfig, serving: Serving, drafts: int = 0) -> int:
    """Bytes of the pool that `serving` needs on each GPU; drafts: stages that draft."""
    if config.v41 is None:
        return _pool_bytes(_caches(config, drafts), serving)
    return max(_pool_bytes(_v41_caches(config, drafts, r), serving) for r in V41_RECORDS)


def _pool_bytes(caches: Sequence[_Caches], serving: Serving) -> int:
    groups = _groups(caches)
    block = max(c.widest(parts) for c, parts in zip(caches, groups, strict=True))
    stride = math.lcm(*(c.stride for c in caches))
    block = -(-block // stride) * stride
    in_flight = _BATCHES * serving.batched_tokens

    def blocks(tokens: int) -> int:
        return sum(
            parts * c.blocks(serving.context, tokens)
            for c, parts in zip(caches, groups, strict=True)
        )

    others = (serving.sequences - 1) * blocks(_BATCHES)
    return block * (blocks(in_flight) + others + 1)  # and one that nobody may have


@dataclass(frozen=True)
class Record:
    """How a GPU generation stores V4.1's entries.

    page: tokens of a page of entries. scaled: channels that share a scale; whole: rope channels
    are rounded like all others, rather than kept in BF16. alignment: pages are multiples of it.
    strided: blocks are multiples of an entry.
    """

    name: str
    page: int
    scaled: int
    whole: bool
    alignment: int
    strided: bool

    def entry(self, config: ModelConfig) -> int:
        """Bytes of an entry."""
        if self.whole:
            return config.head_dim + config.head_dim // self.scaled
        return _record_bytes(config)[0]


V41_RECORDS = (
    Record("sm90", 64, _SCALED, whole=False, alignment=_PAGE_BYTES, strided=False),
    Record("sm100", 128, 32, whole=True, alignment=512, strided=True),
)


def _record_bytes(config: ModelConfig) -> tuple[int, int]:
    """Bytes of an entry and of an index key."""
    rotary = config.qk_rope_head_dim
    plain = config.head_dim - rotary
    entry = plain + 2 * rotary + plain // _SCALED + 1
    return entry, config.index_head_dim + config.index_head_dim // 128 * _INDEX_SCALE


def _v41_caches(config: ModelConfig, drafts: int, record: Record) -> list[_Caches]:
    entry, index = record.entry(config), _record_bytes(config)[1]
    full: Counter[int] = Counter()
    rings: Counter[int] = Counter()
    ahead = config.dspark.block_size if drafts and config.dspark is not None else drafts
    rows = max(_V41_RING, 1 << (ahead + 1).bit_length())  # the drafts, a token and the row before
    for layer in config.layers:
        if layer.makes_entries:
            states = record.page // layer.ratio
            full[_pages(states * entry, record.alignment)] += 1
            full[_pages(states * index, record.alignment)] += 1
            if layer.ratio > 1:
                rings[rows * 2 * 4 * config.head_dim] += 1  # float32, keys and their weights
    page = _pages(_V41_WINDOW_PAGE * entry, record.alignment)
    windows = Counter({page: config.num_hidden_layers + drafts})
    stride = entry if record.strided else 1
    found = [
        _Caches(full, record.page),
        _Caches(windows, _V41_WINDOW_PAGE, config.sliding_window, stride),
        _Caches(rings, 0),
    ]
    return [caches for caches in found if caches.pages]


def _caches(config: ModelConfig, drafts: int) -> list[_Caches]:
    kinds = Counter(layer.kind for layer in config.layers)
    csa, hca = kinds["csa"], kinds["hca"]
    entry, index = _record_bytes(config)
    full = Counter({_pages(_BLOCK // CSA_RATIO * entry): csa})
    full[_pages(_BLOCK // CSA_RATIO * index)] += csa
    full[_pages(_BLOCK // HCA_RATIO * entry)] += hca
    windows = Counter({_pages(_WINDOW_PAGE * entry): config.num_hidden_layers + drafts})
    # Keys and their weights, twice as wide where blocks overlap, as in CSA.
    sums = Counter({_pages(_CSA_PAGE * 4 * 4 * config.head_dim): csa})
    sums[_pages(_CSA_PAGE * 4 * 4 * config.index_head_dim)] += csa
    longer = Counter({_pages(_HCA_PAGE * 4 * 2 * config.head_dim): hca})
    found = [
        _Caches(+full, _BLOCK),
        _Caches(windows, _WINDOW_PAGE, config.sliding_window),
        _Caches(+sums, _CSA_PAGE, 2 * CSA_RATIO),
        _Caches(+longer, _HCA_PAGE, HCA_RATIO),
    ]
    return [caches for caches in found if caches.pages]


def _pages(nbytes: int, alignment: int = _PAGE_BYTES) -> int:
    return -(-nbytes // alignment) * alignment


def _groups(caches: Sequence[_Caches]) -> list[int]:
    """Into how many groups each kind of cache is divided, each with blocks of its own."""
    if len({nbytes for c in caches for nbytes in c.pages}) == 1:
        return [1 for _ in caches]
    mixed = [c.repeats for c in caches if c.balanced and len(c.pages) > 1]
    step = _least_padding([c.repeats for c in caches if c.balanced], max(mixed)) if mixed else 0
    parts = [-(-c.repeats // step) if step and c.balanced else 1 for c in caches]
    # Rings, and windows where no pattern repeats, are divided until they widen no block.
    free = [not c.page or bool(c.window and not step) for c in caches]
    totals = [sum(c.pages.values()) for c in caches]
    rows = list(zip(caches, parts, free, totals, strict=True))
    width = max(c.widest(total if loose else n) for c, n, loose, total in rows)
    return [
        max(n, -(-total // max(width // min(c.pages), 1))) if loose else n
        for c, n, loose, total in rows
    ]


def _least_padding(counts: Sequence[int], lowest: int) -> int:
    """The step to whose multiples counts are rounded up with least waste; of equals the largest."""
    steps = range(lowest, max(counts) + 1)
    return min(steps, key=lambda step: (sum(-n % step for n in counts), -step))


def buffer_bytes(config: ModelConfig, serving: Serving, drafts: int = 0) -> int:
    """Tables, workspaces and the peak of one batch, on each GPU."""
    tokens, heads = serving.batched_tokens, config.num_attention_heads // serving.gpus
    streams = tokens * config.hc_mult * config.hidden_size * 2
    compressed = {layer.ratio > 0 for layer in config.layers} | {False for _ in range(drafts)}
    positions = config.max_position_embeddings
    lasting = len(compressed) * positions * config.qk_rope_head_dim * 4
    lasting += tokens * config.index_topk * 4 + (streams if drafts else 0)
    finest = CSA_RATIO
    if config.v41 is not None:
        finest = min((layer.ratio for layer in config.layers if layer.ratio), default=1)
    entries = -(-serving.context // finest)
    attention = tokens * config.head_dim * 2 * (heads + 2 * max(_LEAST_HEADS, heads))
    attention += _PREFILL_CHUNK * (entries + config.sliding_window + tokens) * config.head_dim * 2
    attention += _LOGITS_BYTES if any(layer.makes_choice for layer in config.layers) else 0
    inner = config.moe_intermediate_size // (1 if serving.expert_parallel else serving.gpus)
    rows = tokens * config.num_experts_per_tok
    experts = 2 * rows * (max(2 * inner, config.hidden_size) + max(inner, config.hidden_size))
    sampling = serving.sequences * config.vocab_size * 4 * _SAMPLER_COPIES
    peak = max(4 * streams + max(attention, experts), sampling)
    return lasting + int(peak * (1 + _ALLOCATOR_LOSS))


def runtime_estimate(serving: Serving) -> int:
    """CUDA's context, communication buffers and graphs: an estimate, as no GPU was at hand."""
    graphed = min(serving.sequences, _MOST_GRAPHED)
    return _CONTEXT_ESTIMATE + _GRAPHS_ESTIMATE + graphed * _GRAPHS_PER_SEQUENCE
