"""The multi-token-prediction stage of the original releases: guess the token after the next.

At position s it is given the trunk's streams h (before the final collapse) and the id of the next
token. Stream by stream, x_j = e_proj . norm(embedding of the next token) + h_proj . norm(h_j); one
full window layer follows, with its own collapse and norm and the trunk's head. Its logits at s
predict token s + 2.

DSpark releases store three stages of another design under the same prefix; they have no `e_proj`,
so reading the weights fails with the provider's missing-tensor error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v4quant_calibration.model.block import layer_forward
from v4quant_calibration.model.numerics import linear, quantized_input, rms_norm
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_formats.model_config import ModelConfig

STAGE = "mtp.0"


def next_tokens(token_ids: Tensor) -> Tensor:
    """Ids shifted one to the left; the last position, whose next token is unknown, is given 0."""
    return torch.cat([token_ids[1:], token_ids.new_zeros(1)])


def mtp_forward(
    params: Params,
    config: ModelConfig,
    streams: Sequence[Tensor],
    next_ids: Sequence[Tensor],
    options: ForwardOptions,
    observer: Observer | None = None,
) -> list[Tensor]:
    """Streams after the stage, from the trunk's final streams `[T_i, hc_mult, hidden]`.

    next_ids: int64 `[T_i]`, the token after each position (`next_tokens` for scored text); they
    are also the ids the stage's layer is given.
    """
    eps = config.rms_norm_eps
    embedding = params("embed")
    e_norm, h_norm = params(f"{STAGE}.enorm"), params(f"{STAGE}.hnorm")
    e_proj, h_proj = params(f"{STAGE}.e_proj"), params(f"{STAGE}.h_proj")
    inputs = []
    for part, ids in zip(streams, next_ids, strict=True):
        token = quantized_input(rms_norm(embedding[ids], e_norm, eps), options)
        trunk = quantized_input(rms_norm(part, h_norm, eps), options)
        joined = linear(trunk, h_proj, options)
        joined += linear(token, e_proj, options).unsqueeze(1)
        inputs.append(joined)
    del embedding
    return layer_forward(params, config, STAGE, inputs, next_ids, options, observer)
