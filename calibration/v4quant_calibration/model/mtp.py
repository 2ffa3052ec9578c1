"""The multi-token-prediction stage of the original releases: guess the token after the next.

At position s it is given the trunk's streams h (before the final collapse) and the id of the next
token. Stream by stream, x_j = e_proj . norm(embedding of the next token) + h_proj . norm(h_j); one
full window layer follows, with its own collapse and norm and the trunk's head. Its logits at s
predict token s + 2.

DSpark releases store three stages of another design under the same prefix; they have no `e_proj`,
so reading the weights fails with the provider's missing-tensor error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_calibration.model.block import layer_forward
from v4quant_calibration.model.numerics import linear, quantized_input, rms_norm
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.streams import Streams, spans
from v4quant_formats.model_config import ModelConfig

STAGE = "mtp.0"


def next_tokens(token_ids: Tensor) -> Tensor:
    """Ids shifted one to the left; the last position, whose next token is unknown, is given 0."""
    return torch.cat([token_ids[1:], token_ids.new_zeros(1)])


def mtp_forward(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    embedded: Streams,
    next_ids: Tensor,
    options: ForwardOptions,
    observer: Observer | None = None,
) -> None:
    """The stage's streams, into `embedded`, from the trunk's final `streams`.

    next_ids: int64 `[T]`, the token after each position (`next_tokens` of each sequence of scored
    text, end to end); they are also the ids the stage's layer is given. embedded: their embeddings,
    a copy a stream as at the trunk's start.
    """
    eps = config.rms_norm_eps
    e_norm, h_norm = params(f"{STAGE}.enorm"), params(f"{STAGE}.hnorm")
    e_proj, h_proj = params(f"{STAGE}.e_proj"), params(f"{STAGE}.h_proj")
    for start, stop in spans(0, streams.shape.tokens, options.row_chunk):
        token = rms_norm(embedded.read(start, stop)[:, 0], e_norm, eps)
        trunk = rms_norm(streams.read(start, stop), h_norm, eps)
        joined = linear(quantized_input(trunk, config, options), h_proj, options)
        joined += linear(quantized_input(token, config, options), e_proj, options).unsqueeze(1)
        embedded.write(start, joined)
    del e_proj, h_proj
    layer_forward(params, config, STAGE, embedded, embedded, next_ids, options, observer)
