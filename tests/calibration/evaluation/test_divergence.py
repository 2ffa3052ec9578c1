"""The figures of an evaluation, each recomputed in float64 by its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from v4quant_calibration.evaluation.bootstrap import RESAMPLES, mean_interval
from v4quant_calibration.evaluation.divergence import (
    CONFIDENCE_EDGES,
    QUANTILES,
    DivergenceError,
    TokenRecords,
    block_mean,
    kl_histogram,
    kl_quantiles,
    summarise,
)
from v4quant_calibration.evaluation.token_scores import score_tokens

VOCABULARY = 211


def log_probabilities(logits: Tensor) -> np.ndarray:
    """log softmax in float64, by the definition."""
    x = logits.double().numpy()
    x = x - x.max(-1, keepdims=True)
    result: np.ndarray = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def some_logits(generator: torch.Generator, count: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(count, VOCABULARY, generator=generator)


def some_records(generator: torch.Generator, blocks: list[int]) -> TokenRecords:
    count = sum(blocks)
    reference = some_logits(generator, count)
    logits = reference + 0.2 * torch.randn(reference.shape, generator=generator)
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    block = torch.repeat_interleave(torch.arange(len(blocks)) * 3 + 1, torch.tensor(blocks))
    columns = score_tokens(logits, targets, reference)
    return TokenRecords(block=block, part=torch.zeros(count, dtype=torch.int64), **columns)


def test_score_against_float64(generator: torch.Generator) -> None:
    reference = some_logits(generator, 64)
    for distance in (1e-3, 0.1, 5.0):
        logits = reference + distance * torch.randn(reference.shape, generator=generator)
        targets = torch.randint(VOCABULARY, (64,), generator=generator)
        found = score_tokens(logits, targets, reference)
        p, q = log_probabilities(reference), log_probabilities(logits)
        rows = np.arange(64)
        np.testing.assert_allclose(found["nll"], -q[rows, targets], atol=2e-6, rtol=1e-6)
        np.testing.assert_allclose(found["nll_reference"], -p[rows, targets], atol=2e-6, rtol=1e-6)
        kl = (np.exp(p) * (p - q)).sum(-1)
        # float32 log-probabilities near -10 are good to about 1e-6 each.
        np.testing.assert_allclose(found["kl"], kl, atol=1e-6, rtol=1e-5)
        assert found["top1"].tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
        best = [set(np.argsort(-x)[:5]) for x in (*p, *q)]
        shared = [len(best[i] & best[64 + i]) / 5 for i in range(64)]
        np.testing.assert_allclose(found["top5"], shared)
        np.testing.assert_allclose(found["top_p"], np.exp(p).max(-1), rtol=1e-6)
        moved = np.exp(q[rows, targets]) - np.exp(p[rows, targets])
        np.testing.assert_allclose(found["delta_p"], moved, atol=1e-6)


def test_identical_logits_give_exactly_zero(generator: torch.Generator) -> None:
    logits = some_logits(generator, 50, spread=20.0)
    targets = torch.randint(VOCABULARY, (50,), generator=generator)
    found = score_tokens(logits, targets, logits.clone())
    assert torch.equal(found["kl"], torch.zeros(50, dtype=torch.float64))
    assert torch.equal(found["nll"], found["nll_reference"])
    assert bool(found["top1"].all()) and bool((found["top5"] == 1).all())
    assert bool((found["delta_p"] == 0).all()) and bool((found["top_p"] <= 1).all())


def test_kl_sees_a_known_distance() -> None:
    """Two outcomes of 1/2 each against 1/4 and 3/4: log(2 / sqrt 3); KL is not symmetric."""
    rest = torch.full((1, 6), -200.0)
    p = torch.cat([torch.log(torch.tensor([[0.5, 0.5]])), rest], 1)
    q = torch.cat([torch.log(torch.tensor([[0.25, 0.75]])), rest], 1)
    there = score_tokens(q, torch.tensor([0]), p)
    back = score_tokens(p, torch.tensor([0]), q)
    assert float(there["kl"]) == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-6)
    assert float(back["kl"]) == pytest.approx(0.75 * math.log(3) - math.log(2), rel=1e-6)
    assert float(there["nll"]) == pytest.approx(math.log(4), rel=1e-6)


def test_without_reference_only_likelihoods(generator: torch.Generator) -> None:
    records = some_records(generator, [7, 9])
    absent = ("nll_reference", "kl", "top1", "top5", "top_p", "delta_p")
    alone = replace(records, **dict.fromkeys(absent))
    assert summarise(alone).keys() == {"tokens", "nll", "perplexity", "perplexity_stderr"}


def brute_stderr(values: list[float], blocks: list[int]) -> tuple[float, float]:
    """Mean and its block error, spelled out: residual sums of blocks around the common mean."""
    mean = math.fsum(values) / len(values)
    residuals: dict[int, float] = {}
    for value, block in zip(values, blocks, strict=True):
        residuals[block] = residuals.get(block, 0.0) + (value - mean)
    count = len(residuals)
    variance = count / (count - 1) * math.fsum(r * r for r in residuals.values())
    return mean, math.sqrt(variance) / len(values)


def test_block_mean_by_brute_force(generator: torch.Generator) -> None:
    for _ in range(20):
        blocks = torch.randint(1, 40, (11,), generator=generator).tolist()
        ids = torch.repeat_interleave(torch.arange(11), torch.tensor(blocks))
        values = torch.rand(len(ids), generator=generator, dtype=torch.float64)
        order = torch.randperm(len(ids), generator=generator)
        expected = brute_stderr(values.tolist(), ids.tolist())
        assert block_mean(values, ids) == pytest.approx(expected, rel=1e-12)
        assert block_mean(values[order], ids[order]) == pytest.approx(expected, rel=1e-12)


def test_error_of_equal_blocks_is_the_textbook_one(generator: torch.Generator) -> None:
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    ids = torch.arange(60) // 6
    means = values.reshape(10, 6).mean(1)
    assert block_mean(values, ids)[1] == pytest.approx(float(means.std()) / math.sqrt(10))


def test_error_counts_correlated_tokens_once(generator: torch.Generator) -> None:
    """A block of equal values says no more than one value of it."""
    one = torch.randn(50, generator=generator, dtype=torch.float64)
    many = one.repeat_interleave(512)
    single = block_mean(one, torch.arange(50))[1]
    assert block_mean(many, torch.arange(50).repeat_interleave(512))[1] == pytest.approx(single)
    naive = float(many.std()) / math.sqrt(len(many))
    assert naive < single / 20


def test_summary_by_definition(generator: torch.Generator) -> None:
    records = some_records(generator, [120, 200, 77, 3])
    assert records.kl is not None and records.nll_reference is not None
    assert records.top1 is not None and records.top5 is not None
    found = summarise(records)
    blocks = records.block.tolist()
    nll, error = brute_stderr(records.nll.tolist(), blocks)
    base, base_error = brute_stderr(records.nll_reference.tolist(), blocks)
    ratio, ratio_error = brute_stderr((records.nll - records.nll_reference).tolist(), blocks)
    kl, kl_error = brute_stderr(records.kl.tolist(), blocks)
    expected = {
        "tokens": 400,
        "nll": nll,
        "perplexity": math.exp(nll),
        "perplexity_stderr": math.exp(nll) * error,
        "reference_perplexity": math.exp(base),
        "reference_perplexity_stderr": math.exp(base) * base_error,
        "perplexity_ratio": math.exp(ratio),
        "perplexity_ratio_stderr": math.exp(ratio) * ratio_error,
        "kl_mean": kl,
        "kl_mean_stderr": kl_error,
        "kl_max": max(records.kl.tolist()),
        "top1_agreement": sum(records.top1.tolist()) / 400,
        "top5_agreement": math.fsum(records.top5.tolist()) / 400,
    }
    for name, share in QUANTILES.items():
        expected[name] = float(np.quantile(records.kl.numpy(), share))
    assert records.top_p is not None and records.delta_p is not None
    flipped, top_p = ~records.top1.numpy(), records.top_p.numpy()
    expected |= {
        "blocks": 4,
        "flips_weighted": top_p[flipped].sum() / top_p.sum(),
        "flips_confident": np.mean(flipped[top_p > 0.5]),
        "confident_tokens": np.count_nonzero(top_p > 0.5),
        "delta_p_mean": records.delta_p.numpy().mean(),
        "delta_p_rms": math.sqrt(np.mean(records.delta_p.numpy() ** 2)),
    }
    beside = ("kl_mean_ci95", "perplexity_ratio_ci95", "kl_by_confidence")
    others = {key: found.pop(key) for key in beside}
    assert found == pytest.approx(expected, rel=1e-10)
    assert others["kl_mean_ci95"] == list(mean_interval(records.kl, records.block))
    log_ratio = mean_interval(records.nll - records.nll_reference, records.block)
    assert others["perplexity_ratio_ci95"] == pytest.approx([math.exp(x) for x in log_ratio])
    check_bands(others["kl_by_confidence"], records)


def check_bands(bands: list[dict[str, float]], records: TokenRecords) -> None:
    """Every token is in one band, and the bands' means make up the mean."""
    assert records.kl is not None and records.top_p is not None
    assert sum(b["tokens"] for b in bands) == len(records.kl)
    place = np.digitize(records.top_p.numpy(), CONFIDENCE_EDGES[1:-1], right=True)
    assert [b["low"] for b in bands] == [CONFIDENCE_EDGES[i] for i in np.unique(place)]
    for band in bands:
        mine = place == CONFIDENCE_EDGES.index(band["low"])
        assert band["tokens"] == np.count_nonzero(mine)
        assert band["kl_mean"] == pytest.approx(records.kl.numpy()[mine].mean())
        assert records.top1 is not None
        assert band["top1_agreement"] == pytest.approx(records.top1.numpy()[mine].mean())


def test_flips_weigh_what_the_reference_was_sure_of() -> None:
    """Two flips of three: one near-tie, one certainty; no token above one half is not a share."""
    reference = torch.tensor([[0.9, 0.1, 0, 0, 0], [0.4, 0.35, 0.25, 0, 0], [0.6, 0.4, 0, 0, 0]])
    candidate = torch.tensor([[0.3, 0.7, 0, 0, 0], [0.35, 0.4, 0.25, 0, 0], [0.6, 0.4, 0, 0, 0]])
    logits = [(x + 1e-9).log() for x in (candidate, reference)]
    columns = score_tokens(logits[0], torch.tensor([0, 1, 2]), logits[1])
    records = TokenRecords(block=torch.arange(3), part=torch.zeros(3), **columns)
    found = summarise(records)
    assert found["flips_weighted"] == pytest.approx((0.9 + 0.4) / (0.9 + 0.4 + 0.6), rel=1e-6)
    assert found["flips_confident"] == 0.5 and found["confident_tokens"] == 2
    assert found["delta_p_rms"] == pytest.approx(math.sqrt((0.6**2 + 0.05**2) / 3), rel=1e-6)
    unsure = summarise(replace(records, top_p=torch.full((3,), 0.4)))
    assert unsure["flips_confident"] is None and unsure["confident_tokens"] == 0


def test_more_tokens_than_torch_can_sort_into_quantiles() -> None:
    kl = torch.arange(2**24 + 3, dtype=torch.float64)
    assert kl_quantiles(kl)["kl_median"] == 2**23 + 1


def test_interval_covers_the_truth_about_19_times_in_20(generator: torch.Generator) -> None:
    """300 samples of 40 correlated, skewed blocks; binomial with p 0.95 strays below 0.88 never."""
    hits = 0
    block = torch.arange(40).repeat_interleave(16)
    for _ in range(300):
        common = torch.rand(40, generator=generator, dtype=torch.float64)
        own = torch.rand(len(block), generator=generator, dtype=torch.float64)
        values = -(1 - common).log()[block] * own * 2
        low, high = mean_interval(values, block)
        assert low < float(values.mean()) < high
        hits += low < 1 < high
    print("covered", hits)
    assert 264 <= hits <= 298


def test_interval_is_repeatable_and_narrow_for_equal_blocks(generator: torch.Generator) -> None:
    values = torch.rand(70, generator=generator, dtype=torch.float64)
    block = torch.arange(70) // 10
    assert mean_interval(values, block) == mean_interval(values.clone(), block + 5)
    equal = torch.full((70,), 0.25, dtype=torch.float64)
    assert mean_interval(equal, block) == (0.25, 0.25)
    # The normal approximation agrees where it holds.
    many = torch.randn(5000, generator=generator, dtype=torch.float64)
    _, error = block_mean(many, torch.arange(5000) // 10)
    low, high = mean_interval(many, torch.arange(5000) // 10)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert RESAMPLES >= 1000


def test_too_few_blocks_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(DivergenceError, match=r"40 scored tokens make 1 block.*--tokens"):
        summarise(some_records(generator, [40]))
    summarise(some_records(generator, [40, 1]))


def test_selection_keeps_columns_together(generator: torch.Generator) -> None:
    records = some_records(generator, [30, 30])
    mask = torch.rand(60, generator=generator) < 0.5
    chosen = records.select(mask)
    for name, column in vars(records).items():
        assert torch.equal(getattr(chosen, name), column[mask])
    alone = replace(records, kl=None).select(mask)
    assert alone.kl is None


def test_histogram_counts_every_token(generator: torch.Generator) -> None:
    exponents = torch.rand(500, generator=generator, dtype=torch.float64) * 16 - 12
    kl = torch.cat([torch.zeros(7, dtype=torch.float64), 10**exponents])
    floor = kl[:100]
    found = kl_histogram(kl, floor)
    edges = found["log10_edges"]
    assert len(edges) == len(found["counts"]) + 1
    assert sum(found["counts"]) == 507 and sum(found["floor_counts"]) == 100
    inner = np.clip(np.log10(np.maximum(kl.numpy(), 1e-300)), edges[0], edges[-1] - 1e-9)
    assert found["counts"] == np.histogram(inner, bins=edges)[0].tolist()
    assert found["counts"][0] >= 7
    assert kl_histogram(kl, None)["floor_counts"] is None
