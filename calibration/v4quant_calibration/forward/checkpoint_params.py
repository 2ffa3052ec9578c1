"""CheckpointParams: the forward pass's weights, decoded from a checkpoint at the moment of use.

Works for every layout v4quant reads, because how a module is stored is decided per tensor. Nothing
is kept, so memory is one matrix at a time; the same object may serve several runs.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from v4quant_calibration.model.params import TOKEN_MAP
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import other_release
from v4quant_formats.model_config import (
    ConfigError,
    ModelConfig,
    parse_dimensions,
    parse_model_config,
)
from v4quant_formats.sidecars import token_map_of
from v4quant_formats.weight_reading import read_coded, read_dense, read_dense_at, read_dense_rows
from v4quant_kernels.qtensor import QTensor

CPU = torch.device("cpu")


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """What the forward pass needs of a checkpoint's config.json.

    Raises ConfigError, also for a config of V4 beside tensors of V4.1 and the reverse.
    """
    where = f"{checkpoint.path / 'config.json'}"
    config = parse_model_config(dict(checkpoint.config), where)
    for problem in other_release(config, checkpoint.tensors):
        raise ConfigError(f"{where}: {problem}; it belongs to another checkpoint")
    return config


class CheckpointParams:
    """Answers module names with dense float32 tensors of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device = CPU) -> None:
        """`checkpoint` stays the caller's to close. device: where tensors are wanted, and so the
        arithmetic."""
        self.checkpoint, self._device = checkpoint, device

    def __call__(self, base: str, /) -> Tensor:
        """The tensor called `base`; raises what `read_dense` raises, and ConfigError for a
        tokenizer that Engram's rows cannot be hashed from."""
        if base == TOKEN_MAP:
            return self._token_map.to(self._device)
        return read_dense(self.checkpoint, base, self._device)

    def packed(self, base: str, /) -> QTensor:
        """The matrix called `base` as it is stored; raises what `read_coded` raises."""
        return read_coded(self.checkpoint, base, self._device)

    def rows(self, base: str, start: int, stop: int, /) -> Tensor:
        """Rows start .. stop - 1 of the matrix called `base`; raises what `read_dense` raises."""
        return read_dense_rows(self.checkpoint, base, start, stop, self._device)

    def gather(self, base: str, rows: Tensor, /) -> Tensor:
        """Rows of the matrix called `base` by number; raises what `read_dense_at` raises."""
        return read_dense_at(self.checkpoint, base, rows, self._device)

    @cached_property
    def _token_map(self) -> Tensor:
        folder = self.checkpoint.path
        config = parse_dimensions(dict(self.checkpoint.config), str(folder / "config.json"))
        assert config.v41 is not None, "only V4.1 has an Engram"
        size = config.v41.engram_compressed_vocab_size
        return torch.tensor(token_map_of(self.checkpoint, config.vocab_size, size))
