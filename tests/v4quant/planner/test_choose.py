"""Machines asked cold get what people with those machines run."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from v4quant.cli import cli
from v4quant.planner import for_llama_cpp, for_vllm
from v4quant.planner.candidates import Candidate, Request
from v4quant.planner.choose import Answer, choose
from v4quant.planner.commands import commands_for
from v4quant.planner.effort import cost_of
from v4quant.planner.footprint import Outline, footprint, outline_release
from v4quant.planner.loss import Measured, known_loss, tiny_rows, with_dense
from v4quant.planner.machines import GIB, parse_cards, parse_machine, with_generation, with_memory
from v4quant.planner.run_file import run_file
from v4quant.recipe import Recipe
from v4quant_formats.model_config import parse_model_config
from v4quant_kernels.scheme import get_scheme


@cache
def outline_of(release: str) -> Outline:
    return outline_release(release)


@cache
def ask(
    release: str, name: str, ram: str | None = None, measured: tuple[Measured, ...] = ()
) -> Answer:
    machine = with_memory(parse_machine(name), ram, None)
    return choose(outline_of(release), Request(machine, 32768, "best", 16, measured=measured))


def is_release(candidate: Candidate) -> bool:
    return candidate.recipe is None and not candidate.budget


@pytest.mark.parametrize("name", ["8xh100", "4xh100", "2xrtx-pro-6000", "8xh200", "2xdgx-spark"])
def test_where_the_release_fits_it_is_served_as_it_is(name: str) -> None:
    """Nothing 4-bit is smaller or better than it."""
    best = ask("flash", name).candidates[0]
    assert best.engine == "vllm" and is_release(best) and best.loss.basis == "exact"


@pytest.mark.parametrize(
    ("name", "ram"),
    [("2x3090", "128GB"), ("4090", "192GB"), ("5090", "256GB"), ("4x3090", "256GB")],
)
def test_consumer_cards_keep_experts_in_memory(name: str, ram: str) -> None:
    answer = ask("flash", name, ram)
    best = answer.candidates[0]
    assert best.engine == "llama.cpp" and best.loss.basis == "exact" and best.scheme == "mxfp4"
    assert best.where.memory > 0 and not best.where.disk
    assert any(o.startswith("--n-cpu-moe") for o in best.options)
    # What is worse is there because it is faster.
    speeds = [c.tokens_per_second for c in answer.candidates]
    assert speeds == sorted(speeds)


def test_one_96_gb_card_has_a_way_in_either_engine() -> None:
    answer = ask("flash", "rtx-pro-6000", "128GB")
    assert {c.engine for c in answer.candidates} == {"llama.cpp", "vllm"}
    alone = next(c for c in answer.candidates if c.engine == "vllm")
    assert alone.scheme.startswith("int2") or "chosen by layer" in alone.scheme
    assert alone.where.memory == 0


@pytest.mark.parametrize("name", ["dgx-spark", "m4-max-128", "strix-halo"])
def test_128_gb_of_unified_memory_hold_between_two_and_three_bits(name: str) -> None:
    answer = ask("flash", name)
    assert answer.candidates
    for candidate in answer.candidates:
        assert 70e9 < candidate.size < 130e9 and candidate.loss.kl


def test_a_512_gb_mac_holds_flash_exactly() -> None:
    best = ask("flash", "m3-ultra-512").candidates[0]
    assert best.loss.basis == "exact" and best.engine == "llama.cpp"


def test_a100s_are_llama_cpps() -> None:
    answer = ask("flash", "8xa100")
    assert {c.engine for c in answer.candidates} == {"llama.cpp"}
    assert any("attention kernels" in r for r in answer.remedies)
    told = ask("flash", "8xmi300x").remedies  # what was not examined is not denied
    assert any("ROCm" in r for r in told) and not any("only" in r for r in told)


def test_pro_on_eight_h200_is_the_release_and_on_h100_is_not() -> None:
    assert is_release(ask("pro", "8xh200").candidates[0])
    assert not any(is_release(c) for c in ask("pro", "8xh100").candidates)


@pytest.mark.parametrize(
    ("ram", "host", "option"),
    [("512GB", 283.5e9, ""), ("256GB", 202.8e9, "use_thp"), ("128GB", 0, "cpu_offload")],
)
def test_v41s_tables_lie_where_there_is_room(ram: str, host: float, option: str) -> None:
    best = ask("v41", "8xh100", ram).candidates[0]
    assert best.engine == "vllm" and is_release(best) and best.loss.basis == "exact"
    assert best.size == 510_286_023_000
    assert best.where.memory == pytest.approx(host, rel=1e-3)
    assert [o for o in best.options if o.startswith("--engram-config")] == [
        f'--engram-config {{"{option}": {"true" if host else "false"}}}' for _ in [0] if option
    ]
    # The other 307.5 GB over eight cards, and the tables' share where it is there.
    weights = 307.5e9 / 8 + (0 if host else 202.8e9 / 8)
    assert weights < best.where.cards[0] < weights + 10e9


def test_v41_over_four_cards_takes_whole_experts_where_groups_do_not_divide() -> None:
    """A share of 2304 channels is 576: groups of 128 do not fit it, groups of 64 do."""
    outline = outline_release("v41")
    config = parse_model_config(dict(outline.config))
    machine = with_memory(with_generation(parse_cards("4x64GB"), "sm120"), "512GB", None)
    request = Request(machine, 32768, "best", 16)
    for scheme, uncut in (("int3-g128", True), ("int3-g64", False)):
        recipe = Recipe(scheme, engine="vllm")
        file = footprint(outline, recipe)
        found = for_vllm.vllm_candidate(outline, request, config, recipe, file)
        assert found is not None
        assert ("--enable-expert-parallel" in found.options) == uncut
        assert any("576 channels is not a multiple" in note for note in found.notes) == uncut


def test_v41_in_llama_cpp_has_its_tables_in_a_file_of_their_own() -> None:
    best = ask("v41", "m3-ultra-512").candidates[0]
    assert best.engine == "llama.cpp" and best.recipe is not None
    assert best.recipe.engram == "q8_0" and any("Engram tables" in n for n in best.notes)
    assert best.where.cards[0] < 310e9 and best.size > 500e9
    done = CliRunner().invoke(cli, ["plan", "flash-v41", "--machine", "m3-ultra-512"])
    assert done.exit_code == 0 and "--engram q8_0" in done.stdout


def test_sglang_is_an_engine_of_its_own() -> None:
    """What fits by its own rule, its options, and refusals where it refuses."""

    def ask_sglang(release: str, name: str, ram: str | None = None) -> Answer:
        machine = with_memory(parse_machine(name), ram, None)
        return choose(outline_of(release), Request(machine, 32768, "best", 16, ("sglang",)))

    for release, name in (("flash", "8xh100"), ("pro", "8xh200"), ("flash", "2xrtx-pro-6000")):
        best = ask_sglang(release, name).candidates[0]
        assert best.engine == "sglang" and is_release(best) and best.loss.basis == "exact"
        share = float(next(o for o in best.options if "--mem-fraction" in o).split()[1])
        assert max(best.where.cards) < share * parse_machine(name).card.nbytes  # type: ignore
    tables = ask_sglang("v41", "8xh100", "512GB").candidates[0]
    assert tables.options[0] == "SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE=1"
    assert tables.where.memory == pytest.approx(202.8e9, rel=1e-3)
    on_cards = ask_sglang("v41", "8xh200", "128GB").candidates[0]
    assert not on_cards.where.memory and on_cards.where.cards[0] > tables.where.cards[0] + 25e9
    assert "2 and 3 bits" in ask_sglang("flash", "rtx-pro-6000").remedies[0]
    assert "sm90" in ask_sglang("flash", "2x3090").remedies[0]
    lossy = ask_sglang("flash-base", "2xrtx-pro-6000").candidates
    assert lossy and not any(is_release(c) for c in lossy)
    for candidate in lossy:
        assert get_scheme(candidate.scheme).bits >= 4
        packed = "SGLANG_DSV4_FP4_EXPERTS=0" in candidate.options
        assert packed == get_scheme(candidate.scheme).is_packed_integer


def test_two_boxes_share_what_one_cannot_hold() -> None:
    """V4.1 on two Sparks: people serve 2.9 bits per weight there, one of them holds 1.6."""
    one, two = ask("v41", "dgx-spark").candidates[0], ask("v41", "2xdgx-spark").candidates[0]
    assert len(one.where.cards) == 1 and len(two.where.cards) == 2
    assert two.loss.order < one.loss.order / 5 and any("RPC" in note for note in two.notes)
    machine = parse_machine("2xdgx-spark")
    typed = commands_for(two, machine, "hf://a/b", "8GB").serve
    assert any("-DGGML_RPC=ON" in line for line in typed)
    assert "ggml-rpc-server" in typed[-3] and "--rpc box2:50052" in typed[-1]
    assert ask("pro", "2xm3-ultra-512").candidates[0].loss.basis == "exact"
    assert "3 x DGX Spark" in " ".join(ask("pro", "dgx-spark").remedies)


def test_files_on_disk_are_listed_from_the_best_bearable_one() -> None:
    """The smallest is the fastest there, but twice as bad."""
    found = ask("v41", "4090", "64GB").candidates
    speeds = [c.tokens_per_second for c in found]
    assert len(found) > 1 and all(c.where.disk for c in found) and speeds == sorted(speeds)
    assert speeds[0] >= 2 and 2 * found[0].loss.order < found[-1].loss.order
    assert all("stay on the disk" in " ".join(c.notes) for c in found)


def test_a_large_server_gets_as_many_sequences_as_fit() -> None:
    best = ask("flash", "8xh100").candidates[0]
    assert best.sequences == 64 and "--max-num-seqs 64" in best.options
    assert "--tokenizer-mode deepseek_v4" in best.options and "--tp 8" in best.sglang
    few = ask("flash", "dgx-spark").candidates
    assert {c.sequences for c in few} == {1}


def test_what_does_not_fit_is_told_what_would() -> None:
    answer = ask("pro", "2x3090", "64GB")
    assert all(c.where.disk for c in answer.candidates)
    assert any("memory beside these cards" in r or "x RTX 3090" in r for r in answer.remedies)
    answer = ask("pro", "m4-pro-64")
    assert answer.candidates == () and any("unified memory" in r for r in answer.remedies)


def test_the_memory_that_would_do_is_more_than_there_is_and_does() -> None:
    """A 48 GB Mac is not told to get 48 GB: macOS keeps a share."""
    card = parse_machine("m4-max-64").card
    assert card is not None
    small = replace(parse_machine("m4-max-64"), card=replace(card, nbytes=48 * GIB))
    answer = choose(outline_release("flash"), Request(small, 32768, "best", 16))
    assert not answer.candidates
    told = next(r for r in answer.remedies if r.startswith("llama.cpp"))
    needed = re.search(r"with (\d+) GB of unified memory", told)
    assert needed is not None and int(needed[1]) > 48
    larger = replace(parse_machine("m4-max-64"), card=replace(card, nbytes=int(needed[1]) * GIB))
    assert choose(outline_release("flash"), Request(larger, 32768, "best", 16)).candidates


def test_what_less_effort_takes_and_loses_stands_beside() -> None:
    answer = ask("flash", "dgx-spark")
    solved = [c for c in answer.candidates if c.cost is not None and c.cost.level.solves]
    assert solved and any(c.budget for c in solved)
    for candidate in solved:
        assert candidate.cost is not None and candidate.loss.kl is not None and candidate.quicker
        hours, kl = candidate.cost.hours, candidate.loss.kl
        for way in candidate.quicker:
            assert way.hours < hours and way.kl is not None and way.kl > kl
            hours, kl = way.hours, way.kl
        assert candidate.quicker[-1].effort == "minutes"
    quick = Request(parse_machine("dgx-spark"), 32768, "minutes", 16)
    assert not any(c.quicker for c in choose(outline_release("flash"), quick).candidates)


def test_smaller_dense_types_are_for_what_does_not_fit_otherwise() -> None:
    """64 GB hold Flash only so; and where they bring a better file, that comes first."""
    (only,) = ask("flash", "m4-max-64").candidates
    assert only.recipe is not None and only.recipe.dense != "q8_0" and only.size < 64e9
    assert "leaves no room" in " ".join(only.notes)
    answer = ask("flash", "4090", "64GB")
    assert {c.dense for c in answer.candidates} > {"q8_0"}
    losses = [c.loss.order for c in answer.candidates]
    assert losses == sorted(losses) and losses[0] > known_loss("iq2_xs", "propagated").order
    assert with_dense(known_loss("mxfp4", "", True), "q8_0").basis == "exact"
    kls = [with_dense(known_loss("mxfp4", "", True), d).kl or 0 for d in ("q6_k", "q5_k", "q4_k")]
    assert 0 < kls[0] < kls[1] < kls[2]


def test_auto_is_the_best_that_is_done_in_three_days() -> None:
    outline, scheme = outline_release("flash"), get_scheme("int3-g128")
    levels = {}
    for cores in (1, 2, 4, 64):
        cost = cost_of(outline, scheme, 10**11, "auto", cores, exact=False)
        assert cost.hours <= 72
        levels[cores] = cost.level.solver
    assert levels[1] != levels[64] == "propagated"
    hours = cost_of(outline, scheme, 10**11, "hours", 2, exact=False)
    minutes = cost_of(outline, scheme, 10**11, "minutes", 2, exact=False)
    assert hours.level.weighs and minutes.level.tokens == 0 and minutes.hours < hours.hours < 24


def test_a_measurement_of_the_model_stands_before_the_tiny_ones() -> None:
    rows = (Measured("q3_k", "", 0.5, 0.7),)
    found = [c for c in ask("flash", "2x3090", "128GB", rows).candidates if c.scheme == "q3_k"]
    assert all(c.loss.basis == "this model" and c.loss.kl == 0.5 for c in found)


def test_estimates_lie_between_their_neighbours() -> None:
    rows = {r.scheme: r.kl for r in tiny_rows() if r.solver == "propagated"}
    between = known_loss("int3-g64", "propagated", False)
    assert between.basis == "estimate" and between.kl is not None
    assert rows["int4-g128"] < between.kl < rows["int3-g128"]


@pytest.mark.parametrize("name", ["m4-max-128", "2x3090", "dgx-spark", "strix-halo"])
def test_types_that_want_a_text_are_never_made_without(name: str) -> None:
    """However quick it shall be; a mixture may choose such a type in any layer."""
    machine = with_memory(parse_machine(name), "64GB" if name == "2x3090" else None, None)
    outline = outline_release("flash")
    found = for_llama_cpp.candidates(outline, Request(machine, 8192, "minutes", 16))[0]
    weighed = [c for c in found if c.budget or (c.recipe and get_scheme(c.scheme).text)]
    assert weighed and any(c.budget for c in weighed)
    for candidate in found:
        assert candidate.cost is not None and not candidate.cost.level.solves
        assert (candidate in weighed) == candidate.cost.level.weighs, candidate.scheme
        make = commands_for(candidate, machine, "hf://a/b", "8GB").make
        assert ("calibrate" in make[0]) == (candidate in weighed), make
        assert all("--stats" in m for m in make[1:] if candidate in weighed), make
        if candidate.recipe is not None:
            text, coder = run_file(candidate, "hf://a/b"), get_scheme(candidate.scheme).coder
            assert ("[calibrate]" in text) == (candidate in weighed)
            assert ('solver = "optimal"' in text) == bool(coder), "run would choose it anew"


def test_words_name_every_place(tmp_path: Path) -> None:
    arguments = ["plan", "flash", "--machine", "2x3090", "--ram", "128GB"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0
    for words in (
        "on the cards of 25.8 GB each",
        "in system memory",
        "quicker ",
        "GB/s is assumed",
        "tokens fit",
        "hf download",
        "llama-server",
    ):
        assert words in done.stdout
    assert CliRunner().invoke(cli, [*arguments, "--cards", "2x24GB"]).exit_code == 1
