"""The whole way of a V4.1 through GGUF: a measured recipe, files, evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import v4quant
from tests.support.synthetic import Request, write_checkpoint
from v4quant_calibration.evaluation.kl_sensitivity import Altered
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.model.params import gather_rows
from v4quant_formats.opening import open_checkpoint

SIZES = {
    "num_hidden_layers": 3,
    "n_routed_experts": 2,
    "dspark_n_routed_experts": 2,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v41") / "source"
    write_checkpoint(folder, Request("v41", overrides=tuple(SIZES.items())))
    return folder


def test_allocated_within_a_budget_and_evaluated(source: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(7).integers(3, 400, (1, 60)))
    text = {"corpus": ids, "tokens": 60, "seq_len": 60}
    recipe = tmp_path / "recipe.toml"
    found = v4quant.allocate(source, recipe, bpw=12.4, measure_kl=True, **text)  # type: ignore[arg-type]
    facts = found.as_dict()
    assert facts["smallest"] <= facts["bytes"] <= facts["budget"] and facts["loss_is_measured"]
    assert facts["loss"] > 0
    v4quant.quantize(source, tmp_path / "out", recipe=recipe, workers=1)
    result = v4quant.evaluate(tmp_path / "out", reference=source, weights=False, **text)  # type: ignore[arg-type]
    told = result.as_dict()
    assert 0 < told["kl_mean"] < 1e-2
    assert max(row["local_relative_error"] for row in told["layers"]) > 1e-3


def test_what_alters_a_table_alters_the_rows_that_are_looked_up(source: Path) -> None:
    """Effects of coarser tables can be measured without ever reading one."""
    with open_checkpoint(source) as checkpoint:
        params = CheckpointParams(checkpoint)

        def halve(base: str, value: torch.Tensor) -> torch.Tensor:
            assert value.shape[0] < 10, "a whole table was read"
            return value / 2 if base.endswith("engram.embed") else value

        rows, table = torch.tensor([9, 3, 9]), "layers.1.engram.embed"
        halved = gather_rows(Altered(params, halve), table, rows)
        assert torch.equal(halved, gather_rows(params, table, rows) / 2)
