"""Tokens per second of the reference forward: beside transformers, and beside its own products.

    python scripts/bench_forward.py                    # the tiny model, 2,048 tokens, interleaved
    python scripts/bench_forward.py --width flash      # one Flash-wide layer of few experts

The first takes one checkpoint through `stream_forward` with logits and through transformers' own
DeepseekV4ForCausalLM (float32, eager, weights already loaded), turn by turn, and prints medians.
The second makes a synthetic layer of the release's width and few experts, times it, and times the
BF16 matrix products it contains alone, with the same shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from v4quant.builtin import TINY_V4, resolve_source
from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_calibration.logits import stream_logits
from v4quant_calibration.model import attention, numerics
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.provider import CheckpointParams
from v4quant_calibration.stream import StreamModel, stream_forward
from v4quant_formats.checkpoint import open_checkpoint
from v4quant_formats.model_config import parse_model_config


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def beside_transformers(tokens: int, rounds: int) -> dict[str, float]:
    """Median tokens per second of both on the built-in tiny model."""
    import transformers

    folder = resolve_source(TINY_V4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
    theirs = theirs.float().eval()
    ids = torch.randint(0, 2048, (tokens,), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(folder) as checkpoint:
        config = parse_model_config(dict(checkpoint.config), str(folder))
        models = [StreamModel(CheckpointParams(checkpoint))]

        def ours() -> None:
            streams = stream_forward(models, config, [ids])
            for _ in stream_logits(models, config, streams):
                pass

        @torch.no_grad()
        def other() -> None:
            theirs(input_ids=ids[None], use_cache=False)

        pairs = [(seconds(ours), seconds(other)) for _ in range(rounds + 1)][1:]
    mine, others = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "tokens": tokens,
        "ours_tokens_per_second": tokens / mine,
        "transformers_tokens_per_second": tokens / others,
        "times": others / mine,
    }


def beside_products(
    width: str, tokens: int, experts: int, rounds: int, tiny: bool = False
) -> dict[str, float]:
    """Median seconds of a wide layer's stretch of the trunk, and of its products alone in BF16."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "wide"
        sizes = {"num_hidden_layers": 1, "n_routed_experts": experts, "vocab_size": 1024}
        write_checkpoint(folder, Request(width, tiny=tiny, overrides=tuple(sizes.items())))
        with open_checkpoint(folder) as checkpoint:
            config = parse_model_config(dict(checkpoint.config), str(folder))
            ids = torch.randint(0, 1024, (tokens,), generator=torch.Generator().manual_seed(0))
            models = [StreamModel(CheckpointParams(checkpoint), ForwardOptions())]

            def layer() -> None:
                stream_forward(models, config, [ids])

            shapes = _products(layer)
            operands = [
                (torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()) for m, k, n in shapes
            ]

            def products() -> None:
                for a, b in operands:
                    a @ b.mT

            pairs = [(seconds(layer), seconds(products)) for _ in range(rounds + 1)][1:]
    whole, alone = (statistics.median(times) for times in zip(*pairs, strict=True))
    flops = sum(2.0 * m * k * n for m, k, n in shapes)
    return {
        "tokens": tokens,
        "layer_seconds": whole,
        "products_bf16_seconds": alone,
        "times": whole / alone,
        "products_gflop": flops / 1e9,
    }


def _products(work: Callable[[], object]) -> list[tuple[int, int, int]]:
    """Shapes (rows, inner, columns) of the products that `work` makes."""
    shapes: list[tuple[int, int, int]] = []
    genuine, users = numerics.product, (numerics, attention)

    def watch(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        batch, rows = (a.shape[0] if a.dim() == 3 else 1), a.shape[-2]
        shapes.extend([(rows, a.shape[-1], b.shape[-1])] * batch)
        return genuine(a, b, dtype)

    for module in users:
        module.product = watch
    try:
        work()
    finally:
        for module in users:
            module.product = genuine
    return shapes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", choices=("tiny", "flash", "pro"), default="tiny")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.width == "tiny":
        found = beside_transformers(args.tokens, args.rounds)
    else:
        found = beside_products(args.width, args.tokens, args.experts, args.rounds)
    found["threads"] = torch.get_num_threads()
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:32} {value:,.2f}")


if __name__ == "__main__":
    main()
