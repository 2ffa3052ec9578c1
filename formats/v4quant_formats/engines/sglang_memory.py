"""What SGLang 0.5.23 keeps on each GPU beside DeepSeek-V4's weights.

`--mem-fraction-static` is the share of a GPU that weights and caches may take; the rest is for
activations and graphs. SGLang's own default leaves 1.5 MiB a token of a prefill chunk, 2 MiB a
sequence of the largest decoding graph and some constants, 10 GiB at least on GPUs above 60
(`arg_groups/memory_hook.py`). Plans leave as much and say the share, for V4.1's vision tower would
lower it again.

Caches are pools of equal slots (`model_executor/pool_configurator.py`, `DSV4PoolConfigurator`): for
each token of context its share of compressed entries with the indexer's keys; for each sequence a
window in every layer, with the sums that CSA has not closed; and rings in float32 for HCA and for
V4.1's pairs. Windows are reserved for `--max-running-requests`, chunks in flight and prefixes that
may be used again. All of it is on each GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from v4quant_formats.model_config import CSA_RATIO, HCA_RATIO, ModelConfig

_MIB = 2**20
_CHUNKS = ((160 * 2**30, 16384), (60 * 2**30, 8192), (20 * 2**30, 4096), (0, 2048))
_LARGE = 60 * 2**30
_CONSTANT, _GRAPHS, _LARGE_LEAST = 512 * _MIB, 1536 * _MIB, 10 * 1024 * _MIB
_PER_TOKEN, _PER_GRAPHED, _PER_GPU = 3 * _MIB // 2, 2 * _MIB, 128 * _MIB
_LEAST_TOKENS = 2048
# Taken before SGLang measures what is free; an estimate, as in `vllm_memory`.
_CONTEXT_ESTIMATE = 800 * 10**6
_PAGE = 256
_SCALED = 64  # channels sharing a scale in an entry
_ALIGNED = 576
_EVICTED = 128  # tokens between two evictions of a window
_CHUNKS_IN_FLIGHT, _PREFIXES = 2, 4
_RINGS = {CSA_RATIO: 8, HCA_RATIO: 128, 2: 2}
_FLOAT = 4


@dataclass(frozen=True)
class Serving:
    """How SGLang is started, by its options' names.

    gpus: --tp; context: --context-length; chunk: --chunked-prefill-size; sequences:
    --max-running-requests, all of full length.
    """

    gpus: int
    context: int
    chunk: int
    sequences: int = 1


def default_chunk(gpu_bytes: int) -> int:
    """What SGLang takes for --chunked-prefill-size on a GPU of this size."""
    return next(chunk for least, chunk in _CHUNKS if gpu_bytes >= least)


def static_share(gpu_bytes: int, serving: Serving) -> float:
    """--mem-fraction-static: what SGLang's own rule leaves for weights and caches."""
    left = _CONSTANT + _GRAPHS + max(serving.chunk, _LEAST_TOKENS) * _PER_TOKEN
    left += serving.gpus * _PER_GPU + serving.sequences * _PER_GRAPHED
    if gpu_bytes > _LARGE:
        left = max(left, _LARGE_LEAST)
    return max(0.0, math.floor(1000 * (gpu_bytes - left) / gpu_bytes) / 1000)


def static_bytes(gpu_bytes: int, share: float) -> int:
    """Bytes of a GPU for weights and caches at a --mem-fraction-static."""
    return int(share * max(0, gpu_bytes - _CONTEXT_ESTIMATE))


def pool_bytes(config: ModelConfig, serving: Serving) -> int:
    """Bytes of all caches that `serving` needs on each GPU."""
    owners = Counter(layer.ratio for layer in config.layers if layer.makes_entries)
    per_token = sum(_entry_bytes(config, ratio) / ratio * n for ratio, n in owners.items())
    tokens = serving.sequences * -(-serving.context // _PAGE) * _PAGE + _PAGE
    per_window = _paged(config, _PAGE) * len(config.layers)
    per_window += _ring_bytes(config, CSA_RATIO) / _PAGE * owners[CSA_RATIO]
    slots = serving.sequences + 3  # one is nobody's, and the pool's end is padded
    rings = sum(slots * _ring_bytes(config, r) * owners[r] for r in (HCA_RATIO, 2))
    return int(tokens * per_token + _window_tokens(config, serving) * per_window + rings)


def widened_bytes(config: ModelConfig, gpus: int) -> int:
    """Bytes that `wo_a` takes beyond the file's on each GPU.

    Its FP8 product knows tiles of 128 only; with others the matrix is kept in BF16.
    """
    if config.fp8_tile[1] == 128:
        return 0
    rows, columns = config.o_groups * config.o_lora_rank, config.num_attention_heads
    return len(config.layers) * rows * columns * config.head_dim // config.o_groups // gpus


def _window_tokens(config: ModelConfig, serving: Serving) -> int:
    """Window slots: what runs, chunks in flight, and ends of prefixes that may be used again."""
    window, running = config.sliding_window, serving.sequences
    live = running * (window + _EVICTED + 2 * _PAGE) + _CHUNKS_IN_FLIGHT * serving.chunk + _PAGE
    return -(-(live + _PREFIXES * running * (window + _PAGE)) // _PAGE) * _PAGE


def _entry_bytes(config: ModelConfig, ratio: int) -> float:
    """An entry that stands for `ratio` tokens, with its index key where there is one."""
    keys = config.index_head_dim
    index = {CSA_RATIO: keys + keys // 128 * 4, HCA_RATIO: 0}.get(ratio, keys // 2 + keys // 32)
    return _paged(config, _PAGE // ratio) + index


def _paged(config: ModelConfig, slots: int) -> float:
    """Bytes of a slot, with its share of what pads a page of `slots`."""
    plain = config.head_dim - config.qk_rope_head_dim
    entry = plain + 2 * config.qk_rope_head_dim + plain // _SCALED + 1
    return -(-slots * entry // _ALIGNED) * _ALIGNED / slots


def _ring_bytes(config: ModelConfig, ratio: int) -> int:
    """What a sequence keeps of tokens that make no entry yet: keys and weights in float32.

    CSA's blocks overlap, so that everything is there twice, and its indexer keeps its own.
    """
    if ratio == CSA_RATIO:
        return _RINGS[ratio] * 4 * (config.head_dim + config.index_head_dim) * _FLOAT
    return _RINGS[ratio] * 2 * config.head_dim * _FLOAT
