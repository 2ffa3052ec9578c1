"""The forward pass against stored results of an independent implementation (tests/data/tiny-a).

`plain` has to agree to float rounding. In `official` mode a value on the border between two FP8
codes may fall on either side, and once one has, a later choice of experts or entries can differ;
so each layer is compared on the reference's own input, and the whole run by its distributions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.calibration.oracle_loader import OracleParams
from v4quant_calibration.forward.logits import mtp_logits, stream_logits
from v4quant_calibration.forward.stream import (
    LayerResult,
    StreamModel,
    stream_forward,
)
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense

DATA = Path(__file__).parents[2] / "data"
TINY = DATA / "tiny-a"


@dataclass(frozen=True)
class Run:
    """Everything the stored results can be compared with."""

    streams: list[Tensor]
    logits: Tensor
    mtp_logits: Tensor


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(DATA / "tiny-a.reference.safetensors")


@pytest.fixture(scope="module")
def params() -> OracleParams:
    return OracleParams(TINY)


def run(params: OracleParams, ids: Tensor, options: ForwardOptions) -> Run:
    config = load_model_config(TINY)
    models = [StreamModel(params, options)]
    streams: list[Tensor] = []

    def keep(result: LayerResult) -> None:
        if not streams:
            streams.append(result.before[0].clone())
        streams.append(result.after[0].clone())

    final = stream_forward(models, config, [ids], on_layer=keep)
    logits = [part.logits[0] for part in stream_logits(models, config, final, rows=100)]
    drafted = [part.logits[0] for part in mtp_logits(models, config, [ids], final)]
    return Run(streams, torch.cat(logits), torch.cat(drafted))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) of each row, nats, in float64."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_plain_agrees_to_float_rounding(params: OracleParams, reference: dict[str, Tensor]) -> None:
    found = run(params, reference["input_ids"][0], ForwardOptions())
    expected = reference["streams_plain"]
    assert len(found.streams) == expected.shape[0]
    errors = [relative(f, e) for f, e in zip(found.streams, expected, strict=True)]
    print("streams", errors)
    assert errors[0] == 0
    assert max(errors) < 1e-4
    assert relative(found.logits, reference["logits_plain"]) < 1e-4
    assert relative(found.mtp_logits, reference["mtp_logits_plain"]) < 1e-4


@dataclass(frozen=True)
class Layerwise:
    """Every layer behind the reference's streams, so that a flip stays in its layer."""

    agreeing: list[float]
    """The share of tokens whose stream behind the layer is the reference's to float rounding."""
    draft: Tensor


def run_layerwise(
    params: OracleParams, reference: dict[str, Tensor], options: ForwardOptions
) -> Layerwise:
    config = load_model_config(TINY)
    models = [StreamModel(params, options)]
    ids, expected = reference["input_ids"][0], reference["streams_fakequant"]
    agreeing: list[float] = []

    def replace(result: LayerResult) -> None:
        found, wanted = result.after[0], expected[len(agreeing) + 1]
        errors = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        agreeing.append((errors < 1e-5).double().mean().item())
        found.copy_(wanted)

    final = stream_forward(models, config, [ids], on_layer=replace)
    drafted = [part.logits[0] for part in mtp_logits(models, config, [ids], final)]
    print("agreeing", agreeing)
    return Layerwise(agreeing, divergence(reference["mtp_logits_fakequant"], torch.cat(drafted)))


def test_official_agrees_layer_by_layer(params: OracleParams, reference: dict[str, Tensor]) -> None:
    """Sums in another order flip single codes, and which ones differs from processor to processor:
    one to four tokens of these 280 in a layer. All others agree to float rounding.
    """
    found = run_layerwise(params, reference, ForwardOptions(activations="official"))
    assert len(found.agreeing) == 4 and min(found.agreeing) > 0.97
    assert found.draft.median() < 1e-10


def test_official_agrees_in_distribution(
    params: OracleParams, reference: dict[str, Tensor]
) -> None:
    """Through all layers a flip reaches every later token, so the tail is wide."""
    found = run(params, reference["input_ids"][0], ForwardOptions(activations="official"))
    trunk = divergence(reference["logits_fakequant"], found.logits)
    print(f"KL nats: trunk mean {trunk.mean():.2e} median {trunk.median():.2e}")
    assert trunk.median() < 2e-3 and trunk.mean() < 2e-2


@pytest.mark.parametrize(
    "options",
    [ForwardOptions(), ForwardOptions(activations="official", kv_rounding=False)],
    ids=["no rounding", "no KV rounding"],
)
def test_official_comparison_can_fail(
    params: OracleParams, reference: dict[str, Tensor], options: ForwardOptions
) -> None:
    """Leaving out (part of) the rounding is visible in the measure used above."""
    assert max(run_layerwise(params, reference, options).agreeing) == 0


def test_project_reader_gives_the_same_weights(params: OracleParams) -> None:
    with open_checkpoint(TINY) as checkpoint:
        bases = {name.removesuffix(".weight").removesuffix(".scale") for name in checkpoint.tensors}
        assert len(bases) > 100
        for base in sorted(bases):
            assert torch.equal(read_dense(checkpoint, base), params(base)), base


def test_swapped_projections_are_seen(params: OracleParams, reference: dict[str, Tensor]) -> None:
    """A planted fault (w1 and w3 of one expert exchanged) breaks the plain agreement."""
    swap = {"layers.2.ffn.experts.1.w1": "w3", "layers.2.ffn.experts.1.w3": "w1"}

    def faulty(base: str, /) -> Tensor:
        return params(base[:-2] + swap[base] if base in swap else base)

    config = load_model_config(TINY)
    models = [StreamModel(faulty)]
    final = stream_forward(models, config, [reference["input_ids"][0]])
    logits = torch.cat([part.logits[0] for part in stream_logits(models, config, final)])
    assert relative(logits, reference["logits_plain"]) > 1e-3
