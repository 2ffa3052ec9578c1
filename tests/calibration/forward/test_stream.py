"""Several models side by side: identity, local errors, observers, noise, slices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.calibration.oracle_loader import OracleParams
from v4quant_calibration.forward.logits import stream_logits
from v4quant_calibration.forward.stream import LayerResult, OnLayer, StreamModel, stream_forward
from v4quant_calibration.model.block import layer_forward
from v4quant_calibration.model.numerics import NonFiniteActivation
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.streams import MemoryStreams, Streams, StreamShape
from v4quant_formats.model_config import load_model_config

TINY = Path(__file__).parents[2] / "data" / "tiny-a"
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


@dataclass(frozen=True)
class Kept:
    """Copies of what a callback saw, sequence by sequence."""

    layer: str
    model: int
    before: list[Tensor]
    reference: list[Tensor]
    after: list[Tensor]
    local: list[Tensor] | None


def keeper(kept: list[Kept]) -> OnLayer:
    def copy(streams: Streams) -> list[Tensor]:
        return [part.clone() for part in streams]

    def keep(result: LayerResult) -> None:
        kept.append(
            Kept(
                result.layer,
                result.model,
                copy(result.before),
                copy(result.reference),
                copy(result.after),
                None if result.local is None else copy(result.local),
            )
        )

    return keep


def test_equal_models_stay_equal_and_damage_is_local(sequences: list[Tensor]) -> None:
    results: list[Kept] = []
    steps: list[tuple[str, int, int]] = []
    models = [StreamModel(ORACLE), StreamModel(ORACLE), StreamModel(damaged)]
    final = stream_forward(
        models,
        CONFIG,
        sequences,
        local=(1, 2),
        on_layer=keeper(results),
        progress=lambda *step: steps.append(step),
    )
    # Three models, two of them also on the reference's input.
    assert steps == [(f"layers.{i // 5}", i + 1, 20) for i in range(20)]
    assert [(r.layer, r.model) for r in results] == [
        (f"layers.{i}", model) for i in range(4) for model in range(3)
    ]
    before = results[0].before
    for reference, equal, broken in zip(results[::3], results[1::3], results[2::3], strict=True):
        assert reference.local is None
        assert equal.local is not None and broken.local is not None
        for i in range(len(sequences)):
            assert torch.equal(reference.before[i], before[i])
            assert torch.equal(reference.reference[i], reference.after[i])
            assert torch.equal(reference.after[i], equal.after[i])
            assert torch.equal(equal.local[i], reference.after[i])
        same = torch.equal(broken.local[0], reference.after[0])
        assert same == (reference.layer != "layers.1")
        before = reference.after
    assert not torch.equal(final[2][0], final[0][0])
    assert torch.equal(results[-1].after[1], final[2][1])


def test_one_layer_alone_equals_the_layer_in_the_stream(sequences: list[Tensor]) -> None:
    results: list[Kept] = []
    stream_forward([StreamModel(ORACLE)], CONFIG, sequences, on_layer=keeper(results))
    given = results[2]
    lengths = tuple(map(len, sequences))
    row = (CONFIG.hc_mult, CONFIG.hidden_size)
    shape = StreamShape(lengths, row, torch.float32, torch.device("cpu"))
    before, after = MemoryStreams(shape), MemoryStreams(shape)
    before.write(0, torch.cat(given.before))
    ids = torch.cat(sequences)
    layer_forward(ORACLE, CONFIG, "layers.2", before, after, ids, ForwardOptions())
    for i, part in enumerate(after):
        assert torch.equal(part, given.after[i])
        assert torch.equal(before[i], given.before[i]), "the input was changed"
    layer_forward(ORACLE, CONFIG, "layers.2", before, before, ids, ForwardOptions())
    assert torch.equal(before.read(0, sum(lengths)), after.read(0, sum(lengths)))


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
    (whole,) = stream_logits(models, CONFIG, final, rows=1000)
    assert (whole.start, whole.stop, whole.first, whole.last) == (0, 159, 0, CONFIG.vocab_size)
    found = [torch.full((159, CONFIG.vocab_size), torch.nan) for _ in models]
    places = []
    for tile in stream_logits(models, CONFIG, final, rows=64, columns=100):
        places.append((tile.start, tile.first))
        for rows, logits in zip(found, tile.logits, strict=True):
            rows[tile.start : tile.stop, tile.first : tile.last] = logits
    assert places == sorted(places) and len(places) == 3 * -(-CONFIG.vocab_size // 100)
    for rows, logits in zip(found, whole.logits, strict=True):
        torch.testing.assert_close(rows, logits)


@pytest.mark.parametrize(
    "options",
    [
        ForwardOptions(round_streams=True),
        ForwardOptions(matmul_dtype=torch.bfloat16),
    ],
    ids=["rounded streams", "bf16 products"],
)
def test_noise_floors_are_small_repeatable_and_not_zero(
    sequences: list[Tensor], options: ForwardOptions
) -> None:
    models = [StreamModel(ORACLE), StreamModel(ORACLE, options), StreamModel(ORACLE, options)]
    kept: list[Kept] = []
    final = stream_forward(models, CONFIG, sequences, on_layer=keeper(kept))
    assert torch.equal(final[1][0], final[2][0])
    clean, other = kept[0].after[0], kept[1].after[0]
    assert 1e-5 < (other - clean).norm() / clean.norm() < 2e-2


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
