"""`--fits` for vLLM: a recipe fills cards to the byte, and what cannot be cut is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.usage import usage_error
from v4quant.allocation.allocate import choose, find_losses
from v4quant.allocation.card_budget import (
    Cards,
    card_memory,
    cards_bytes,
    check_split,
    model_config,
    table_bytes,
)
from v4quant.allocation.costs import Options, find_costs
from v4quant.allocation.knapsack import BudgetError
from v4quant.allocation.sensitivity import Sample
from v4quant.builtin import TINY_V4, TINY_V41, resolve_source
from v4quant.cli import cli
from v4quant.conversion.plan import make_plan
from v4quant.recipe import read_toml, recipe_from_table
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.engines.vllm_memory import Serving
from v4quant_formats.engines.vllm_split import is_split
from v4quant_formats.opening import open_checkpoint

SOURCE = Path(resolve_source(TINY_V4))
VLLM = Options("compressed-tensors", "vllm", sample=Sample(1, 8))
# Without weights a card takes 2.66 GB here, nearly all for rotary tables, logits and CUDA.
TWO = Cards(3_000_000_000, Serving(2, 4096, 256, utilization=0.9))


def run(*arguments: str, out: Path) -> Result:
    base = ["allocate", TINY_V4, "--out", str(out), "--experts", "1"]
    vllm = ["--format", "compressed-tensors", "--engine", "vllm"]
    return CliRunner().invoke(cli, [*base, *vllm, *arguments])


def test_cards_are_filled_from_below() -> None:
    with open_checkpoint(SOURCE) as source:
        options = replace(VLLM, parts=2)
        costs = find_costs(source, options)
        # A size at which neither the smallest nor an exact choice fills the card.
        base = card_memory(costs.base, TWO)
        least, exact = (
            sum(f(sizes) for sizes in costs.places.values())
            for f in (lambda sizes: min(sizes.values()), lambda sizes: sizes["mxfp4"])
        )
        size = (base.taken - (exact - least) // 4) / TWO.serving.utilization
        cards = replace(TWO, size=int(size))
        most = cards_bytes(costs, cards)
        found = choose(costs, find_losses(source, costs, options), most)
        plan = make_plan(source, found.recipe)
        memory = card_memory(plan, cards)
    assert memory.free >= 0 and memory.taken + memory.reserve + memory.free == cards.size
    assert memory.free < 0.005 * found.nbytes
    # The same weights, counted from the plan's tensors one by one.
    specs = [spec for shard in plan.shards for spec in shard.outputs]
    names = {spec.name: parse_name(spec.name) for spec in specs}
    cut = [s.nbytes for s in specs if (n := names[s.name]) is not None and is_split(n)]
    assert memory.split == -(-sum(cut) // 2)
    assert memory.whole == sum(s.nbytes for s in specs) - sum(cut)


def test_too_small_cards_name_what_would_do() -> None:
    with open_checkpoint(SOURCE) as source:
        costs = find_costs(source, replace(VLLM, parts=2))
        with pytest.raises(BudgetError, match=r"2 x 1.0 GB are too small.*--batched-tokens") as e:
            cards_bytes(costs, replace(TWO, size=10**9))
        enough = re.search(r"cards of (\d\.\d) GB would do", str(e.value))
        assert enough is not None
        size = int(float(enough[1]) * 1e9)
        assert cards_bytes(costs, replace(TWO, size=size)) > costs.fixed
        with pytest.raises(BudgetError):
            cards_bytes(costs, replace(TWO, size=size - 10**8))


def test_scale_groups_are_not_cut() -> None:
    """Experts 256 wide over two cards: groups of 128 fit, over four only those of 64 and less."""
    with open_checkpoint(SOURCE) as source:
        menus = [
            set(find_costs(source, replace(VLLM, parts=n)).places["layers.0", "experts"])
            for n in (1, 2, 4)
        ]
    assert menus[0] == menus[1] and "int3-g128" in menus[1]
    assert menus[2] == {m for m in menus[0] if "g128" not in m}


def test_splits_vllm_cannot_make() -> None:
    with open_checkpoint(SOURCE) as source:
        config = model_config(source)
    check_split(config, TWO.serving)
    for gpus, reason in ((3, "4 attention heads do not divide by 3"), (4, "2 o_groups")):
        with pytest.raises(BudgetError, match=f"{reason}.*it can over 1, 2"):
            check_split(config, replace(TWO.serving, gpus=gpus))
    with pytest.raises(BudgetError, match="16 experts do not divide by 3"):
        wide = replace(config, num_attention_heads=6, o_groups=3, moe_intermediate_size=384,
                       o_lora_rank=128)  # fmt: skip
        check_split(wide, replace(TWO.serving, gpus=3, expert_parallel=True))


def test_command_shows_each_card(tmp_path: Path) -> None:
    more = ("--context", "4096", "--batched-tokens", "256", "--sequences", "2")
    found = run("--fits", "2x4GB", *more, out=tmp_path / "a.toml")
    assert found.exit_code == 0, found.output
    assert "Each of 2 cards" in found.stdout and "4.29 GB" in found.stdout
    assert "--tensor-parallel-size 2 --max-model-len 4096 --max-num-seqs 2" in found.stdout
    facts = json.loads(run("--fits", "2x4GB", *more, "--json", out=tmp_path / "b.toml").stdout)
    card = facts["card"]
    parts = ("split", "whole", "kv_cache", "buffers", "runtime", "reserve", "free")
    assert sum(card[part] for part in parts) == card["size"] == 4 * 2**30
    for wrong, code in (("3x4GB", 1), ("2x1GB", 1), ("4GB", 1)):
        assert run("--fits", wrong, *more, out=tmp_path / "c.toml").exit_code == code
    for option in ("--sequences=2", "--expert-parallel", "--batched-tokens=64"):
        assert usage_error(run("--budget", "16MB", option, out=tmp_path / "c.toml"))
    assert not (tmp_path / "c.toml").exists()


def test_v41_has_its_tables_in_system_memory(tmp_path: Path) -> None:
    """No card holds the Engram; pinned, each tensor takes a power of two."""
    out = tmp_path / "recipe.toml"
    cards = ["--fits", "2x4GB", "--context", "4096", "--batched-tokens", "256", "--json"]
    vllm = ["--format", "compressed-tensors", "--engine", "vllm", "--experts", "1"]
    done = CliRunner().invoke(cli, ["allocate", TINY_V41, "--out", str(out), *vllm, *cards])
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)["card"]
    parts = ("split", "whole", "kv_cache", "buffers", "runtime", "reserve", "free")
    assert sum(card[part] for part in parts) == card["size"] == 4 * 2**30
    with open_checkpoint(resolve_source(TINY_V41)) as source:
        plan = make_plan(source, recipe_from_table(read_toml(out), str(out)))
        config = model_config(source)
        tables = [s for n, s in source.tensors.items() if ".engram.embed." in n]
        assert config.v41 is not None and table_bytes(plan) == sum(s.nbytes for s in tables)
        rest = sum(s.nbytes for shard in plan.shards for s in shard.outputs) - table_bytes(plan)
        # Cut over both, columns of the tables too: codes and scales are tensors of their own.
        heads = -(-config.v41.engram_columns // 2)
        width = config.v41.engram_head_dim
        primes = [t.primes for t in config.v41.engram_tables]
        shares = [sum(p[n : n + heads]) for p in primes for n in (0, heads)]
    assert 2 * card["split"] + card["whole"] in (rest, rest + 1)
    sizes = [rows * size for rows in shares for size in (width, width // 32)]
    assert card["host"] == sum(1 << (size - 1).bit_length() for size in sizes)
