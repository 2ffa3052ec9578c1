"""Statistics files: what they answer, and that damaged or foreign ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from v4quant_calibration.statistics.stats import (
    StageStats,
    Stats,
    StatsError,
    load_stats,
    merge_stats,
    write_stats,
)


def make(rng: torch.Generator, floor: int = 10) -> Stats:
    tokens = torch.tensor([100, 3, 0, 50])
    sums = {
        s: torch.rand(4, k, generator=rng, dtype=torch.float64) * tokens[:, None]
        for s, k in (("w13", 64), ("w2", 32))
    }
    amax = {s: torch.rand(4, generator=rng) for s in sums}
    amax["w2"][2] = 0
    return Stats("digest", floor, {"layers.1": StageStats(tokens, sums, amax)})


def test_importance_is_the_second_moment(generator: torch.Generator) -> None:
    stats = make(generator)
    stage = stats.stages["layers.1"]
    for projection, source in (("w1", "w13"), ("w3", "w13"), ("w2", "w2")):
        own = stats.importance(f"layers.1.ffn.experts.0.{projection}")
        assert own is not None and torch.equal(own, stage.sums[source][0] / 100)
        pool = stage.sums[source].sum(0) / 153
        for starved, count in ((1, 3), (2, 0)):
            mixed = stats.importance(f"layers.1.ffn.experts.{starved}.{projection}")
            assert mixed is not None
            mean = stage.sums[source][starved] / max(count, 1)
            assert torch.allclose(mixed, count / 10 * mean + (1 - count / 10) * pool)
    assert stats.starved() == [("layers.1", 1, 3), ("layers.1", 2, 0)]


def test_amax_falls_back_to_the_layer(generator: torch.Generator) -> None:
    stats = make(generator)
    amax = stats.stages["layers.1"].amax["w2"]
    assert stats.input_amax("layers.1.ffn.experts.3.w2") == float(amax[3])
    assert stats.input_amax("layers.1.ffn.experts.1.w2") == float(amax.max())


def test_modules_without_statistics(generator: torch.Generator) -> None:
    stats = make(generator)
    for module in ("layers.2.ffn.experts.0.w1", "layers.1.ffn.shared_experts.w1", "norm", "x"):
        assert stats.importance(module) is None and stats.input_amax(module) is None
    with pytest.raises(StatsError, match=r"layers\.1.*4 experts.*calibrate again"):
        stats.importance("layers.1.ffn.experts.4.w1")
    zero = StageStats(
        torch.zeros(2, dtype=torch.int64),
        {"w13": torch.zeros(2, 4).double(), "w2": torch.zeros(2, 4).double()},
        {"w13": torch.zeros(2), "w2": torch.zeros(2)},
    )
    nobody = Stats("digest", 1, {"layers.0": zero})
    assert nobody.importance("layers.0.ffn.experts.0.w1") is None
    assert nobody.input_amax("layers.0.ffn.experts.0.w1") is None


def test_file_round_trip(tmp_path: Path, generator: torch.Generator) -> None:
    stats = make(generator)
    path, again = tmp_path / "stats.v4q", tmp_path / "again.v4q"
    write_stats(path, stats)
    write_stats(again, stats)
    data = path.read_bytes()
    assert data == again.read_bytes()
    back = load_stats(path, "digest")
    assert (back.source_digest, back.floor, set(back.stages)) == ("digest", 10, {"layers.1"})
    a, b = stats.stages["layers.1"], back.stages["layers.1"]
    assert torch.equal(a.tokens, b.tokens)
    for source in ("w13", "w2"):
        assert torch.equal(a.sums[source], b.sums[source])
        assert torch.equal(a.amax[source], b.amax[source])
    with pytest.raises(StatsError, match=r"another checkpoint \(digest digest, this one is other"):
        load_stats(path, "other")


def test_first_draw_is_kept(tmp_path: Path, generator: torch.Generator) -> None:
    stats = make(generator)
    first = {"layers.1": torch.tensor([60, 3, 0, 50])}
    path = tmp_path / "stats.v4q"
    write_stats(path, replace(stats, first=first))
    assert torch.equal(load_stats(path, "digest").first["layers.1"], first["layers.1"])
    write_stats(path, stats)
    assert load_stats(path, "digest").first == {}


def test_ranks_merge_to_the_whole(generator: torch.Generator) -> None:
    parts = [make(generator) for _ in range(3)]
    merged = merge_stats(parts).stages["layers.1"]
    assert merged.tokens.tolist() == [300, 9, 0, 150]
    for source in ("w13", "w2"):
        total = sum(p.stages["layers.1"].sums[source] for p in parts)
        largest = torch.stack([p.stages["layers.1"].amax[source] for p in parts]).amax(0)
        assert torch.equal(merged.sums[source], total)
        assert torch.equal(merged.amax[source], largest)
    with pytest.raises(StatsError, match="cannot be merged"):
        merge_stats([parts[0], replace(parts[1], floor=11)])
    with pytest.raises(StatsError, match="cannot be merged"):
        merge_stats([parts[0], replace(parts[1], source_digest="other")])


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda t, h: h.update(version=1),
        lambda t, h: t.update({"layers.1.first_tokens": torch.tensor([101, 0, 0, 0])}),
        lambda t, h: t.update({"layers.1.first_tokens": torch.tensor([-1, 0, 0, 0])}),
        lambda t, h: t.update({"layers.1.first_tokens": torch.tensor([1, 0])}),
        lambda t, h: h.pop("floor"),
        lambda t, h: h.update(floor=0),
        lambda t, h: h.update(floor="10"),
        lambda t, h: h.update(stages=["layers.7"]),
        lambda t, h: h.update(stages=3),
        lambda t, h: h.pop("source_digest"),
        lambda t, h: h.update(source_digest=5),
        lambda t, h: t.pop("layers.1.w2.amax"),
        lambda t, h: t.update({"layers.1.tokens": torch.tensor([1.0, 2.0, 3.0, 4.0])}),
        lambda t, h: t.update({"layers.1.tokens": torch.tensor([-1, 2, 3, 4])}),
        lambda t, h: t.update({"layers.1.tokens": torch.tensor(4)}),
        lambda t, h: t.update({"layers.1.tokens": torch.tensor([1, 2])}),
        lambda t, h: t["layers.1.w2.amax"].fill_(float("nan")),
        lambda t, h: t["layers.1.w13.sum_of_squares"].fill_(float("inf")),
        lambda t, h: t["layers.1.w13.sum_of_squares"].fill_(-1.0),
        lambda t, h: t.update({"layers.1.w2.sum_of_squares": torch.zeros(4)}),
        lambda t, h: t.update({"layers.1.w2.sum_of_squares": torch.zeros(4, 8).long()}),
    ],
)
def test_damaged_files(change: Change, tmp_path: Path, generator: torch.Generator) -> None:
    stage = make(generator).stages["layers.1"]
    tensors = {"layers.1.tokens": stage.tokens}
    for source in ("w13", "w2"):
        tensors[f"layers.1.{source}.sum_of_squares"] = stage.sums[source]
        tensors[f"layers.1.{source}.amax"] = stage.amax[source]
    header: dict[str, Any] = {
        "version": 2, "source_digest": "digest", "floor": 10, "stages": ["layers.1"],
    }  # fmt: skip
    path = tmp_path / "stats.v4q"

    def write() -> None:
        save_file(tensors, path, metadata={"v4quant_stats": json.dumps(header)})

    write()
    load_stats(path, "digest")
    change(tensors, header)
    write()
    with pytest.raises(StatsError, match=r"stats\.v4q"):
        load_stats(path, "digest")


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04", bytes(64)])
def test_files_of_another_kind(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stats.v4q"
    path.write_bytes(content)
    with pytest.raises(StatsError, match=r"stats\.v4q"):
        load_stats(path, "digest")
    with pytest.raises(StatsError, match=r"absent\.v4q"):
        load_stats(tmp_path / "absent.v4q", "digest")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(StatsError, match="not a v4quant statistics file"):
        load_stats(path, "digest")
