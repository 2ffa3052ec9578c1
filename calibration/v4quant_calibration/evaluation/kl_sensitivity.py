"""effect: what rounding one part of a model does to its predictions, measured.

The mean KL divergence of the next-token distributions, over some text, between the model and the
same model with a few matrices replaced in memory. Nothing is written; models run side by side,
layer by layer, so memory is that of one layer and the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.scoring import score
from v4quant_calibration.forward.checkpoint_params import CheckpointParams, model_config
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model.params import Params, gather_rows
from v4quant_formats.checkpoint import Checkpoint
from v4quant_kernels.progress import Progress, SilentProgress

_SIDE_BY_SIDE = 4

Alter = Callable[[str, Tensor], Tensor]
"""Given a tensor's name and value, the value the altered model has."""


@dataclass(frozen=True)
class Altered:
    """A provider whose answers pass through `alter`."""

    params: Params
    alter: Alter

    def __call__(self, base: str, /) -> Tensor:
        """The tensor called `base`, altered."""
        return self.alter(base, self.params(base))

    def gather(self, base: str, rows: Tensor, /) -> Tensor:
        """Rows of the tensor called `base`, altered: what alters tables goes row by row."""
        return self.alter(base, gather_rows(self.params, base, rows))


def measure_effects(
    checkpoint: Checkpoint,
    corpus: Corpus,
    alters: Sequence[Alter],
    progress: Progress,
    tell: Callable[[int, float], None] = lambda index, kl: None,
) -> list[float]:
    """Mean KL, in nats per token, of the model altered in each way.

    tell: called with the number of an alteration and its KL as soon as that is known.

    Raises DivergenceError for too little text and what the forward pass raises.
    """
    config = model_config(checkpoint)
    params = CheckpointParams(checkpoint)
    found: list[float] = []
    progress.start("Effect of each place", len(alters), "place")
    for first in range(0, len(alters), _SIDE_BY_SIDE):
        batch = alters[first : first + _SIDE_BY_SIDE]
        models = [StreamModel(params), *(StreamModel(Altered(params, a)) for a in batch)]
        streams = stream_forward(models, config, corpus.windows)
        for records in score(models, config, corpus, streams, SilentProgress()).records:
            assert records.kl is not None
            found.append(float(records.kl.mean()))
            tell(len(found) - 1, found[-1])
        progress.advance(len(batch))
    progress.finish()
    return found
