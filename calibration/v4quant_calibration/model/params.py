"""Params: where the forward pass gets its weights from.

The arithmetic knows tensors by the release's own names and nothing about files, formats or
devices. A provider answers a name with a dense tensor, and that is the whole interface: the
original checkpoint, a converted one, the original with one matrix rounded in memory, or random
numbers are all the same to the model. Providers should decode at the moment of the call and keep
nothing, because the caller holds one expert at a time and counts on that for its memory bound.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from v4quant_kernels.qtensor import QTensor

TOKEN_MAP = "engram.token_map"
"""What V4.1's providers also answer: the compressed id of every token id, `[vocab_size]`. It is no
tensor of the checkpoint but made from its tokenizer (`v4quant_formats.engram`)."""


class Params(Protocol):
    """Answers an official tensor name, without its `.weight` suffix, with a dense tensor."""

    def __call__(self, base: str, /) -> Tensor:
        """The tensor called `base`, for example "layers.0.ffn.experts.3.w1" or "hc_head_fn".

        Float32 and, for linear weights, dequantized to `[out, in]`; only "...ffn.gate.tid2eid",
        `[vocab_size, top_k]`, and `TOKEN_MAP` are int64. The device of the answer is the device of
        the arithmetic.
        """
        ...


@runtime_checkable
class RowParams(Params, Protocol):
    """A provider that can also decode a few rows of a matrix, for those with a row per token."""

    def rows(self, base: str, start: int, stop: int, /) -> Tensor:
        """Rows start .. stop - 1 of the tensor called `base`."""
        ...


@runtime_checkable
class GatherParams(Params, Protocol):
    """A provider that can also decode scattered rows of a matrix, of tables too large to read."""

    def gather(self, base: str, rows: Tensor, /) -> Tensor:
        """Rows `[n, K]` of the tensor called `base`; rows: int64 `[n]`, any order, on the CPU."""
        ...


@runtime_checkable
class PackedParams(Params, Protocol):
    """A provider that can also give a matrix as it is stored, for kernels that decode it."""

    def packed(self, base: str, /) -> QTensor:
        """The matrix called `base`, on the device of the arithmetic."""
        ...


def gather_rows(params: Params, base: str, rows: Tensor) -> Tensor:
    """Rows `[n, K]` of a matrix by number, int64 `[n]`, without the others where the provider can.

    They come sorted from the file, each once.
    """
    kinds, index = rows.unique(return_inverse=True)
    if isinstance(params, GatherParams):
        found = params.gather(base, kinds)
    else:
        whole = params(base)
        found = whole[kinds.to(whole.device)]
    return found[index.to(found.device)]


def read_rows(params: Params, base: str, start: int, stop: int) -> Tensor:
    """Rows of a matrix, without the others where the provider can."""
    if isinstance(params, RowParams):
        return params.rows(base, start, stop)
    return params(base)[start:stop]
