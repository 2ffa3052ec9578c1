"""Coverage: more text is drawn for starved experts, and the text that feeds them first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from v4quant.calibration.collect import DrawnCorpus, check_floor, draw_corpus
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.corpus.errors import CorpusError
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.statistics.collect import Calibration, calibrate
from v4quant_calibration.statistics.coverage import Demand, next_round, spread
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

TINY = Path(__file__).parents[2] / "data" / "tiny-a"
CONFIG = load_model_config(TINY)


def run(windows: list[Tensor], reserve: list[Tensor], floor: int) -> Calibration:
    with open_checkpoint(TINY) as checkpoint:
        return calibrate(
            checkpoint, CONFIG, windows, ForwardOptions(), floor, SilentProgress(), reserve
        )


def table() -> Tensor:
    with open_checkpoint(TINY) as checkpoint:
        return CheckpointParams(checkpoint)("layers.0.ffn.gate.tid2eid")


def windows_for(experts: Tensor, wanted: bool, count: int, rng: torch.Generator) -> list[Tensor]:
    """Windows of ids that all visit expert 3 of the hash layer, or that all do not."""
    visits = (experts == 3).any(1)
    ids = (visits if wanted else ~visits).nonzero().squeeze(1)
    return [ids[torch.randint(len(ids), (16,), generator=rng)] for _ in range(count)]


def test_hash_layer_draws_the_ids_it_needs(generator: torch.Generator) -> None:
    experts = table()
    start = windows_for(experts, False, 8, generator)
    useless = windows_for(experts, False, 20, generator)
    useful = windows_for(experts, True, 2, generator)
    reserve = [*useless[:10], useful[0], *useless[10:], useful[1]]
    found = run(start, reserve, floor=8)
    assert int(found.stats.first["layers.0"][3]) == 0
    assert int(found.stats.stages["layers.0"].tokens[3]) >= 8
    drawn = {tuple(ids.tolist()) for ids in found.windows[8:12]}
    assert {tuple(ids.tolist()) for ids in useful} & drawn


def test_drawing_ends_with_the_floor_or_the_text(generator: torch.Generator) -> None:
    ids = [torch.randint(CONFIG.vocab_size, (16,), generator=generator) for _ in range(12)]
    enough = run(ids[:6], ids[6:], floor=1)
    total = sum(len(w) for w in enough.windows)
    counts = torch.cat([s.tokens for s in enough.stats.stages.values()])
    assert int(counts.min()) >= 1 or len(enough.windows) == 12
    assert int(enough.stats.stages["layers.1"].tokens.sum()) == total * CONFIG.num_experts_per_tok
    never = run(ids[:2], ids[2:], floor=10**6)
    assert len(never.windows) == 12 and len(never.stats.starved()) == len(counts)
    assert bool((never.stats.first["layers.1"] <= never.stats.stages["layers.1"].tokens).all())


def test_rounds_add_up_to_one_pass(generator: torch.Generator) -> None:
    ids = [torch.randint(CONFIG.vocab_size, (16,), generator=generator) for _ in range(6)]
    drawn = run(ids[:2], ids[2:], floor=10**6)
    whole = run(drawn.windows, [], floor=10**6)
    for name, stage in whole.stats.stages.items():
        other = drawn.stats.stages[name]
        assert torch.equal(stage.tokens, other.tokens)
        for source in ("w13", "w2"):
            torch.testing.assert_close(stage.sums[source], other.sums[source], rtol=1e-4, atol=1e-6)


def test_scores_tell_which_ids_come_close(generator: torch.Generator) -> None:
    """Rows just below an expert's threshold want their ids more than rows far below."""
    with open_checkpoint(TINY) as checkpoint:
        params = CheckpointParams(checkpoint)
        layer = f"layers.{CONFIG.num_hidden_layers - 1}"
        demand = Demand(CONFIG, params, floor=4)
        gate = params(f"{layer}.ffn.gate")
        demand.begin([torch.tensor([5, 6])])
        rows = torch.stack((gate[2] * 0.2, -gate[2]))
        demand.learn(layer, rows, torch.tensor([9, 9, 0, 9]))
    assert float(demand.wanted[5]) > float(demand.wanted[6]) > 0
    unseen = float(demand.wanted[7])
    assert float(demand.wanted[6]) < unseen < float(demand.wanted[5])


def test_next_round_prefers_gain() -> None:
    wanted = torch.tensor([0.0, 1.0, 0.0]).double()
    reserve = [torch.tensor(w) for w in ([0, 0], [1, 1], [0, 1], [2, 2])]
    assert next_round(reserve, 4, wanted) == [1, 2]
    assert next_round(reserve, 1, wanted) == [1]
    assert next_round(reserve, 100, wanted) == [0, 1, 2, 3]


def test_spread() -> None:
    assert spread(torch.tensor([5, 1, 9, 3, 7])) == {
        "min": 1, "q1": 3, "median": 5, "q3": 7, "max": 9,
    }  # fmt: skip


def test_corpus_is_cut_in_two() -> None:
    windows = [torch.tensor([i, i + 1]) for i in range(6)]

    def load(tokens: int | None) -> Corpus:
        return Corpus([CorpusPart("a", windows if tokens is None else windows[::3])])

    cut = draw_corpus(load, 4)
    assert [w.tolist() for w in cut.windows] == [[0, 1], [3, 4]]
    assert [w.tolist() for w in cut.reserve] == [[1, 2], [2, 3], [4, 5], [5, 6]]
    assert draw_corpus(load, None).reserve == []


def test_a_corpus_too_small_for_the_floor() -> None:
    corpus = DrawnCorpus([torch.zeros(16, dtype=torch.int64)], [])
    with pytest.raises(CorpusError, match=r"16 tokens, 8 for each of 4 experts.*floor is 9"):
        check_floor(corpus, CONFIG, 9)
    check_floor(corpus, CONFIG, 8)
