"""How often text uses the rows of V4.1's tables: against the reference's hashes, and on file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.statistics.stats import (
    Stats,
    StatsError,
    load_stats,
    merge_stats,
    write_stats,
)
from v4quant_calibration.statistics.table_use import RowUse, merged_use, table_use
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.opening import open_checkpoint

DATA = Path(__file__).parents[2] / "data"


def test_rows_are_those_of_the_reference() -> None:
    with safe_open(DATA / "v41-tiny.reference.safetensors", framework="pt") as file:
        ids, rows = file.get_tensor("input_ids")[0], file.get_tensor("engram_hash_ids")
    with open_checkpoint(DATA / "v41-tiny") as checkpoint:
        config = parse_model_config(dict(checkpoint.config))
        found = table_use(CheckpointParams(checkpoint), config, [ids])
    assert list(found) == ["layers.1.engram.embed", "layers.4.engram.embed"]
    rows = rows.reshape(len(ids), 2, -1)
    for number, use in enumerate(found.values()):
        kinds, counts = np.unique(rows[:, number].numpy(), return_counts=True)
        assert np.array_equal(use.rows.numpy(), kinds)
        assert np.array_equal(use.counts.numpy(), counts)


def use(pairs: dict[int, int]) -> RowUse:
    return RowUse(torch.tensor(list(pairs)), torch.tensor(list(pairs.values())))


def test_texts_are_added_and_pieces_cut() -> None:
    both = merged_use([use({1: 2, 5: 1}), use({0: 7, 5: 4, 9: 1})])
    assert dict(zip(both.rows.tolist(), both.counts.tolist(), strict=True)) == {
        0: 7, 1: 2, 5: 5, 9: 1
    }  # fmt: skip
    rows, counts = both.between(1, 9)
    assert rows.tolist() == [0, 4] and counts.tolist() == [2, 5]
    assert both.between(6, 8)[0].numel() == 0


def test_the_file_keeps_them(tmp_path: Path) -> None:
    stats = Stats("d", 1, {}, tables={"layers.1.engram.embed": use({3: 2, 4: 1})})
    write_stats(tmp_path / "a", stats)
    again = load_stats(tmp_path / "a", "d").tables["layers.1.engram.embed"]
    assert again.rows.tolist() == [3, 4] and again.counts.tolist() == [2, 1]
    both = merge_stats([stats, stats]).tables["layers.1.engram.embed"]
    assert both.counts.tolist() == [4, 2]
    write_stats(tmp_path / "none", replace(stats, tables={}))
    assert load_stats(tmp_path / "none", "d").tables == {}


@pytest.mark.parametrize(
    ("rows", "counts", "message"),
    [
        ([4, 3], [1, 1], "ascending"),
        ([-1, 3], [1, 1], "ascending"),
        ([3, 4], [1, 0], "impossible counts"),
        ([3, 4], [1], "ascending"),
        ([3.0], [1], "ascending"),
    ],
)
def test_damaged_counts_are_refused(
    rows: list[float], counts: list[int], message: str, tmp_path: Path
) -> None:
    bad = RowUse(torch.tensor(rows), torch.tensor(counts))
    write_stats(tmp_path / "a", Stats("d", 1, {}, tables={"layers.1.engram.embed": bad}))
    with pytest.raises(StatsError, match=message):
        load_stats(tmp_path / "a", "d")
