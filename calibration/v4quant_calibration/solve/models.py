"""The two models of a solving run: the original, whose inputs are kept for a layer, and the one
being converted, whose matrices come from the solution as far as it has them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from v4quant_calibration.forward.checkpoint_params import CPU, CheckpointParams
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.solve.solution import files_of, holds, open_stage, stage_file
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.weight_reading import read_weight
from v4quant_formats.weights import find_weight
from v4quant_kernels.codec import dequantize


class InputKeeper(SilentObserver):
    """Keeps one layer's inputs, for the candidate that streams beside the reference: the rows of
    its experts, and the pieces its attention reads.
    """

    def __init__(self) -> None:
        """Nothing kept yet."""
        self.layer = ""
        self.x = torch.empty(0, 0)
        self.attention: list[Tensor] = []
        self._attended = ""

    def on_linear(self, module: str, x: Tensor) -> None:
        """Keep what the attention reads; drop that of the layer before."""
        layer, _, matrix = module.partition(".attn.")
        if matrix != "wkv":
            return
        if layer != self._attended:
            self._attended, self.attention = layer, []
        self.attention.append(x)

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Keep the rows; drop those of the layer before."""
        self.layer, self.x = layer, x


class SolvedParams:
    """A checkpoint's weights, with matrices that are solved read from the solution."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, device: torch.device = CPU) -> None:
        """`checkpoint` stays the caller's to close. device: where tensors are wanted."""
        self._original = CheckpointParams(checkpoint, device)
        self._folder, self._device = folder, device
        self._open: dict[str, Checkpoint] = {}

    def __call__(self, base: str, /) -> Tensor:
        """The tensor called `base`, as the conversion will hold it."""
        names = files_of(base)
        if not any(name in self._open for name in names):
            self.close()  # another layer's
        for name in names:
            if name not in self._open and stage_file(self._folder, name).exists():
                self._open[name] = open_stage(self._folder, name)
            if name in self._open and holds(self._open[name], base):
                coded = read_weight(self._open[name], find_weight(self._open[name], base))
                return dequantize(coded.to(self._device))
        return self._original(base)

    def gather(self, base: str, rows: Tensor, /) -> Tensor:
        """Rows of a table, which is never solved."""
        return self._original.gather(base, rows)

    def close(self) -> None:
        """Close the files read last."""
        for stage in self._open.values():
            stage.close()
        self._open = {}
