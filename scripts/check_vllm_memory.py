"""Compare our arithmetic of vLLM's KV cache with vLLM's own planner.

    VLLM_PY=folder python scripts/check_vllm_memory.py [--configs 200] [--seed N]

For Flash, Pro, V4.1 and random layer patterns, contexts and batches, the specs that vLLM's
DeepSeek-V4 and V4.1 layers declare are given to vLLM's functions that group caches and count a
request's blocks; the bytes must be ours exactly. Exit code 3 when one differs. `VLLM_PY` and the
interpreter are those of check_vllm_load.py; nothing is built and nothing computed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import secrets
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from check_vllm_load import pretend_cuda, pretend_operators, pretend_platform

from v4quant.synthetic.configs import make_config
from v4quant_formats.engines.vllm_memory import V41_RECORDS, Record, Serving, kv_cache_bytes
from v4quant_formats.model_config import CSA_RATIO, ModelConfig, parse_model_config


def specs(config: ModelConfig, drafts: int) -> dict[str, Any]:
    """What vLLM 0.33's attention, indexer, compressor and window layers answer when asked."""
    kinds = importlib.import_module("vllm.v1.kv_cache_interface")
    torch = importlib.import_module("torch")
    found: dict[str, Any] = {}
    common = {"num_kv_heads": 1, "max_tp_shards": 1, "alignment": 576}
    ratios = [*config.compress_ratios[: config.num_hidden_layers], *[0] * drafts]
    for layer, ratio in enumerate(ratios):
        found[f"{layer}.window"] = kinds.SlidingWindowMLASpec(
            block_size=64, head_size=config.head_dim, dtype=torch.uint8,
            model_version="deepseek_v4", sliding_window=config.sliding_window,
            cache_dtype_str="fp8_ds_mla", state_content_bytes=584, **common,
        )  # fmt: skip
        if not ratio:
            continue
        found[f"{layer}.attn"] = kinds.MLAAttentionSpec(
            block_size=256, head_size=config.head_dim, dtype=torch.uint8, tokens_per_state=ratio,
            cache_dtype_str="fp8_ds_mla", model_version="deepseek_v4", state_content_bytes=584,
            **common,
        )  # fmt: skip
        wide = 2 if ratio == CSA_RATIO else 1
        widths = {"state": config.head_dim}
        if ratio == CSA_RATIO:
            found[f"{layer}.index"] = kinds.MLAAttentionSpec(
                block_size=256, head_size=config.index_head_dim + 4, dtype=torch.uint8,
                tokens_per_state=ratio, **common,
            )  # fmt: skip
            widths["index_state"] = config.index_head_dim
        for name, width in widths.items():
            found[f"{layer}.{name}"] = kinds.SlidingWindowMLASpec(
                block_size=4 if ratio == CSA_RATIO else 8, head_size=2 * wide * width,
                dtype=torch.float32, sliding_window=wide * ratio, **common,
            )  # fmt: skip
    return found


def v41_specs(config: ModelConfig, drafts: int, record: Record) -> dict[str, Any]:
    """The same of vLLM's DeepSeek-V4.1 layers on one GPU generation.

    They are what its own model answered for the whole release, built on the meta device.
    """
    kinds = importlib.import_module("vllm.v1.kv_cache_interface")
    torch = importlib.import_module("torch")
    entry, packed = record.entry(config), {"dtype": torch.uint8, "num_kv_heads": 1}
    found: dict[str, Any] = {}
    for layer in range(config.num_hidden_layers + drafts):
        found[f"{layer}.window"] = kinds.SlidingWindowMLASpec(
            block_size=32, head_size=config.head_dim, sliding_window=config.sliding_window,
            cache_dtype_str="fp8_ds_mla", model_version="deepseek_v4", state_content_bytes=entry,
            max_tp_shards=1, alignment=record.alignment,
            block_stride_alignment=entry if record.strided else None, **packed,
        )  # fmt: skip
    for facts in config.layers:
        if not facts.makes_entries:
            continue
        common = {
            "block_size": record.page,
            "tokens_per_state": facts.ratio,
            "alignment": record.alignment,
            **packed,
        }
        found[f"{facts.number}.attn"] = kinds.MLAAttentionSpec(
            head_size=config.head_dim, cache_dtype_str="fp8_ds_mla", model_version="deepseek_v4",
            state_content_bytes=entry, **common,
        )  # fmt: skip
        found[f"{facts.number}.index"] = kinds.MLAAttentionSpec(
            head_size=config.index_head_dim + 4, **common
        )
        if facts.ratio > 1:
            ahead = config.dspark.block_size if drafts and config.dspark else 0
            found[f"{facts.number}.ring"] = kinds.CircularBufferSpec(
                block_size=max(8, 1 << (ahead + 1).bit_length()), num_kv_heads=1,
                head_size=2 * config.head_dim, head_size_v=0, dtype=torch.float32,
            )  # fmt: skip
    return found


def theirs(config: ModelConfig, serving: Serving, layers: dict[str, Any]) -> int:
    """Bytes vLLM wants for one request, and the block it holds back."""
    planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
    layout = importlib.import_module("vllm.v1.kv_cache_interface").KVCacheLayout.BLHNC
    stub = SimpleNamespace(
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(
            max_model_len=serving.context, supports_kv_cache_grouping=False
        ),
        kv_transfer_config=None,
        max_in_flight_tokens=2 * serving.batched_tokens,
    )
    groups = planning.get_kv_cache_groups(stub, layers)
    builder = planning.DefaultKVCacheConfigBuilder()
    block: int = planning._pool_bytes_per_block(stub, groups)
    return int(planning._max_memory_usage_bytes_from_groups(builder, stub, groups)) + block


def wanted_bytes(config: ModelConfig, serving: Serving, drafts: int) -> int:
    """By vLLM's planner; of V4.1's two records the one that takes more."""
    if config.v41 is None:
        return theirs(config, serving, specs(config, drafts))
    records = (v41_specs(config, drafts, record) for record in V41_RECORDS)
    return max(theirs(config, serving, layers) for layers in records)


def v41_case(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """V4.1 with another schedule of layers."""
    raw = make_config("v41", False, {"num_hidden_layers": rng.randint(3, 64)})
    text, ratios = raw["text_config"], [0] * rng.randint(0, 3)
    layers, sources = text["num_hidden_layers"], []
    for ratio in (2, 1):
        for _ in range(rng.randint(0, 6)):
            sources.append(len(ratios))
            ratios += [ratio] * rng.randint(1, 6)
    ratios = ratios[:layers] + [ratios[-1] if sources else 0] * (layers - len(ratios))
    sources = [n for n in sources if n < layers]
    text |= {
        "compress_ratios": [*ratios, 0, 0, 0],
        "kv_source_layer_ids": sources,
        "index_source_layer_ids": sources,
        "candidate_source_layer_id": -1,
    }
    return f"v41 {ratios}", raw


def main() -> int:
    """Compare, and say what differs. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", type=int, default=200, help="Random layer patterns.")
    parser.add_argument("--seed", type=int, help="Of the patterns (default: fresh, printed).")
    options = parser.parse_args()
    sys.path.insert(0, os.environ["VLLM_PY"])
    pretend_cuda(9, 0)
    pretend_operators()
    pretend_platform(9, 0)
    seed = options.seed if options.seed is not None else secrets.randbits(32)
    rng, wrong = random.Random(seed), 0
    cases: list[tuple[str, dict[str, Any]]] = [
        (r, make_config(r, False, {})) for r in ("flash", "pro")
    ]
    for _ in range(options.configs):
        layers = rng.randint(1, 64)
        ratios = [rng.choice((0, 4, 128)[: rng.randint(1, 3)]) for _ in range(layers)]
        raw = {**make_config("flash", False, {}), "num_hidden_layers": layers, "num_hash_layers": 0}
        cases.append((str(ratios), {**raw, "compress_ratios": ratios}))
    cases += [("v41", make_config("v41", False, {})), *(v41_case(rng) for _ in cases)]
    for name, raw in cases:
        config, drafts = parse_model_config(raw), rng.choice((0, 0, 1, 3))
        serving = Serving(1, rng.randint(1, 300_000), rng.choice((256, 2048, 8192, 16384)))
        ours, wanted = (
            kv_cache_bytes(config, serving, drafts),
            wanted_bytes(config, serving, drafts),
        )
        if ours != wanted:
            wrong += 1
            print(f"{name}, {drafts} drafts, {serving}: ours {ours:,}, vLLM's {wanted:,}")
    print(f"{len(cases)} configurations compared, {wrong} differ (seed {seed})")
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
