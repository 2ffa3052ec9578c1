"""Allocation: recipes of a size, to the byte; losses as defined; better than one scheme for all."""

from __future__ import annotations

import json
import math
import os
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import v4quant
from tests.support.conversion import TINY, convert
from tests.support.synthetic import Request, make_small, write_checkpoint
from tests.support.usage import usage_error
from v4quant.allocation import sensitivity
from v4quant.allocation.allocate import (
    Losses,
    NothingMeasured,
    choose,
    find_losses,
    recipe_toml,
)
from v4quant.allocation.budget import bits_budget, cards_budget, machine_budget
from v4quant.allocation.costs import Costs, Options, find_costs
from v4quant.allocation.findings import KEPT, Findings
from v4quant.allocation.knapsack import BudgetError
from v4quant.allocation.sensitivity import Sample, errors, rounded
from v4quant.builtin import CALIBRATION, HELDOUT, TINY_V4, resolve_corpus, resolve_source
from v4quant.cli import cli
from v4quant.conversion.plan import make_plan
from v4quant.planner import llama_cpp
from v4quant.planner.footprint import footprint, outline_release
from v4quant.planner.machines import parse_cards as parse_machine_cards
from v4quant.planner.machines import with_memory
from v4quant.recipe import Recipe, RecipeError, recipe_from_table
from v4quant.targets import ALL, AUTO, GROUPS, LAYER, WHOLE, Place
from v4quant_calibration.corpus.corpus import Corpus, CorpusRequest, load_corpus
from v4quant_calibration.evaluation.kl_sensitivity import measure_effects
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.statistics.stats import StageStats, Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.model_config import parse_dimensions
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.errors import OptionError
from v4quant_kernels.progress import SilentProgress

SOURCE = Path(resolve_source(TINY_V4))
SMALL = Options(draft="drop", sample=Sample(1, 8))
VLLM = replace(SMALL, format="compressed-tensors", engine="vllm")
Q3 = Recipe("q3_k", "gguf", draft="drop")
INT3 = Recipe("int3-g128", "compressed-tensors", engine="vllm", draft="drop")


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    with open_checkpoint(SOURCE) as opened:
        yield opened


@pytest.fixture(scope="module")
def costs(checkpoint: Checkpoint) -> Costs:
    return find_costs(checkpoint, SMALL)


@pytest.fixture(scope="module")
def losses(checkpoint: Checkpoint, costs: Costs) -> Losses:
    return find_losses(checkpoint, costs, SMALL)


def _sizes(costs: Costs) -> tuple[int, int]:
    least = costs.smallest
    exact = costs.fixed + sum(c["mxfp4"] for c in costs.places.values())
    return least, exact


def test_every_size_is_met_from_below(checkpoint: Checkpoint, costs: Costs, losses: Losses) -> None:
    least, exact = _sizes(costs)
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    # One choice of this tiny model is 0.3 to 1.2 % of its bytes.
    budgets = [least + int(x * (exact - least)) for x in torch.rand(6, generator=generator)]
    lost = []
    for budget in [least, *sorted(budgets), exact]:
        found = choose(costs, losses, budget)
        assert found.nbytes <= budget < found.nbytes * 1.01, seed
        assert found.nbytes == make_plan(checkpoint, found.recipe).bytes_out, seed
        lost.append(sum(found.losses.values()))
    assert lost == sorted(lost, reverse=True) and lost[-1] == 0.0, seed
    assert {s for _, s in found.recipe.schemes} == {"mxfp4"}


def test_the_recipe_file_makes_the_promised_file(
    costs: Costs, losses: Losses, tmp_path: Path
) -> None:
    least, exact = _sizes(costs)
    # Most places exact: codebooks take long to search.
    found = choose(costs, losses, (least + 14 * exact) // 15)
    assert len(set(found.recipe.places.values())) >= 2
    text = recipe_toml(found, costs)
    recipe = recipe_from_table(tomllib.loads(text), "recipe.toml")
    assert recipe == found.recipe and f"{found.nbytes:,}" in text
    assert convert(SOURCE, tmp_path / "out", recipe).bytes_out == found.nbytes
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.stat().st_size == found.nbytes


def test_dense_matrices_take_part_where_asked(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alike(_: object, found: Mapping[Place, object], *rest: object) -> dict[Place, float]:
        return dict.fromkeys(found, 1.0)

    monkeypatch.setattr("v4quant.allocation.allocate.measure_kl", alike)
    text = _text(checkpoint, CALIBRATION, 128)
    every = replace(SMALL, dense=ALL, sample=Sample(1, 2))
    all_costs = find_costs(checkpoint, every)
    assert {"f32", "q2_k"} < set(all_costs.places["layers.0", "hyper"])
    losses = find_losses(checkpoint, all_costs, every, None, text)
    smaller = all_costs.smallest
    found = choose(all_costs, losses, int(smaller * 1.02))
    assert {g for _, g in found.recipe.places} == {*GROUPS, *WHOLE}
    assert found.nbytes <= smaller * 1.02

    options = replace(every, dense=AUTO)
    costs = find_costs(checkpoint, options)
    assert set(costs.places["layers.0", "dense"]) == set(costs.base.recipe.layout.dense_types)
    least = costs.smallest
    found = choose(
        costs, Losses({p: losses.places[p] for p in costs.places}, True), int(least * 1.1)
    )
    assert {g for _, g in found.recipe.places} == {"gate_up", "down", "dense", "embed", "head"}
    assert found.nbytes == make_plan(checkpoint, found.recipe).bytes_out <= least * 1.1
    assert smaller < 0.85 * least
    for wrong in (options, every):
        with pytest.raises(NothingMeasured, match="give --measure-kl"):
            find_losses(checkpoint, costs, wrong)


def test_budget_below_the_smallest(costs: Costs, losses: Losses) -> None:
    least, _ = _sizes(costs)
    bits = f"{8 * least / costs.weights:.3f} bits per weight"
    with pytest.raises(BudgetError, match=f"smallest possible.*{least:,} .{bits}.*--dense q8_0"):
        choose(costs, losses, least - 1)


def test_formats_of_one_scheme_are_refused(checkpoint: Checkpoint) -> None:
    for options in (Options("compressed-tensors"), Options("deepseek")):
        with pytest.raises(UnsupportedPair, match=r"one scheme for all experts.*--engine vllm"):
            find_costs(checkpoint, options)
    for dense in (AUTO, "q8_0"):
        with pytest.raises(RecipeError, match=f"dense = '{dense}' .*has no effect"):
            find_costs(checkpoint, replace(VLLM, dense=dense))


def test_whole_layers_for_vllm(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Draft stage included; a step of this tiny model is 0.2 to 0.4 % of its bytes."""
    options = replace(VLLM, draft="convert")
    costs = find_costs(checkpoint, options)
    assert {group for _, group in costs.places} == {LAYER} and len(costs.places) == 7
    least, exact = _sizes(costs)
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    budgets = [least + int(x * (exact - least)) for x in torch.rand(3, generator=generator)]
    losses, sums = find_losses(checkpoint, costs, options), []
    for budget in [least, *sorted(budgets), exact]:
        found = choose(costs, losses, budget)
        # At random budgets a step may be too coarse, or what fits may lose more: that is told.
        assert found.nbytes <= budget < found.nbytes * 1.01, seed
        lost = sum(found.losses.values())
        assert bool(found.room_left) == (found.nbytes < 0.995 * budget or not lost), seed
        sums.append(lost)
    assert sums == sorted(sums, reverse=True) and sums[-1] == 0.0, seed
    found = choose(costs, losses, (least + exact) // 2)
    text = recipe_toml(found, costs)
    recipe = recipe_from_table(tomllib.loads(text), "recipe.toml")
    assert recipe == found.recipe and recipe.engine == "vllm"
    assert len(set(recipe.places.values())) > 1 and len(recipe.places) == 14
    assert convert(SOURCE, tmp_path / "out", recipe).bytes_out == found.nbytes
    written = (tmp_path / "out").glob("*.safetensors")
    assert sum(file.stat().st_size for file in written) == found.nbytes
    with open_checkpoint(tmp_path / "out") as out:
        assert not preflight(out, "vllm").findings


def test_a_layers_error_is_that_of_the_file_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The three matrices' relative noise, from an output's own integers."""
    convert(SOURCE, tmp_path / "out", Recipe("int3-g128", "compressed-tensors", draft="drop"))
    shapes = {
        f"layers.3.ffn.experts.{e}.{w}": (256, 256) for e in range(16) for w in ("w1", "w2", "w3")
    }
    place = ("layers.3", LAYER)
    wanted = {place: ["int3-g128", "mxfp4", "int8-g32"]}
    found = errors(checkpoint, shapes, wanted, None, Sample(16, 256), SilentProgress())[place]
    expected = 0.0
    with open_checkpoint(tmp_path / "out") as out:
        for projection in ("w1", "w2", "w3"):
            noise = signal = 0.0
            for expert in range(16):
                module = f"layers.3.ffn.experts.{expert}.{projection}"
                x, y = (read_dense(file, module).double() for file in (checkpoint, out))
                noise += float((y - x).square().sum())
                signal += float(x.square().sum())
            expected += noise / signal
    assert found["int3-g128"] == pytest.approx(expected, rel=1e-9)
    assert found["mxfp4"] == 0.0 and "int8-g32" not in found


def test_integers_are_weighted_by_what_comes_in(checkpoint: Checkpoint) -> None:
    """Values MXFP4 holds, and values it does not; against the encoder's plain choice."""
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    released = read_dense(checkpoint, "layers.2.ffn.experts.5.w1").float()
    h = torch.rand(256, generator=generator) ** 4
    for x in (released, torch.randn(64, 256, generator=generator)):
        weighted, plain = (
            float(((rounded(x, "int2-g64", w) - x).double() ** 2 * h).sum()) for w in (h, None)
        )
        assert 0 < weighted < plain, seed


def test_groups_that_rows_do_not_have_are_no_choice(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "n_routed_experts": 2, "moe_intermediate_size": 192}
    write_checkpoint(tmp_path / "narrow", Request("flash", overrides=tuple(sizes.items())))
    with open_checkpoint(tmp_path / "narrow") as narrow:
        costs = find_costs(narrow, VLLM)
    schemes = {"int4-g32", "int4-g64", "int3-g64", "int2-g64", "int8-g32", "mxfp4", "mxfp8"}
    assert all(set(menu) == schemes for menu in costs.places.values())


def test_error_is_the_weighted_relative_noise(checkpoint: Checkpoint) -> None:
    """Against the definition, matrix by matrix, all experts and rows of a layer."""
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, 400, (16,), generator=generator)
    sums = {s: torch.rand(16, 256, generator=generator, dtype=torch.float64) * tokens[:, None]
            for s in ("w13", "w2")}  # fmt: skip
    stage = StageStats(tokens, sums, {s: torch.ones(16) for s in sums})
    stats = Stats(checkpoint.digest(), 32, {"layers.3": stage})
    place, sample = ("layers.3", "gate_up"), Sample(16, 256)
    shapes = {f"layers.3.ffn.experts.{e}.{w}": (256, 256) for e in range(16) for w in ("w1", "w3")}
    wanted = {place: ["q2_k", "mxfp4", "q8_0"]}
    found = errors(checkpoint, shapes, wanted, stats, sample, SilentProgress())[place]
    expected = 0.0
    for projection in ("w1", "w3"):
        noise = signal = 0.0
        for expert in range(16):
            x = read_dense(checkpoint, f"layers.3.ffn.experts.{expert}.{projection}")
            h = sums["w13"][expert] / tokens[expert]
            held = rounded(x, "q2_k", h)
            share = float(tokens[expert] + 1)
            noise += share * float(((held - x).double() ** 2 * h).sum())
            signal += share * float((x.double() ** 2 * h).sum())
        expected += noise / signal
    assert found["q2_k"] == pytest.approx(expected, rel=1e-9), seed
    assert found["mxfp4"] == 0.0 and "q8_0" not in found, "nothing larger than exact is tried"


def _text(checkpoint: Checkpoint, name: str, tokens: int) -> Corpus:
    request = CorpusRequest(128, tokens, 0, 2048)
    return load_corpus(resolve_corpus([name]), checkpoint.path / "tokenizer.json", request)


@pytest.mark.parametrize(("uniform", "tokens"), [(Q3, 384), (INT3, 256)], ids=["gguf", "vllm"])
def test_better_than_one_scheme_of_the_same_bytes(
    checkpoint: Checkpoint, uniform: Recipe, tokens: int, tmp_path: Path
) -> None:
    """On held-out text; docs/allocation.md has the figures on more of it.

    A mix by whole layers had more to win before rows got their gain back.
    """
    options = Options(uniform.format, uniform.engine, draft="drop", sample=Sample(1))
    costs = find_costs(checkpoint, options)
    budget = make_plan(checkpoint, uniform).bytes_out
    calibration = _text(checkpoint, CALIBRATION, tokens)
    found = choose(costs, find_losses(checkpoint, costs, options, None, calibration), budget)
    assert found.nbytes <= budget and found.measured
    convert(SOURCE, tmp_path / "one", uniform)
    convert(SOURCE, tmp_path / "mixed", found.recipe)
    heldout = _text(checkpoint, HELDOUT, 2 * tokens)
    with open_checkpoint(tmp_path / "one") as one, open_checkpoint(tmp_path / "mixed") as mixed:
        files = [CheckpointParams(one), CheckpointParams(mixed)]
        alters = [lambda base, _, file=file: file(base) for file in files]
        kls = measure_effects(checkpoint, heldout, alters, SilentProgress())
    assert kls[1] < (0.85 if uniform.format == "gguf" else 0.95) * kls[0], kls


class Stopping(SilentProgress):
    """Stops the process's work after so many places, and counts them."""

    def __init__(self, after: int = 10**6) -> None:
        self.after, self.seen = after, 0

    def advance(self, amount: int) -> None:
        self.seen += amount
        if self.seen >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [2, 7])
def test_a_stopped_allocation_measures_only_what_is_missing(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", torch.arange(96).reshape(2, 48).numpy())
    with open_checkpoint(TINY) as tiny:
        costs = find_costs(tiny, replace(VLLM, draft="convert"))
    least, exact = _sizes(costs)
    options: dict[str, Any] = {
        "budget": (least + exact) // 2, "corpus": tmp_path / "ids.npy", "tokens": 96,
        "measure_kl": True, "experts": 1, "format": "compressed-tensors", "engine": "vllm",
    }  # fmt: skip
    v4quant.allocate(TINY, tmp_path / "whole.toml", **options)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(KeyboardInterrupt):
        v4quant.allocate(TINY, tmp_path / "r.toml", **options, progress=Stopping(after))
    kept = tmp_path / "r.toml.unfinished.json"
    assert kept.is_file() and not (tmp_path / "r.toml").exists()
    measured = []
    real = sensitivity._place_errors

    def counted(*given: Any) -> dict[str, float]:
        measured.append(1)
        return real(*given)

    monkeypatch.setattr(sensitivity, "_place_errors", counted)
    v4quant.allocate(TINY, tmp_path / "r.toml", **options)
    assert len(measured) == max(0, len(costs.places) - after)
    assert (tmp_path / "r.toml").read_text() == (tmp_path / "whole.toml").read_text()
    assert not kept.exists()


def test_findings_of_another_run_or_somebody_elses_file(tmp_path: Path) -> None:
    out, file = tmp_path / "r.toml", tmp_path / "r.toml.unfinished.json"
    first = Findings(out, "ab")
    first.add("KL of a", 0.25)
    assert Findings(out, "ab").number("KL of a") == 0.25
    assert "KL of a" not in Findings(out, "cd")
    file.write_text('{"kind": "v4quant allocation", "key": "ab", "found": {"KL of a": "x"}}')
    assert "KL of a" not in Findings(out, "ab")
    file.write_text("my thesis")
    other = Findings(out, "ab")
    other.add("KL of a", 0.5)
    other.finish()
    assert file.read_text() == "my thesis"


def test_findings_of_a_finished_recipe_serve_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other budgets measure nothing again, other options what is new; another text and sample are
    other findings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.save(tmp_path / "ids.npy", torch.arange(96).reshape(2, 48).numpy())
    with open_checkpoint(TINY) as tiny:
        costs = find_costs(tiny, replace(VLLM, draft="drop"))
    least, exact = _sizes(costs)
    measured: list[str] = []
    for name in ("_place_errors", "measure_effects"):
        real = getattr(sensitivity, name)

        def counted(*given: Any, name: str = name, real: Any = real) -> Any:
            if name == "_place_errors" or given[2]:
                measured.append(name)
            return real(*given)

        monkeypatch.setattr(sensitivity, name, counted)

    def allocated(name: str, share: float, **other: Any) -> v4quant.AllocationResult:
        measured.clear()
        options: dict[str, Any] = {
            "budget": round(least + share * (exact - least)), "draft": "drop", "experts": 1,
            "corpus": tmp_path / "ids.npy", "tokens": 96, "measure_kl": True,
            "format": "compressed-tensors", "engine": "vllm", **other,
        }  # fmt: skip
        return v4quant.allocate(TINY, tmp_path / name, **options)

    first = allocated("first.toml", 0.5)
    assert measured.count("_place_errors") == len(costs.places)
    other = allocated("other.toml", 0.7)
    assert not measured and other.found.recipe != first.found.recipe
    assert sum(other.found.losses.values()) < sum(first.found.losses.values())
    allocated("again.toml", 0.5, draft="convert", budget="1GB")
    assert measured == ["_place_errors"]  # of the draft stage
    assert {f.name for f in tmp_path.glob("*.toml*")} == {"first.toml", "other.toml", "again.toml"}
    allocated("text.toml", 0.5, tokens=48)
    assert measured.count("_place_errors") == len(costs.places)
    allocated("sample.toml", 0.5, experts=2)
    assert "measure_effects" in measured
    assert len(list((tmp_path / "cache" / "v4quant").glob("allocate-*.json"))) == 3


def test_the_newest_findings_stay(tmp_path: Path) -> None:
    """And what a user keeps there under a name like ours."""
    (tmp_path / "allocate-budget.json").write_text("{}")
    os.utime(tmp_path / "allocate-budget.json", (0, 0))
    for number in range(KEPT + 2):
        known = Findings(tmp_path / "r.toml", f"{number:032x}", tmp_path)
        known.add("KL of a", float(number))
        known.finish()
        os.utime(tmp_path / f"allocate-{number:032x}.json", (number, number))
    assert "KL of a" not in Findings(None, f"{0:032x}", tmp_path)
    assert Findings(None, f"{KEPT + 1:032x}", tmp_path).number("KL of a") == KEPT + 1
    assert len(list(tmp_path.iterdir())) == KEPT + 1


def test_bits_budget() -> None:
    assert bits_budget(3.2, 1000) == 400
    for bits in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BudgetError, match="--bpw"):
            bits_budget(bits, 1000)


def test_cards_budget() -> None:
    with open_checkpoint(TINY) as tiny:
        config = parse_dimensions(dict(tiny.config), "config.json")
    one, two = cards_budget("1x24GB", 1024, config), cards_budget("2 x 24GB", 1024, config)
    assert 0.9 * 24 * 2**30 < one < 0.95 * 24 * 2**30 and one < two < 2 * one
    per_token = config.kv_bytes_per_token()
    assert per_token
    assert one - cards_budget("1x24GB", 2048, config) == 1024 * per_token
    for text in ("24GB", "0x24GB", "x", "2x", "2xmuch", "2x24"):
        with pytest.raises(BudgetError, match=r"cards|machine|no unit"):
            cards_budget(text, 1024, config)
    with pytest.raises(BudgetError, match=r"1x1GB hold no weights"):
        cards_budget("1x1GB", 2**30, config)
    assert cards_budget("1x3090", 1024, config) == one  # which has what it is sold with


def test_a_budget_with_system_memory_is_what_the_planner_places() -> None:
    outline = outline_release("flash")
    budgets = [
        machine_budget("2x24GB", ram, 32768, outline, "q8_0", "drop")
        for ram in ("64GB", "96GB", "128GB")
    ]
    assert budgets == sorted(budgets) and budgets[2] - budgets[1] > 25e9
    machine = with_memory(parse_machine_cards("2x24GB"), "96GB", None)
    for scheme in ("iq2_xxs", "iq3_xxs", "q3_k", "iq4_xs"):
        file = footprint(outline, Recipe(scheme, format="gguf", dense="q8_0", draft="drop"))
        placed = llama_cpp.place(file, machine, outline.dimensions, 32768) is not None
        assert placed == (0.995 * file.trunk <= budgets[1]), scheme
    with pytest.raises(BudgetError, match="do not hold the smallest file"):
        machine_budget("1x24GB", "32GB", 32768, outline, "q8_0", "drop")


def test_system_memory_goes_with_cards_and_gguf(tmp_path: Path) -> None:
    for options in ({"bpw": 4.0}, {"fits": "2x24GB", "format": "compressed-tensors"}):
        with pytest.raises(OptionError, match="--ram belongs to --fits"):
            v4quant.allocate(TINY, tmp_path / "r.toml", ram="64GB", **options)
    done = v4quant.allocate(TINY, tmp_path / "r.toml", fits="1x8GB", ram="16GB", experts=1)
    assert done.found.nbytes <= done.found.budget and (tmp_path / "r.toml").is_file()


@pytest.mark.parametrize(
    ("bits", "more"), [("6.4", ""), ("5.5", "--format compressed-tensors --engine vllm")]
)
def test_command(bits: str, more: str, tmp_path: Path) -> None:
    out = tmp_path / "recipe.toml"
    arguments = ["allocate", TINY_V4, "--out", str(out), "--draft", "drop", "--experts", "1"]
    arguments += more.split()
    run = CliRunner().invoke(cli, [*arguments, "--bpw", bits, "--json"])
    assert run.exit_code == 0, run.output
    facts = json.loads(run.stdout)
    assert facts["bytes"] <= facts["budget"] < facts["bytes"] * 1.005
    assert facts["bits_per_weight"] <= float(bits) and not facts["loss_is_measured"]
    assert recipe_from_table(tomllib.loads(out.read_text()), "x").as_dict() == facts["recipe"]
    for wrong in ([], ["--bpw", "3", "--budget", "1GB"]):
        assert usage_error(CliRunner().invoke(cli, [*arguments, *wrong]))


@pytest.mark.parametrize(
    ("release", "options", "best"),
    [("flash-base", SMALL, "q8_0"), ("flash", SMALL, "mxfp4"), ("flash-base", VLLM, "mxfp8")],
)
def test_releases(release: str, options: Options, best: str, tmp_path: Path) -> None:
    """FP8 experts, which MXFP4 does not hold, and FP4 ones; rows of lengths K-types do not have."""
    source = make_small(tmp_path / release, release)
    with open_checkpoint(source) as checkpoint:
        costs = find_costs(checkpoint, options)
        least, exact = _sizes(costs)
        losses = find_losses(checkpoint, costs, options)
        found = choose(costs, losses, (least + exact) // 2)
        rich = choose(costs, losses, 10 * exact)
    assert least <= found.nbytes <= found.budget
    assert convert(source, tmp_path / "out", found.recipe).bytes_out == found.nbytes
    assert {s for _, s in rich.recipe.schemes} == {best}


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        replace(SMALL, draft="convert", dense="q8_0"),
        replace(SMALL, dense=AUTO),
        replace(SMALL, dense=ALL),
        VLLM,
        replace(VLLM, draft="convert"),
        replace(VLLM, parts=4),
    ],
    ids=["gguf", "gguf-q8_0", "gguf-auto", "gguf-all", "vllm", "vllm-draft", "vllm-cut"],
)
def test_a_sweep_of_budgets(
    options: Options, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the smallest to past the largest: within half a percent from below, or told why not."""
    costs, seed = find_costs(checkpoint, options), secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    # Losses fall with size, unequally between places, and never to zero.
    made = {}
    for place, sizes in costs.places.items():
        effect, base = torch.rand(2, generator=generator).tolist()
        ordered = sorted(sizes, key=lambda s: sizes[s])
        made[place] = {s: effect * (0.2 + 0.6 * base) ** i for i, s in enumerate(ordered)}
    losses = Losses(made, False)
    monkeypatch.setattr(
        "v4quant.allocation.allocate.make_plan", lambda _, recipe: _Sized(costs, recipe)
    )
    monkeypatch.setattr("v4quant.allocation.knapsack.MOST_CELLS", 1_000_000)
    least, most = costs.smallest, costs.largest
    filled, lost = 0, math.inf
    for step in range(9):
        budget = least + (most - least) * step // 8
        found = choose(costs, losses, budget)
        assert found.nbytes <= found.fullest <= budget, seed
        assert sum(found.losses.values()) <= lost, ("more bytes lose more", seed)
        lost = sum(found.losses.values())
        short = found.nbytes < 0.995 * budget
        filled += not short
        assert bool(found.room_left) == short, seed
        if short:
            coarse = found.fullest < 0.995 * budget
            assert ("coarse" in found.room_left) == coarse, seed
            assert f"{found.fullest:,}" in found.room_left
    # The first and the last always are; few schemes fit cut rows, too coarse for most between them.
    assert filled > 2 or options.parts > 1, (filled, seed)
    with pytest.raises(BudgetError, match=f"{least:,}"):
        choose(costs, losses, least - 1)


class _Sized:
    """A plan known by its size alone: other tests compare that with real plans."""

    def __init__(self, costs: Costs, recipe: Recipe) -> None:
        own = dict(recipe.places)
        sizes = (costs.places[p][own.get(p) or own[p[0], "down"]] for p in costs.places)
        self.bytes_out = costs.fixed + sum(sizes)
