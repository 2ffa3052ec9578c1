"""`calibrate --max-memory`: the same statistics in pieces, and a peak measured from outside."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.conversion import TINY
from tests.support.peak import peak_of
from tests.support.synthetic import Request, write_checkpoint
from v4quant.calibration.collect import DrawnCorpus, calibrate_to
from v4quant.calibration.memory import (
    KeptRounds,
    calibration_room,
    fit_solving,
    statistics_bytes,
)
from v4quant.memory import Limits
from v4quant.sizes import SizeError
from v4quant_calibration.forward.kept import KeptStore
from v4quant_calibration.forward.scratch import PREFIX, Scratch
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solve import SolveTarget
from v4quant_calibration.statistics.collect import (
    Calibration,
    OpenRoom,
    Room,
    all_in_memory,
    calibrate,
)
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import get_scheme

CONFIG = load_model_config(TINY)
GIB = 2**30


def measure(open_room: OpenRoom, windows: list[Tensor], reserve: list[Tensor]) -> Calibration:
    with open_checkpoint(TINY) as checkpoint:
        return calibrate(
            checkpoint, CONFIG, windows, ForwardOptions(), 60, SilentProgress(), reserve, open_room
        )


def test_pieces_and_files_change_nothing(tmp_path: Path, generator: torch.Generator) -> None:
    """Experts in several passes, demand learned from parts, streams in files."""
    ids = [torch.randint(CONFIG.vocab_size, (17,), generator=generator) for _ in range(14)]

    @contextmanager
    def in_pieces(windows: Sequence[Tensor], options: ForwardOptions) -> Iterator[Room]:
        with Scratch(tmp_path, "ab" * 12, resumes=False) as scratch:
            yield Room(replace(options, expert_tokens=23, row_chunk=128, query_chunk=16), scratch)

    whole = measure(all_in_memory, ids[:4], ids[4:])
    parts = measure(in_pieces, ids[:4], ids[4:])
    assert len(whole.windows) > 4, "more text should have been drawn"
    assert [w.tolist() for w in whole.windows] == [w.tolist() for w in parts.windows]
    for name, stage in whole.stats.stages.items():
        other = parts.stats.stages[name]
        assert torch.equal(stage.tokens, other.tokens), name
        for source in ("w13", "w2"):
            torch.testing.assert_close(stage.sums[source], other.sums[source], rtol=1e-4, atol=1e-6)


def test_rounds_leave_no_files(tmp_path: Path) -> None:
    windows = [torch.zeros(5000, dtype=torch.int64)] * 40
    held = statistics_bytes(CONFIG, 5)
    kept = KeptRounds(tmp_path / "stats.v4q", "ab")
    room = partial(
        calibration_room, CONFIG, held, Limits(600 * 2**20), tmp_path / "stats.v4q", kept
    )
    with room(windows, ForwardOptions()) as opened:
        assert isinstance(opened.store, KeptStore)
        assert list(tmp_path.glob(f"{PREFIX}*"))
        assert opened.options.expert_tokens is not None
    assert not list(tmp_path.iterdir())
    with pytest.raises(SizeError, match="this run needs"):
        calibration_room(
            CONFIG, held, Limits(10**6), tmp_path, kept, windows, ForwardOptions()
        ).__enter__()


def test_solving_gets_what_is_left(tmp_path: Path) -> None:
    windows = [torch.zeros(500, dtype=torch.int64)] * 8
    targets = [SolveTarget(SolveSettings(get_scheme("int4-g32")), tmp_path / "a")]

    def memory(cap: Limits, more: Sequence[SolveTarget] = ()) -> int:
        fitted, room = fit_solving(CONFIG, [*targets, *more], 10**6, windows, cap, tmp_path)
        with room(windows, ForwardOptions()) as opened:
            assert opened.options.expert_tokens is None
        assert len({one.settings.memory for one in fitted}) == 1
        return fitted[0].settings.memory

    few = memory(Limits(GIB))
    assert memory(Limits(2 * GIB)) - few == GIB and few < GIB
    other = SolveTarget(SolveSettings(get_scheme("int3-g128")), tmp_path / "b")
    streams = 4 * CONFIG.hc_mult * CONFIG.hidden_size * 4000
    assert streams < few - memory(Limits(GIB), [other]) < 8 * streams + 10**7
    with pytest.raises(SizeError, match="this run needs"):
        fit_solving(CONFIG, targets, 10**6, windows * 1000, Limits(GIB), tmp_path)
    free, _ = fit_solving(CONFIG, targets, 10**6, windows * 1000, Limits(), tmp_path)
    assert free == targets
    assert 20 * GIB < memory(Limits(None, 24 * GIB)) < 24 * GIB


def test_solving_under_a_cap(tmp_path: Path, generator: torch.Generator) -> None:
    ids = [torch.randint(CONFIG.vocab_size, (17,), generator=generator) for _ in range(4)]
    settings = SolveSettings(get_scheme("int4-g32"), sweeps=1)
    with open_checkpoint(TINY) as checkpoint:
        found = calibrate_to(
            checkpoint, CONFIG, DrawnCorpus(ids, []), ForwardOptions(), 4, settings,
            tmp_path / "solved", SilentProgress(), GIB,
        )  # fmt: skip
    assert int(found.stats.stages["layers.1"].tokens.sum()) == 68 * CONFIG.num_experts_per_tok
    assert [p.name for p in tmp_path.iterdir()] == ["solved"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a child")
def test_peak_stays_below_the_cap(tmp_path: Path) -> None:
    """Streams alone are more than the cap leaves room for."""
    sizes = {"hidden_size": 1024, "vocab_size": 512, "n_routed_experts": 2}
    folder = tmp_path / "wide"
    request = Request("flash", overrides=tuple({**sizes, "num_hidden_layers": 1}.items()))
    write_checkpoint(folder, request)
    np.save(tmp_path / "ids.npy", np.random.default_rng().integers(0, 512, (8, 500)))
    base = [sys.executable, "-m", "v4quant", "calibrate", str(folder), "--json"]
    base += ["--corpus", str(tmp_path / "ids.npy"), "--out"]
    free, result = peak_of([*base, str(tmp_path / "free")], tmp_path)
    capped, again = peak_of([*base, str(tmp_path / "capped"), "--max-memory", "500MB"], tmp_path)
    print(f"peak {free / 1e6:.0f} MB without a cap, {capped / 1e6:.0f} MB with one")
    assert capped < 500e6 < free
    assert result["layers"] == again["layers"]
