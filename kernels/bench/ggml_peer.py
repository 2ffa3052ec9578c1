"""Our GGML encoders beside llama.cpp's own quantizer: error and time on the same tensors.

    python kernels/bench/ggml_peer.py --ggml-lib .../libggml-base.so

The library is a build of llama.cpp (its Python package has it too, in llama_cpp/lib). Both sides
get the same float32 matrices and the same importance, on one thread; both results are decoded by
our decoder (which agrees with gguf's bit for bit) and weighed in float64. `blocks` is the share of
blocks on which our weighted error is not above the other's.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from v4quant_kernels import ggml
from v4quant_kernels.ggml_types import get_type
from v4quant_kernels.ref import mx
from v4quant_kernels.scheme import SCHEMES

Encoder = Callable[[Tensor, str, Tensor | None], Tensor]


def peer(path: Path) -> Encoder:
    """`ggml_quantize_chunk` of a ggml library as a function like ours."""
    library = ctypes.CDLL(str(path))
    chunk = library.ggml_quantize_chunk
    pointer = ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
    chunk.restype = ctypes.c_size_t

    def encode(x: Tensor, name: str, importance: Tensor | None) -> Tensor:
        kind = get_type(name)
        rows, columns = x.shape
        out = torch.zeros(rows, kind.row_bytes(columns), dtype=torch.uint8)
        weights = None if importance is None else importance.data_ptr()
        chunk(kind.type_id, x.data_ptr(), out.data_ptr(), 0, rows, columns, weights)
        return out

    return encode


def cases(rows: int, columns: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, matrix, importance): what experts (FP4 points) and dense matrices look like."""
    rng = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=rng) * 0.02
    spread = torch.exp2(0.5 * torch.randn(rows, columns // 32, 1, generator=rng))
    uneven = (normal.view(rows, -1, 32) * spread).view(rows, columns)
    tails = torch.distributions.StudentT(4.0)
    torch.manual_seed(seed)
    heavy = tails.sample((rows, columns)) * 0.01
    importance = torch.exp(torch.randn(columns, generator=rng))
    fp4 = mx.dequantize(mx.quantize(uneven, SCHEMES["mxfp4"]))
    for name, x in (("fp4", fp4), ("normal", normal), ("heavy", heavy)):
        yield name, x, None
        yield name + "+imp", x, importance


def block_errors(x: Tensor, data: Tensor, name: str, importance: Tensor | None) -> Tensor:
    """float64 `[rows * blocks]`: weighted squared errors."""
    error = (ggml.decode(data, name).double() - x.double()) ** 2
    if importance is not None:
        error *= importance.double()
    return error.view(-1, get_type(name).block).sum(-1)


def seconds(encode: Encoder, x: Tensor, name: str, importance: Tensor | None) -> float:
    """The least processor time of seven runs (other programs may run beside)."""
    best = np.inf
    for _ in range(7):
        start = time.thread_time()
        encode(x, name, importance)
        best = min(best, time.thread_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ggml-lib", type=Path, required=True)
    parser.add_argument("--types", default="q8_0,q6_k,q5_k,q4_k,q3_k,q2_k,q5_1,q5_0,q4_0")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="", help="only cases whose name begins with this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    theirs = peer(options.ggml_lib)
    print("| type | data | rel. rms | theirs | error ratio | blocks | ns/weight | theirs | speed |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.types.split(","):
        for case, x, importance in cases(options.rows, options.columns, options.seed):
            if not case.startswith(options.data):
                continue
            results = [
                block_errors(x, encode(x, name, importance), name, importance)
                for encode in (ggml.encode, theirs)
            ]
            ours_sum, theirs_sum = (float(r.sum()) for r in results)
            weight = 1.0 if importance is None else importance.double()
            energy = float((weight * x.double() ** 2).sum())
            times = [seconds(e, x, name, importance) for e in (ggml.encode, theirs)]
            ns = [1e9 * t / x.numel() for t in times]
            share = float((results[0] <= results[1]).double().mean())
            print(
                f"| {name} | {case} | {(ours_sum / energy) ** 0.5:.5f} "
                f"| {(theirs_sum / energy) ** 0.5:.5f} | {ours_sum / theirs_sum:.4f} "
                f"| {share:.2%} | {ns[0]:.1f} | {ns[1]:.1f} | {ns[1] / ns[0]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
