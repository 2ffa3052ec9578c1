"""Hyper-connections: four residual streams instead of one.

Every sublayer reads a weighted sum of the streams ("pre"), and its output is added to each stream
with its own weight ("post") while the streams are mixed among themselves by a 4x4 matrix C that is
made nearly doubly stochastic by Sinkhorn steps, so that mixing neither grows nor drains them. All
three sets of weights are computed per token from the normalised streams by one small matrix. In
V4.1 "pre" is delayed: a sublayer reads by the weights that the one before it computed, carried with
the streams (`Streams.read_pre`); the first reads stream 0, and behind the last one the trunk is
read by what that left, where V4 has weights of its own for the end.

The weights are kept stream-major, `[4, T]` and `[4, 4, T]`: the 39 tiny normalisations then run
along T instead of along dims of length four, which is many times faster on any hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.numerics import inverse_rms
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.streams import Streams
from v4quant_formats.model_config import ModelConfig


@dataclass(frozen=True)
class HyperWeights:
    """fn `[rows, hc_mult * hidden]`, base `[rows]`, scale `[3]` or, for the head, `[1]`."""

    fn: Tensor
    base: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Mixing:
    """What one sublayer does to the streams of T tokens, float32.

    pre `[hc, T]`, post `[hc, T]`, comb `[hc, hc, T]` with the source stream first.
    """

    pre: Tensor
    post: Tensor
    comb: Tensor


def load_hyper(params: Params, prefix: str) -> HyperWeights:
    """Read `<prefix>_fn`, `_base` and `_scale`, e.g. of "layers.0.hc_attn" or "hc_head"."""
    return HyperWeights(params(f"{prefix}_fn"), params(f"{prefix}_base"), params(f"{prefix}_scale"))


def mixing_weights(streams: Tensor, weights: HyperWeights, config: ModelConfig) -> Mixing:
    """Weights of one sublayer from streams `[T, hc, hidden]` (see the module text)."""
    hc, eps = config.hc_mult, config.hc_eps
    raw = _project(streams, weights, config)
    base = weights.base.unsqueeze(-1)
    pre = torch.sigmoid(raw[:hc] * weights.scale[0] + base[:hc]) + eps
    post = 2 * torch.sigmoid(raw[hc : 2 * hc] * weights.scale[1] + base[hc : 2 * hc])
    comb = (raw[2 * hc :] * weights.scale[2] + base[2 * hc :]).view(hc, hc, -1)
    return Mixing(pre, post, _sinkhorn(comb, config.hc_sinkhorn_iters, eps))


def read_streams(streams: Tensor, pre: Tensor) -> Tensor:
    """Weighted sum over streams: `[T, hc, hidden]` with pre `[hc, T]` gives `[T, hidden]`."""
    total = streams[:, 0] * pre[0].unsqueeze(-1)
    for j in range(1, streams.shape[1]):
        total += streams[:, j] * pre[j].unsqueeze(-1)
    return total


def write_streams(streams: Tensor, output: Tensor, mixing: Mixing) -> Tensor:
    """New streams: h'_k = post_k * output + sum_j comb_jk * h_j, `[T, hc, hidden]`.

    Summed in the release's order, which decides on which side of a border values are rounded later.
    """
    updated = torch.empty_like(streams)
    for k in range(streams.shape[1]):
        total = read_streams(streams, mixing.comb[:, k])
        torch.mul(output, mixing.post[k].unsqueeze(-1), out=updated[:, k]).add_(total)
    return updated


def reading_weights(
    streams: Streams, start: int, stop: int, mixing: Mixing, config: ModelConfig
) -> Tensor:
    """By which weights `[hc, T]` a sublayer with that mixing reads rows start .. stop - 1."""
    return streams.read_pre(start, stop).mT if config.delayed_mixing else mixing.pre


def load_collapse(params: Params, prefix: str, config: ModelConfig) -> HyperWeights | None:
    """What `collapse` needs at the end of the trunk ("") or of a draft stage ("mtp.2.")."""
    return None if config.delayed_mixing else load_hyper(params, f"{prefix}hc_head")


def collapse(
    streams: Streams, start: int, stop: int, weights: HyperWeights | None, config: ModelConfig
) -> Tensor:
    """Rows start .. stop - 1 as one vector each before the final norm, `[T, hidden]`; no mixing."""
    rows = streams.read(start, stop)
    if weights is None:
        return read_streams(rows, streams.read_pre(start, stop).mT)
    raw = _project(rows, weights, config)
    pre = torch.sigmoid(raw * weights.scale + weights.base.unsqueeze(-1)) + config.hc_eps
    return read_streams(rows, pre)


def _project(streams: Tensor, weights: HyperWeights, config: ModelConfig) -> Tensor:
    """fn times the flattened streams over their root mean square, `[rows, T]`."""
    flat = streams.flatten(1)
    return (weights.fn @ flat.mT) * inverse_rms(flat, config.rms_norm_eps).squeeze(-1)


def _sinkhorn(comb: Tensor, iterations: int, eps: float) -> Tensor:
    """Softmax over targets, then alternate column and row normalisation; columns come first.

    comb `[source, target, T]`. `iterations` column steps and one row step fewer.
    """
    comb = comb.softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb
