"""What vLLM keeps on a GPU: its cache groups as published, weights as loaded, splits refused.

`scripts/check_vllm_memory.py` compares the cache with vLLM's own planner, for random layers.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import replace

import pytest

from v4quant.synthetic.configs import make_config
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.engines.vllm_memory import (
    Serving,
    buffer_bytes,
    default_batch,
    kv_cache_bytes,
    runtime_estimate,
)
from v4quant_formats.engines.vllm_split import (
    is_split,
    possible_splits,
    share_refusal,
    split_refusals,
    tile_refusals,
)
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_kernels.scheme import SCHEMES

# Of V4-Flash, as vLLM's own log names them: bytes of a block of each group, tokens of a page.
BLOCK = 1_002_240
FLASH = Serving(gpus=4, context=32768, batched_tokens=2048)


def config(release: str = "flash", **fields: object) -> ModelConfig:
    return parse_model_config({**make_config(release, False, {}), **fields})


def test_a_sequence_owns_blocks_of_all_groups() -> None:
    """Flash: two groups of windows, one of compressed entries, one of each compressor's sums."""
    flight = 2 * 2048
    blocks = 32768 // 256 + 2 * (-(-(127 + flight) // 64) + 1)
    blocks += -(-(7 + flight) // 4) + 1 + -(-(127 + flight) // 8) + 1
    assert kv_cache_bytes(config(), FLASH) == BLOCK * (blocks + 1)
    longer = replace(FLASH, context=2**20)
    assert kv_cache_bytes(config(), longer) - kv_cache_bytes(config(), FLASH) == BLOCK * (
        (2**20 - 32768) // 256
    )
    # A second sequence is decoded: its window, and sums of the last tokens only.
    another = kv_cache_bytes(config(), replace(FLASH, sequences=2)) - kv_cache_bytes(
        config(), FLASH
    )
    assert another == BLOCK * (128 + 2 * 4 + 4 + 18)
    # 44 windows are two groups of 22 as well, so a draft stage costs nothing here.
    assert kv_cache_bytes(config(), FLASH, drafts=1) == kv_cache_bytes(config(), FLASH)


def test_random_layers_have_whole_blocks_and_grow() -> None:
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    for _ in range(50):
        layers = rng.randint(1, 64)
        ratios = [rng.choice((0, 4, 128)) for _ in range(layers)]
        c = config(num_hidden_layers=layers, num_hash_layers=0, compress_ratios=ratios)
        small = Serving(1, rng.randint(1, 9999), rng.choice((256, 2048)))
        sizes = [
            kv_cache_bytes(c, s)
            for s in (small, replace(small, context=20000), replace(small, context=2**20),
                      replace(small, context=2**20, batched_tokens=8192))
        ]  # fmt: skip
        assert sizes == sorted(sizes) and sizes[0] > 0, (seed, ratios)


def test_what_is_cut_and_what_every_gpu_has() -> None:
    cut = ("layers.3.ffn.experts.7.w2.weight_packed", "layers.3.ffn.shared_experts.w1.weight",
           "layers.3.attn.wq_b.weight", "layers.3.attn.wo_a.scale", "layers.3.attn.wo_b.weight",
           "layers.3.attn.attn_sink", "embed.weight", "head.weight",
           "mtp.0.attn.wq_b.weight")  # fmt: skip
    whole = ("layers.4.attn.indexer.wq_b.weight", "layers.3.attn.wq_a.weight", "norm.weight",
             "layers.3.attn.wkv.weight", "layers.4.attn.compressor.wkv.weight",
             "layers.3.ffn.gate.weight", "layers.0.ffn.gate.tid2eid", "layers.3.hc_attn_fn",
             "mtp.0.e_proj.weight", "layers.4.attn.indexer.weights_proj.weight")  # fmt: skip
    for names, expected in ((cut, True), (whole, False)):
        for name in names:
            parsed = parse_name(name)
            assert parsed is not None and is_split(parsed) is expected, name


def test_splits_that_are_refused() -> None:
    flash, pro = config(), config("pro")
    assert possible_splits(flash) == [1, 2, 4, 8] and possible_splits(pro) == [1, 2, 4, 8, 16]
    assert list(split_refusals(flash, 16)) == ["8 o_groups do not divide by 16"]
    assert [p.split()[0] for p in split_refusals(flash, 3)] == ["64", "8", "experts"]
    assert not list(tile_refusals(flash, 8)) and not list(tile_refusals(pro, 8))
    (problem,) = tile_refusals(pro, 16)
    assert "shared expert: a share of 192 channels" in problem


def v41() -> ModelConfig:
    return parse_model_config(make_config("v41", False, {}))


def test_v41_takes_what_vllms_planner_said() -> None:
    """Of vLLM 0.33's own planner for the caches of its own model: 483,263,424 on sm90."""
    assert kv_cache_bytes(v41(), Serving(8, 32768, 8192)) == 493_707_456


def test_v41_owns_few_caches_and_many_windows() -> None:
    """Four layers make entries and keys, three of them every second token: 2.5 of each a token."""
    c = v41()
    serving = Serving(8, 32768, 8192)
    short, long = (kv_cache_bytes(c, replace(serving, context=n)) for n in (2**19, 2**20))
    # Longer contexts take most on sm90: three pages of 32 entries and keys, one of 64, padded.
    assert long - short == (3 * (19008 + 4608) + 37440 + 8640) * 2**19 // 64
    assert 2.5 * (584 + 132) <= (long - short) / 2**19 < 1.03 * 2.5 * (584 + 132)
    # A second sequence is decoded: its entries, four groups of windows, and rings.
    one, two = (kv_cache_bytes(c, replace(serving, context=8192, sequences=n)) for n in (1, 2))
    assert two - one == 212_256 * (8192 // 128 + 4 * (-(-(127 + 2) // 32) + 1) + 1)
    assert kv_cache_bytes(c, replace(serving, batched_tokens=512)) < short
    assert buffer_bytes(c, serving) < buffer_bytes(c, replace(serving, context=2**20))


def test_shares_of_v41s_experts() -> None:
    """2304 channels: 4 cards have 576 each, which is no multiple of 128."""
    c = v41()
    assert share_refusal(c, 2, SCHEMES["int4-g128"]) == ""
    assert "576 channels is not a multiple of int4-g128's 128" in share_refusal(
        c, 4, SCHEMES["int4-g128"]
    )
    assert "288 channels" in share_refusal(c, 8, SCHEMES["int2-g64"])
    for scheme in ("mxfp4", "nvfp4", "fp8", "int4-g32", "int8-g32"):
        assert share_refusal(c, 8, SCHEMES[scheme]) == "", scheme
    assert share_refusal(config(), 8, SCHEMES["int4-g128"]) == ""


@pytest.mark.parametrize(("gb", "tokens"), [(24, 2048), (80, 8192), (141, 8192), (180, 16384)])
def test_batches_follow_the_card(gb: int, tokens: int) -> None:
    assert default_batch(gb * 10**9) == tokens


def test_buffers_follow_batch_and_cards() -> None:
    """Rotary tables of both kinds are always there; attention pads heads, so cards hardly help."""
    c = config()
    tables = 2 * 2**20 * 64 * 4
    small = buffer_bytes(c, replace(FLASH, batched_tokens=16))
    assert tables + 512 * 2**20 < small < tables + 1.3 * 512 * 2**20
    large = buffer_bytes(c, replace(FLASH, batched_tokens=8192))
    assert buffer_bytes(c, FLASH) < large
    assert buffer_bytes(c, replace(FLASH, gpus=8)) <= buffer_bytes(c, replace(FLASH, gpus=1))
    assert runtime_estimate(FLASH) < runtime_estimate(replace(FLASH, sequences=256)) < 4e9
