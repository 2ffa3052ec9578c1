"""The parts of the forward pass against loops written from the formulas, in Python floats."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from v4quant_calibration.model.compressor import CompressorWeights, entries_of, pool
from v4quant_calibration.model.hyper_connection import (
    HyperWeights,
    mixing_weights,
    read_streams,
    write_streams,
)
from v4quant_calibration.model.numerics import NonFiniteActivation, top_k_lowest_index
from v4quant_calibration.model.rope import rope_frequencies, rope_table, rotate_tail_
from v4quant_calibration.model.router import route
from v4quant_formats.model_config import load_model_config

CONFIG = load_model_config(Path(__file__).parents[2] / "data" / "tiny-a")


def test_top_k_takes_the_lower_index_of_equal_scores(generator: torch.Generator) -> None:
    for n in (1, 2, 5, 17, 64):
        scores = torch.randint(-2, 3, (50, n), generator=generator).float()
        scores[scores == -2] = -torch.inf
        for top_k in {1, max(1, n // 3), n}:
            found = top_k_lowest_index(scores, top_k, "test")
            order = np.argsort(-scores.numpy(), axis=-1, kind="stable")[:, :top_k]
            assert np.array_equal(found.numpy(), np.sort(order, axis=-1))


def test_top_k_refuses_nan() -> None:
    with pytest.raises(NonFiniteActivation, match=r"layers\.9"):
        top_k_lowest_index(torch.tensor([[1.0, torch.nan, 2.0]]), 1, "layers.9")


def test_frequencies_of_the_release() -> None:
    """rope dim 64: YaRN keeps pairs up to 15, divides by 16 from 25, blends between."""
    plain = rope_frequencies(CONFIG, 0)
    assert plain.tolist() == pytest.approx([10000 ** (-i / 32) for i in range(32)], rel=1e-6)
    ratio = [
        f / 160000 ** (-i / 32) for i, f in enumerate(rope_frequencies(CONFIG, 4).double().tolist())
    ]
    assert ratio[:16] == pytest.approx([1.0] * 16, rel=1e-6)
    assert ratio[25:] == pytest.approx([1 / 16] * 7, rel=1e-6)
    for i in range(16, 25):
        ramp = (i - 15) / 10
        assert ratio[i] == pytest.approx(1 - ramp + ramp / 16, rel=1e-6)
    assert torch.equal(rope_frequencies(CONFIG, 128), rope_frequencies(CONFIG, 4))
    without = replace(CONFIG, yarn=None)
    assert rope_frequencies(without, 4)[-1].item() == pytest.approx(160000 ** (-31 / 32))


def test_rotation_turns_adjacent_pairs_of_the_tail_and_back(generator: torch.Generator) -> None:
    x = torch.randn(5, 2, 128, generator=generator)
    table = rope_table(CONFIG, 0, 5, x.device)
    turned = rotate_tail_(x.clone(), table)
    assert torch.equal(turned[..., :64], x[..., :64])
    for position, head, pair in ((0, 0, 3), (3, 1, 0), (4, 1, 31)):
        even, odd = x[position, head, 64 + 2 * pair : 66 + 2 * pair].tolist()
        expected = complex(even, odd) * cmath.exp(1j * position * 10000 ** (-pair / 32))
        found = turned[position, head, 64 + 2 * pair : 66 + 2 * pair].tolist()
        assert found == pytest.approx([expected.real, expected.imag], abs=1e-6)
    torch.testing.assert_close(rotate_tail_(turned, table.conj()), x, rtol=0, atol=1e-6)


def test_hyper_connection_follows_the_formula(generator: torch.Generator) -> None:
    hidden, eps = 8, CONFIG.hc_eps
    streams = torch.randn(3, 4, hidden, generator=generator)
    weights = HyperWeights(
        torch.randn(24, 4 * hidden, generator=generator),
        torch.randn(24, generator=generator),
        torch.randn(3, generator=generator),
    )
    mixing = mixing_weights(streams, weights, CONFIG)
    output = torch.randn(3, hidden, generator=generator)
    read, written = read_streams(streams, mixing.pre), write_streams(streams, output, mixing)
    for token in range(3):
        x = streams[token].flatten().double()
        m = weights.fn.double() @ x / math.sqrt(float((x * x).mean()) + CONFIG.rms_norm_eps)
        scale, base = weights.scale.double(), weights.base.double()
        pre = torch.sigmoid(m[:4] * scale[0] + base[:4]) + eps
        post = 2 * torch.sigmoid(m[4:8] * scale[1] + base[4:8])
        comb = _sinkhorn([[float(m[8 + 4 * j + k] * scale[2] + base[8 + 4 * j + k])
                           for k in range(4)] for j in range(4)], eps)  # fmt: skip
        h = streams[token].double()
        torch.testing.assert_close(read[token].double(), pre @ h, rtol=1e-4, atol=1e-5)
        expected = torch.outer(post, output[token].double()) + comb.T @ h
        torch.testing.assert_close(written[token].double(), expected, rtol=1e-4, atol=1e-5)


def _sinkhorn(logits: list[list[float]], eps: float) -> torch.Tensor:
    """20 column and 19 row normalisations after a softmax of each row; columns first."""
    c = [[math.exp(v) for v in row] for row in logits]
    c = [[v / sum(row) + eps for v in row] for row in c]
    for step in range(39):
        if step % 2 == 0:
            sums = [sum(row[k] for row in c) + eps for k in range(4)]
            c = [[row[k] / sums[k] for k in range(4)] for row in c]
        else:
            c = [[v / (sum(row) + eps) for v in row] for row in c]
    return torch.tensor(c, dtype=torch.float64)


@pytest.mark.parametrize(("ratio", "length"), [(4, 3), (4, 4), (4, 14), (128, 127), (128, 300)])
def test_compressor_pools_complete_blocks(
    ratio: int, length: int, generator: torch.Generator
) -> None:
    dim, halves = 64, 2 if ratio == 4 else 1
    x = torch.randn(length, 16, generator=generator)
    weights = CompressorWeights(
        torch.randn(halves * dim, 16, generator=generator),
        torch.randn(halves * dim, 16, generator=generator),
        torch.randn(ratio, halves * dim, generator=generator),
        torch.rand(dim, generator=generator),
    )
    table = rope_table(CONFIG, ratio, length, x.device)
    facts = CONFIG.facts("layers.1" if ratio == 4 else "layers.2")
    found = entries_of(pool(x, weights, facts, CONFIG), table, ratio)
    assert found.shape == (length // ratio, dim)
    value, gate = (x @ weights.wkv.T).double(), (x @ weights.wgate.T).double()
    for block in range(length // ratio):
        slots = [(t, halves * dim - dim) for t in range(block * ratio, (block + 1) * ratio)]
        if ratio == 4 and block:
            slots += [(t, 0) for t in range((block - 1) * ratio, block * ratio)]
        u = torch.stack([value[t, c : c + dim] for t, c in slots])
        z = torch.stack([gate[t, c : c + dim] + weights.ape[t % ratio, c : c + dim]
                         for t, c in slots])  # fmt: skip
        share = z.exp() / z.exp().sum(0)
        pooled = (share * u).sum(0)
        normed = pooled / (pooled.square().mean() + CONFIG.rms_norm_eps).sqrt() * weights.norm
        expected = rotate_tail_(normed[None].clone(), table[block * ratio : block * ratio + 1])
        torch.testing.assert_close(found[block].double(), expected[0], rtol=1e-4, atol=1e-5)


def test_router_bias_chooses_but_does_not_weigh(generator: torch.Generator) -> None:
    gate = torch.randn(CONFIG.n_routed_experts, 16, generator=generator)
    table = torch.tensor([[3, 1], [0, 2]])
    tensors = {
        "layers.7.ffn.gate": gate,
        "layers.7.ffn.gate.bias": torch.tensor([0.0, 1000.0, 0.0, 900.0]),
        "layers.7.ffn.gate.tid2eid": table,
    }
    x = torch.randn(2, 16, generator=generator)
    ids = torch.tensor([1, 0])
    scores = torch.log1p((x.double() @ gate.T.double()).exp()).sqrt()
    facts = replace(CONFIG.facts("layers.1"), name="layers.7")
    biased = route(x, ids, tensors.__getitem__, facts, CONFIG)
    assert biased.expert_ids.tolist() == [[1, 3], [1, 3]]
    hashed = route(x, ids, tensors.__getitem__, replace(facts, hashed=True), CONFIG)
    assert hashed.expert_ids.tolist() == [[0, 2], [3, 1]]
    for routing in (biased, hashed):
        chosen = scores.gather(-1, routing.expert_ids)
        expected = chosen / chosen.sum(-1, keepdim=True) * CONFIG.routed_scaling_factor
        torch.testing.assert_close(routing.weights.double(), expected, rtol=1e-5, atol=1e-6)
