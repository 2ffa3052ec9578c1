"""Tokens per second of the reference forward: beside transformers, and beside its own products.

    python scripts/bench_forward.py                    # the tiny model, 2,048 tokens, interleaved
    python scripts/bench_forward.py --width flash      # one Flash-wide layer of few experts

The first takes one checkpoint through `stream_forward` with logits and through transformers' own
DeepseekV4ForCausalLM (float32, eager, weights already loaded), turn by turn, and prints medians.
The second makes a synthetic layer of the release's width and few experts, times it, and times the
matrix products it contains alone, with the same shapes, in float32 and in BF16: on a processor
without BF16 units the latter are the slower ones, and the faster of both is what a layer could
at best take.

Times are processor time, so that neighbours on a shared machine count little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from v4quant.api.arguments import forward_options
from v4quant.builtin import TINY_V4, resolve_source
from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.forward.logits import stream_logits
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model import attention, indexer, numerics
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.opening import open_checkpoint

EXACT = ForwardOptions()


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, over all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


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
    width: str,
    tokens: int,
    experts: int,
    rounds: int,
    options: ForwardOptions = EXACT,
    tiny: bool = False,
) -> dict[str, float]:
    """Median seconds of a wide layer's stretch of the trunk, and of its products alone."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "wide"
        sizes = {"num_hidden_layers": 1, "n_routed_experts": experts, "vocab_size": 1024}
        write_checkpoint(folder, Request(width, tiny=tiny, overrides=tuple(sizes.items())))
        with open_checkpoint(folder) as checkpoint:
            config = parse_model_config(dict(checkpoint.config), str(folder))
            ids = torch.randint(0, 1024, (tokens,), generator=torch.Generator().manual_seed(0))
            models = [StreamModel(CheckpointParams(checkpoint), options)]

            def layer() -> None:
                stream_forward(models, config, [ids])

            shapes = _products(layer)
            operands = {
                shape: (torch.randn(shape[:2]), torch.randn(shape[2], shape[1]))
                for shape in set(shapes)
            }
            coarse = {k: (a.bfloat16(), b.bfloat16()) for k, (a, b) in operands.items()}

            def products(kind: dict[tuple[int, int, int], tuple[Tensor, Tensor]]) -> None:
                for shape in shapes:
                    a, b = kind[shape]
                    a @ b.mT

            rows = [
                [seconds(layer), *(seconds(partial(products, k)) for k in (operands, coarse))]
                for _ in range(rounds + 1)
            ][1:]
    whole, exact, short = (statistics.median(times) for times in zip(*rows, strict=True))
    flops = sum(2.0 * m * k * n for m, k, n in shapes)
    return {
        "tokens": tokens,
        "layer_seconds": whole,
        "products_f32_seconds": exact,
        "products_bf16_seconds": short,
        "times_f32": whole / exact,
        "times_bf16": whole / short,
        "products_gflop": flops / 1e9,
    }


def _products(work: Callable[[], object]) -> list[tuple[int, int, int]]:
    """Shapes (rows, inner, columns) of the products that `work` makes."""
    shapes: list[tuple[int, int, int]] = []
    genuine, users = numerics.product, (numerics, attention, indexer)

    def watch(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        batch, rows = (a.shape[0] if a.dim() == 3 else 1), a.shape[-2]
        shapes.extend([(rows, a.shape[-1], b.shape[-1])] * batch)
        return genuine(a, b, dtype)

    for module in users:
        vars(module)["product"] = watch
    try:
        work()
    finally:
        for module in users:
            vars(module)["product"] = genuine
    return shapes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", choices=("tiny", "flash", "pro"), default="tiny")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--products", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--activations", choices=("plain", "official"), default="plain")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.width == "tiny":
        found = beside_transformers(args.tokens, args.rounds)
    else:
        options = forward_options(args.activations, args.products)
        found = beside_products(args.width, args.tokens, args.experts, args.rounds, options)
    found["threads"] = torch.get_num_threads()
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:32} {value:,.2f}")


if __name__ == "__main__":
    main()
