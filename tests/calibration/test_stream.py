"""Several models side by side: identity, local errors, observers, noise, slices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.calibration.oracle_loader import OracleParams
from v4quant_calibration.model.block import layer_forward
from v4quant_calibration.model.numerics import NonFiniteActivation
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.stream import LayerResult, StreamModel, stream_forward, stream_logits
from v4quant_formats.model_config import load_model_config

TINY = Path(__file__).parent.parent / "data" / "tiny-a"
CONFIG = load_model_config(TINY)
ORACLE = OracleParams(TINY)


class Recorder(SilentObserver):
    """Keeps everything it is shown."""

    def __init__(self) -> None:
        self.routes: dict[str, tuple[Tensor, Tensor]] = {}
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self.hidden: dict[tuple[str, int], Tensor] = {}
        self.picks: list[tuple[str, Tensor]] = []

    def on_route(self, layer: str, expert_ids: Tensor, weights: Tensor) -> None:
        assert layer not in self.routes
        self.routes[layer] = (expert_ids, weights)

    def on_expert_input(self, layer: str, expert: int, x: Tensor) -> None:
        self.inputs[layer, expert] = x.clone()

    def on_expert_hidden(self, layer: str, expert: int, h: Tensor) -> None:
        self.hidden[layer, expert] = h.clone()

    def on_index(self, layer: str, picks: Tensor) -> None:
        self.picks.append((layer, picks))


@pytest.fixture
def sequences(generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(0, CONFIG.vocab_size, (n,), generator=generator) for n in (150, 9)]


def damaged(base: str, /) -> Tensor:
    """The oracle's weights with one expert matrix of layer 1 scaled."""
    value = ORACLE(base)
    return value * 1.5 if base == "layers.1.ffn.experts.2.w2" else value


def test_equal_models_stay_equal_and_damage_is_local(sequences: list[Tensor]) -> None:
    results: list[LayerResult] = []
    steps: list[tuple[str, int, int]] = []
    models = [StreamModel(ORACLE), StreamModel(ORACLE), StreamModel(damaged)]
    final = stream_forward(
        models,
        CONFIG,
        sequences,
        local=(1, 2),
        on_layer=results.append,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [(f"layers.{i}", i + 1, 4) for i in range(4)]
    for result in results:
        for i in range(len(sequences)):
            assert torch.equal(result.after[0][i], result.after[1][i])
            assert torch.equal(result.local[1][i], result.after[0][i])
        same = torch.equal(result.local[2][0], result.after[0][0])
        assert same == (result.layer != "layers.1")
    assert not torch.equal(final[2][0], final[0][0])
    assert torch.equal(results[-1].after[2][1], final[2][1])


def test_one_layer_alone_equals_the_layer_in_the_stream(sequences: list[Tensor]) -> None:
    results: list[LayerResult] = []
    stream_forward([StreamModel(ORACLE)], CONFIG, sequences, on_layer=results.append)
    before = [part.clone() for part in results[2].before[0]]
    after = layer_forward(ORACLE, CONFIG, "layers.2", before, sequences, ForwardOptions())
    for i, part in enumerate(after):
        assert torch.equal(part, results[2].after[0][i])
        assert torch.equal(before[i], results[2].before[0][i]), "the input was changed"


@pytest.mark.parametrize("activations", ["plain", "official"])
def test_observer_sees_what_the_experts_multiply(sequences: list[Tensor], activations: str) -> None:
    watched, local = Recorder(), Recorder()
    options = ForwardOptions(activations=activations)  # type: ignore[arg-type]
    models = [StreamModel(ORACLE, options), StreamModel(ORACLE, options, watched, local)]
    stream_forward(models, CONFIG, sequences, local=(1,), on_layer=lambda _: None)
    count = sum(map(len, sequences))
    assert sorted(watched.routes) == [f"layers.{i}" for i in range(4)]
    for layer, (ids, weights) in watched.routes.items():
        assert ids.shape == weights.shape == (count, CONFIG.num_experts_per_tok)
        total = torch.full((count,), CONFIG.routed_scaling_factor)
        torch.testing.assert_close(weights.sum(-1), total)
        assert torch.equal(ids, local.routes[layer][0])
        for expert in range(CONFIG.n_routed_experts):
            _check_rows(watched, layer, expert, ids, weights, options)
    table = ORACLE("layers.0.ffn.gate.tid2eid")
    assert torch.equal(watched.routes["layers.0"][0], table[torch.cat(sequences)])
    # Only the CSA layers, and only the long sequence's blocks, leave the indexer a choice.
    assert [(layer, len(picks)) for layer, picks in watched.picks] == [
        (f"layers.{i}", n) for i in (1, 3) for n in (128, 22)
    ]
    for _, picks in watched.picks:
        assert picks.shape[1] == CONFIG.index_topk
        chosen = picks[-1]
        assert bool((chosen.diff() > 0).all())


def _check_rows(
    seen: Recorder, layer: str, expert: int, ids: Tensor, weights: Tensor, options: ForwardOptions
) -> None:
    """The hidden rows recomputed from the input rows, without the project's code."""
    token, slot = (ids == expert).nonzero(as_tuple=True)
    x = seen.inputs[layer, expert]
    assert len(x) == len(token)
    w1, w3 = (ORACLE(f"{layer}.ffn.experts.{expert}.{w}") for w in ("w1", "w3"))
    gate = (x @ w1.T).clamp(max=CONFIG.swiglu_limit)
    up = (x @ w3.T).clamp(-CONFIG.swiglu_limit, CONFIG.swiglu_limit)
    hidden = gate * torch.sigmoid(gate) * up * weights[token, slot, None]
    found = seen.hidden[layer, expert]
    if options.official:
        # E4M3 keeps three bits after the leading one; steps of the smallest are 2^-9 of the scale.
        torch.testing.assert_close(found, hidden, rtol=2**-4, atol=hidden.abs().max().item() / 2**9)
        assert not torch.equal(found, hidden)
    else:
        torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-6)


def test_logits_come_in_order_and_whole(sequences: list[Tensor]) -> None:
    models = [StreamModel(ORACLE), StreamModel(damaged)]
    final = stream_forward(models, CONFIG, sequences)
    parts = list(stream_logits(models, CONFIG, final, rows=64))
    assert [(p.sequence, p.start, p.stop) for p in parts] == [
        (0, 0, 64),
        (0, 64, 128),
        (0, 128, 150),
        (1, 0, 9),
    ]
    (whole,) = stream_logits(models, CONFIG, [final[0][1:], final[1][1:]], rows=1000)
    for model in range(2):
        torch.testing.assert_close(whole.logits[model], parts[-1].logits[model])
        assert whole.logits[model].shape == (9, CONFIG.vocab_size)


@pytest.mark.parametrize(
    "options",
    [
        ForwardOptions(stream_noise=2.0**-9, noise_seed=1),
        ForwardOptions(round_streams=True),
        ForwardOptions(matmul_dtype=torch.bfloat16),
    ],
    ids=["noise", "rounded streams", "bf16 products"],
)
def test_noise_floors_are_small_repeatable_and_not_zero(
    sequences: list[Tensor], options: ForwardOptions
) -> None:
    models = [StreamModel(ORACLE), StreamModel(ORACLE, options), StreamModel(ORACLE, options)]
    before: list[LayerResult] = []
    final = stream_forward(models, CONFIG, sequences, on_layer=before.append)
    assert torch.equal(final[1][0], final[2][0])
    first = before[0].after
    error = (first[1][0] - first[0][0]).norm() / first[0][0].norm()
    assert 1e-5 < error < 2e-2


def test_noise_has_the_stated_size_and_obeys_its_seed(sequences: list[Tensor]) -> None:
    noisy = [ForwardOptions(stream_noise=2.0**-9, noise_seed=seed) for seed in (1, 2)]
    models = [StreamModel(ORACLE), *(StreamModel(ORACLE, options) for options in noisy)]
    layers: list[LayerResult] = []
    stream_forward(models, CONFIG, sequences, on_layer=layers.append)
    clean, one, two = (streams[0] for streams in layers[0].after)
    assert ((one - clean) / clean).std().item() == pytest.approx(2.0**-9, rel=0.05)
    assert not torch.equal(one, two)


EXPERT, INDEXER = "layers.3.ffn.experts.0.w2", "layers.3.attn.indexer.weights_proj"


# An infinite router bias is missing on purpose: it is a legal way to force an expert.
@pytest.mark.parametrize(
    ("base", "value"),
    [
        (EXPERT, torch.nan),
        (EXPERT, torch.inf),
        (INDEXER, torch.nan),
        (INDEXER, torch.inf),
        ("layers.2.ffn.gate.bias", torch.nan),
    ],
)
def test_broken_weights_are_named(sequences: list[Tensor], base: str, value: float) -> None:
    def broken(name: str, /) -> Tensor:
        tensor = ORACLE(name)
        if name == base:
            tensor = tensor.clone()
            tensor.view(-1)[0] = value
        return tensor

    with pytest.raises(NonFiniteActivation, match=base[:8].replace(".", r"\.")):
        stream_forward([StreamModel(broken)], CONFIG, sequences)
