"""Compare our arithmetic of SGLang's caches with SGLang's own code.

    SGLANG_PY=folder python scripts/check_sglang_memory.py [--configs 200] [--seed N]

`SGLANG_PY` is an unpacked wheel (`pip download --no-deps sglang`, then unzip); it is read, not
imported, because its imports want a GPU. The methods that size DeepSeek-V4's pools are taken out of
`pool_configurator.py` with what they ask of the server replaced by drawn values; pools must agree
within 1 %, since ours counts a page that theirs rounds away. Exit code 3 when one differs more.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import secrets
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from v4quant.synthetic.configs import make_config
from v4quant_formats.engines.sglang_memory import Serving, pool_bytes
from v4quant_formats.model_config import ModelConfig, parse_model_config

POOLS = "sglang/srt/model_executor/pool_configurator.py"
LAYOUT = "sglang/kernels/ops/attention/dsv4/kv_layout.py"
NAMES = {"DSV4PoolConfigurator", "compute_swa_request_cap", "_get_dsv4_compress_state_dtype_sizes"}
METHODS = {
    "num_layers", "_resolve_swa_prefix_tails", "_resolve_swa_cap_tokens",
    "_get_bytes_per_swa_token", "_compressed_bytes_per_full_token", "_get_bytes_per_full_token",
    "_get_swa_fixed_bytes", "_get_num_req_slots", "_get_c128_state_fixed_bytes",
    "_get_c2_state_fixed_bytes",
}  # fmt: skip
ALLOWED = 0.01


def their_methods(folder: Path, schedule: SimpleNamespace) -> tuple[type, Any]:
    """The class that sizes pools, without what it inherits, and the layout of an entry."""
    tree = ast.parse((folder / POOLS).read_text(encoding="utf-8"))
    kept = [node for node in tree.body if getattr(node, "name", None) in NAMES]
    for node in kept:
        if isinstance(node, ast.ClassDef):
            node.bases = []
            node.body = [m for m in node.body if getattr(m, "name", "") in METHODS]

    def setting(value: Any) -> SimpleNamespace:
        return SimpleNamespace(get=lambda: value)

    space: dict[str, Any] = {
        "Optional": object, "torch": torch, "get_schedule": lambda: schedule,
        "ceil_div": lambda a, b: -(-a // b), "ceil_align": lambda a, b: -(-a // b) * b,
        "envs": SimpleNamespace(
            SGLANG_OPT_USE_ONLINE_COMPRESS=setting(False),
            SGLANG_SWA_EVICTION_INTERVAL=setting(128),
            SGLANG_DSV4_COMPRESS_STATE_DTYPE=setting("float32"),
        ),
        "get_spec": lambda: SimpleNamespace(
            speculative_algorithm=None, speculative_num_draft_tokens=None
        ),
        "get_disagg": lambda: SimpleNamespace(
            disaggregation_mode="null", disaggregation_decode_extra_slots=0
        ),
        "get_memory": lambda: SimpleNamespace(disable_radix_cache=False, enable_hisparse=False),
    }  # fmt: skip
    text = ast.unparse(ast.Module(body=kept, type_ignores=[]))
    exec(f"from __future__ import annotations\n{text}", space)
    layout: dict[str, Any] = {}
    exec((folder / LAYOUT).read_text(encoding="utf-8"), layout)
    return space["DSV4PoolConfigurator"], layout["KVLayout"].V4


def their_bytes(pools: type, layout: Any, config: ModelConfig, serving: Serving) -> float:
    """What SGLang's methods say that the caches of `serving` take."""
    theirs: Any = object.__new__(pools)
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for layer in config.layers:
        if layer.makes_entries:
            owners[layer.ratio].append(layer.number)
    keys = config.index_head_dim
    facts = {
        "page_size": 256, "sliding_window_size": config.sliding_window, "attn_dp_size": 1,
        "requested_max_running_requests_per_worker": serving.sequences, "encoder_replay": False,
        "operator_swa_ratio": None, "_unified": False, "disaggregation_mode": "null",
        "disaggregation_decode_extra_slots": 0, "request_window_bytes": 0, "c4_shrink_factor": 1,
        "swa_ratio": 0.1, "attn_head_dim": config.head_dim, "indexer_head_dim": keys,
        "indexer_bytes_per_token": keys + keys // 128 * 4,
        "low_ratio_index_bytes": keys // 2 + keys // 32, "num_layers_total": len(config.layers),
        "ring_sizes": {4: 8, 128: 128, 2: 2}, "stage_owner_layers": dict(owners),
    }  # fmt: skip
    for name, value in facts.items():
        setattr(theirs, name, value)

    def paged(ratio: int = 0) -> float:
        slots = 256 // ratio if ratio else 256
        return float(layout.page_bytes(slots) / slots)

    theirs._get_paged_kv_bytes_per_token = paged
    theirs.swa_prefix_tails = theirs._resolve_swa_prefix_tails()
    theirs.swa_cap_tokens = theirs._resolve_swa_cap_tokens()
    theirs.bytes_per_swa_token = theirs._get_bytes_per_swa_token()
    tokens = serving.sequences * -(-serving.context // 256) * 256
    fixed = theirs._get_c128_state_fixed_bytes(serving.sequences)
    fixed += theirs._get_c2_state_fixed_bytes(serving.sequences)
    return float(
        tokens * theirs._get_bytes_per_full_token() + theirs._get_swa_fixed_bytes() + fixed
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    rng = random.Random(options.seed)
    schedule = SimpleNamespace(disable_overlap_schedule=False, swa_prefix_tails=None)
    pools, layout = their_methods(Path(os.environ["SGLANG_PY"]), schedule)
    worst = 0.0
    for _ in range(options.configs):
        release = rng.choice(("flash", "pro", "v41"))
        config = parse_model_config(make_config(release, False, {}))
        serving = Serving(
            8, rng.randrange(1, 2**20), 2 ** rng.randrange(11, 15), 2 ** rng.randrange(9)
        )
        schedule.max_running_requests = serving.sequences
        schedule.chunked_prefill_size = serving.chunk
        ratio = pool_bytes(config, serving) / their_bytes(pools, layout, config, serving)
        worst = max(worst, abs(ratio - 1))
        if abs(ratio - 1) > ALLOWED:
            print(f"{release} {serving}: ours is {ratio:.4f} of theirs")
    print(f"{options.configs} configurations, the largest difference {worst:.2%}")
    return 3 if worst > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
