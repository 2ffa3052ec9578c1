"""What must not change the result: batching, query blocks, the way chosen entries are read.

Run in float64 (the arithmetic follows the provider's dtype), where two orders of summation agree
to 1e-10 and no near-tie of the router or the indexer can hide or fake a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.calibration.oracle_loader import OracleParams
from v4quant_calibration.forward.drafts import stream_mtp
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model import attention as attention_module
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import TOKEN_MAP
from v4quant_formats.model_config import ModelConfig, load_model_config

DATA = Path(__file__).parents[2] / "data"


@dataclass(frozen=True)
class Model:
    """A tiny model, V4 or V4.1, read by a reader of its own."""

    config: ModelConfig
    oracle: OracleParams

    def double(self, base: str, /) -> Tensor:
        value = self.oracle(base)
        return value.double() if value.is_floating_point() else value

    def random_ids(self, generator: torch.Generator, *lengths: int) -> list[Tensor]:
        # Below V4.1's image and noise tokens.
        largest = min(self.config.vocab_size, 500)
        return [torch.randint(0, largest, (n,), generator=generator) for n in lengths]

    def trunk(self, sequences: list[Tensor], **options: Any) -> list[Tensor]:
        """Final streams of every sequence, and those of a classic MTP stage."""
        models = [StreamModel(self.double, ForwardOptions(**options))]
        final = stream_forward(models, self.config, sequences)
        if self.config.v41 is not None:
            return list(final[0])
        return [*final[0], *stream_mtp(models, self.config, sequences, final)[0]]


@pytest.fixture(scope="module", params=["tiny-a", "v41-tiny"])
def model(request: pytest.FixtureRequest) -> Model:
    config = load_model_config(DATA / request.param)
    made = {}
    if config.v41 is not None:
        reference = load_file(DATA / "v41-tiny.reference.safetensors")
        made = {TOKEN_MAP: reference["engram_token_map"]}
    return Model(config, OracleParams(DATA / request.param, made))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 33, 129])
def test_official_mode_takes_any_length(
    length: int, model: Model, generator: torch.Generator
) -> None:
    """Rounding makes results near-discontinuous, so only the first layer is compared closely."""
    options = ForwardOptions(activations="official")
    ids = model.random_ids(generator, length)
    first: list[Tensor] = []
    for given in (ids, [torch.cat([ids[0], ids[0]])]):
        stream_forward(
            [StreamModel(model.oracle, options)],
            model.config,
            given,
            on_layer=lambda result: first.append(result.after[0].clone()),
        )
    alone, prefix = first[0], first[model.config.num_hidden_layers][:length]
    assert (alone - prefix).norm() < 1e-2 * alone.norm()


def test_batch_of_unequal_lengths_equals_separate_runs(
    model: Model, generator: torch.Generator
) -> None:
    sequences = model.random_ids(generator, 1, 3, 4, 128, 131, 301)
    together = model.trunk(sequences)
    for i, ids in enumerate(sequences):
        for stage, alone in enumerate(model.trunk([ids])):
            found = together[i + stage * len(sequences)]
            torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("query_chunk", [1, 7, 100, 1000])
def test_query_blocks_do_not_change_the_result(
    query_chunk: int, model: Model, generator: torch.Generator
) -> None:
    sequences = model.random_ids(generator, 261)
    for found, expected in zip(
        model.trunk(sequences, query_chunk=query_chunk), model.trunk(sequences), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_gathered_and_dense_entries_agree(
    monkeypatch: pytest.MonkeyPatch, model: Model, generator: torch.Generator
) -> None:
    sequences = model.random_ids(generator, 200)
    results = []
    for factor in (0, 10**6):
        monkeypatch.setattr(attention_module, "DENSE_FACTOR", factor)
        results.append(model.trunk(sequences, query_chunk=50))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_a_prefix_does_not_see_what_follows(model: Model, generator: torch.Generator) -> None:
    (ids,) = model.random_ids(generator, 270)
    whole = model.trunk([ids])[0]
    for length in (1, 31, 130, 259):
        torch.testing.assert_close(
            model.trunk([ids[:length]])[0], whole[:length], rtol=1e-9, atol=1e-10
        )


def test_attention_holds_nothing_square(
    monkeypatch: pytest.MonkeyPatch, model: Model, generator: torch.Generator
) -> None:
    """The largest score matrix grows with the query block and S / ratio, never with S * S."""
    sizes: list[int] = []
    genuine = attention_module.attend

    def watch(queries: Tensor, keys: Tensor, *rest: object) -> Tensor:
        sizes.append(queries.shape[0] * keys.shape[0])
        return genuine(queries, keys, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_module, "attend", watch)
    models = [StreamModel(model.oracle, ForwardOptions(query_chunk=64))]
    stream_forward(models, model.config, model.random_ids(generator, 1000))
    reach = 64 + model.config.sliding_window - 1
    dense = attention_module.DENSE_FACTOR * model.config.index_topk
    assert max(sizes) <= 64 * (reach + max(dense, 1000 // 128))


@pytest.mark.parametrize(("row_chunk", "expert_tokens"), [(128, None), (256, 1), (4096, 37)])
def test_pieces_do_not_change_the_result(
    row_chunk: int, expert_tokens: int | None, model: Model, generator: torch.Generator
) -> None:
    sequences = model.random_ids(generator, 5, 300, 129)
    if expert_tokens == 1:
        sequences = [ids[:6] for ids in sequences]
    found = model.trunk(sequences, row_chunk=row_chunk, expert_tokens=expert_tokens)
    for part, expected in zip(found, model.trunk(sequences), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-10)
