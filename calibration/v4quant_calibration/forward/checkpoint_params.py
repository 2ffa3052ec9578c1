"""CheckpointParams: the forward pass's weights, decoded from a checkpoint at the moment of use.

Works for every layout v4quant reads, because how a module is stored is decided per tensor. Nothing
is kept, so memory is one matrix at a time; the same object may serve several runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.weights import read_coded, read_dense, read_dense_rows
from v4quant_kernels.qtensor import QTensor

CPU = torch.device("cpu")


class CheckpointParams:
    """Answers module names with dense float32 tensors of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device = CPU) -> None:
        """`checkpoint` stays the caller's to close. device: where tensors are wanted, and so the
        arithmetic."""
        self.checkpoint, self._device = checkpoint, device

    def __call__(self, base: str, /) -> Tensor:
        """The tensor called `base`; raises what `read_dense` raises."""
        return read_dense(self.checkpoint, base, self._device)

    def packed(self, base: str, /) -> QTensor:
        """The matrix called `base` as it is stored; raises what `read_coded` raises."""
        return read_coded(self.checkpoint, base, self._device)

    def rows(self, base: str, start: int, stop: int, /) -> Tensor:
        """Rows start .. stop - 1 of the matrix called `base`; raises what `read_dense` raises."""
        return read_dense_rows(self.checkpoint, base, start, stop, self._device)
