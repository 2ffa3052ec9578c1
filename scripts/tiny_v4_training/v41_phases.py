"""V4.1's two phases for the training loop, and weights rounded as they will be stored.

Behind `ROUNDED_FROM` of the trunk's budget each step computes with the weights as the written files
will hold them and moves the full ones (the straight-through estimator): what is trained last is
what is shipped.

Before that a share `MUTED` of the steps passes no attention on in the first window layers. They can
find pairs of tokens as well as the Engram can, and a trunk that has learned to would leave the
tables unread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_v4_training.loop import LONG_FROM, Phase
from tiny_v4_training.model import RouterBalance
from tiny_v4_training.v41_draft import Draft, block_windows, draft_loss
from tiny_v4_training.v41_formats import rounded_like_stored
from tiny_v4_training.v41_model import V41Trunk, index_loss

ROUNDED_FROM = 0.8
MUTED = 0.7
ANCHOR_EVERY = 16


def v41_trunk_phase(trunk: V41Trunk, settled: Callable[[str], bool] = lambda name: False) -> Phase:
    """The trunk on next-token loss plus indexer distillation; `settled` parameters adapt only."""
    balance, rounding = RouterBalance(trunk), _Rounding(trunk)

    def loss(windows: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        rounding.begin(progress >= ROUNDED_FROM)
        mute = progress < ROUNDED_FROM and int(windows.sum()) % 100 < 100 * MUTED
        logits, passed, _ = trunk(windows[:, :-2], progress < LONG_FROM, mute)
        wanted = windows[:, 1:-1].reshape(-1)
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted), index_loss(passed)

    return Phase("trunk", trunk, loss, balance.step, rounding.end, settled)


def v41_draft_phase(draft: Draft, trunk: V41Trunk) -> Phase:
    """The stages on blocks drafted behind every sixteenth token; the trunk stays as it is."""
    trunk.requires_grad_(False).eval()
    balance = RouterBalance(draft)

    def loss(windows: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        del progress
        with torch.no_grad():
            _, _, targets = trunk(windows)
        anchors, before, wanted = block_windows(windows, draft.c["dspark_block_size"], ANCHOR_EVERY)
        logits, sure = draft(trunk, targets, anchors, before)
        return draft_loss(logits, sure, wanted)

    return Phase("mtp", draft, loss, balance.step)


class _Rounding:
    """Swaps the weights for what the files will hold, and back before the optimisers step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Tensor] = {}

    def begin(self, wanted: bool) -> None:
        """Round every parameter that is stored in fewer bits, keeping the full one."""
        if wanted:
            for name, parameter in self._model.named_parameters():
                rounded = rounded_like_stored(name, parameter.data)
                if rounded is not None:
                    self._kept[name] = parameter.data
                    parameter.data = rounded

    def end(self) -> None:
        """Put the full weights back."""
        for name, full in self._kept.items():
            self._model.get_parameter(name).data = full
        self._kept.clear()
