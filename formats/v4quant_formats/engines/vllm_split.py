"""tensor_parallel: which tensors vLLM cuts over the GPUs of one model, and when it cannot.

Experts and shared experts are cut along their inner width, attention along its heads and output
groups, embedding and head along the vocabulary. Everything else is whole on each GPU: the latents'
projections `wq_a` and `wkv` (one latent serves all heads), the indexer with its `wq_b` (every GPU
ranks all positions), compressors, router, hyper-connections, norms, what joins draft stages to the
trunk. So is the KV cache: there is one latent a position, and each GPU's heads read it. Read from
vLLM 0.33's `models/deepseek_v4`, whose linear layers say so one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from v4quant_formats.deepseek_v4 import TensorName
from v4quant_formats.model_config import Dimensions
from v4quant_kernels.scheme import Scheme

_SPLIT = ("wq_b", "wo_a", "wo_b", "embed", "head", "tok_emb", "attn_sink")


def is_split(name: TensorName) -> bool:
    """Whether a GPU holds its share of a tensor, rather than all of it."""
    if name.role in ("routed experts", "shared experts"):
        return True
    return name.role != "indexer" and name.module.rpartition(".")[2] in _SPLIT


def split_refusals(config: Dimensions, gpus: int) -> Iterator[str]:
    """Why dimensions cannot be cut into `gpus` parts, whatever numbers are stored as."""
    heads = ("attention heads", config.num_attention_heads), ("o_groups", config.o_groups)
    for what, size in heads:
        if size % gpus:
            yield f"{size} {what} do not divide by {gpus}"
    if config.moe_intermediate_size % gpus:
        yield f"experts of width {config.moe_intermediate_size} do not divide by {gpus}"


def tile_refusals(config: Dimensions, gpus: int, tile: int = 0) -> Iterator[str]:
    """Why dense FP8 matrices cannot be cut (in compressed-tensors, unpadded).

    tile: channels that share a scale; 0: the release's.
    """
    tile = tile or config.fp8_tile[1]
    sizes = {
        "the shared expert": config.moe_intermediate_size,
        "wq_b": config.num_attention_heads * config.head_dim,
        "wo_a and wo_b": config.o_groups * config.o_lora_rank,
    }
    for what, size in sizes.items():
        if gpus > 1 and size % gpus == 0 and (size // gpus) % tile:
            yield f"{what}: a share of {size // gpus} channels is not whole FP8 tiles of {tile}"


def share_refusal(config: Dimensions, gpus: int, scheme: Scheme) -> str:
    """Why experts in a scheme cannot be cut over so many GPUs by their width; "" where they can.

    Whole experts are dealt out instead (`--enable-expert-parallel`).
    """
    scheme = scheme.tiled(config.fp8_tile)
    group, share = scheme.group_size, config.moe_intermediate_size // gpus
    if scheme.is_packed_integer:
        group = math.lcm(group, 32 // math.gcd(32, scheme.bits))
    if gpus == 1 or share % group == 0:
        return ""
    return f"an expert's share of {share} channels is not a multiple of {scheme.name}'s {group}"


def possible_splits(config: Dimensions, most: int = 64) -> list[int]:
    """The powers of two a model's dimensions divide by."""
    powers = (1 << i for i in range(int(math.log2(most)) + 1))
    return [n for n in powers if not any(split_refusals(config, n))]
