"""Agreement of choices and experts' errors, each against its definition spelled out."""

from __future__ import annotations

import pytest
import torch

from v4quant_calibration.evaluation.layer_recorder import (
    SAMPLE_ROWS,
    LayerRecorder,
    expert_errors,
    index_agreement,
    router_agreement,
)

EXPERTS = 9


def watches() -> tuple[LayerRecorder, LayerRecorder]:
    return LayerRecorder(EXPERTS, True), LayerRecorder(EXPERTS, True)


def choices(generator: torch.Generator, rows: int, top_k: int, of: int) -> torch.Tensor:
    return torch.stack([torch.randperm(of, generator=generator)[:top_k] for _ in range(rows)])


def test_router_agreement_and_counts(generator: torch.Generator) -> None:
    one, other = watches()
    a, b = (choices(generator, 40, 3, EXPERTS) for _ in range(2))
    one.on_route("layers.7", a, a.float())
    other.on_route("layers.7", b, b.float())
    shared = sum(len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert router_agreement(one, other) == pytest.approx(shared / 120)
    assert router_agreement(one, one) == 1
    one.forget()
    expected = [int((a == e).sum()) for e in range(EXPERTS)]
    assert one.counts() == [{"name": "layers.7", "tokens_per_expert": expected}]


def test_index_agreement(generator: torch.Generator) -> None:
    one, other = watches()
    assert index_agreement(one, other) is None
    shared = chosen = 0
    for rows, entries in ((17, 12), (5, 40)):
        a, b = (choices(generator, rows, 6, entries).sort(1).values for _ in range(2))
        # The first query sees fewer entries than it may read.
        a[0, 4:], b[0, 4:] = -1, -1
        one.on_index("layers.1", a)
        other.on_index("layers.1", b)
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            shared += len((set(x) & set(y)) - {-1})
            chosen += len(set(x) - {-1})
    assert index_agreement(one, other) == pytest.approx(shared / chosen)
    assert index_agreement(other, other) == 1
    one.forget()
    assert one.picks == [] and index_agreement(one, one) is None


def test_expert_errors_take_common_tokens(generator: torch.Generator) -> None:
    one, other = watches()
    y = torch.randn(5, 16, generator=generator)
    z = torch.randn(5, 16, generator=generator)
    one.on_expert_output("layers.0", 2, torch.tensor([1, 4, 6, 8, 9]), y)
    other.on_expert_output("layers.0", 2, torch.tensor([0, 4, 8, 11, 12]), z)
    one.on_expert_output("layers.0", 3, torch.tensor([1, 4, 6, 8, 9]), y)
    other.on_expert_output("layers.0", 3, torch.tensor([1, 4, 6, 8, 9]), y * 1.5)
    one.on_expert_output("layers.0", 5, torch.tensor([1]), y[:1])
    other.on_expert_output("layers.0", 7, torch.tensor([1]), y[:1])
    found = expert_errors(one, other)
    assert found.keys() == {2, 3}
    right, mine = y[[1, 3]].double(), z[[1, 2]].double()
    assert found[2] == pytest.approx(float((mine - right).norm() / right.norm()), rel=1e-12)
    assert found[3] == pytest.approx(0.5, rel=1e-6)
    assert LayerRecorder(EXPERTS, False).outputs == {}


def test_only_a_sample_is_kept(generator: torch.Generator) -> None:
    one = LayerRecorder(EXPERTS, True)
    y = torch.randn(100, 4, generator=generator)
    one.on_expert_output("layers.0", 1, torch.arange(100), y)
    one.on_expert_output("layers.0", 1, torch.arange(100, 200), y)
    tokens, rows = one.outputs[1]
    assert tokens.tolist() == list(range(SAMPLE_ROWS)) and torch.equal(rows, y[:SAMPLE_ROWS])
    assert rows.untyped_storage().nbytes() == rows.numel() * 4, "keeps only what it needs"
    silent = LayerRecorder(EXPERTS, False)
    silent.on_expert_output("layers.0", 1, torch.arange(100), y)
    assert silent.outputs == {}
