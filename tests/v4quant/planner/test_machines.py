"""Machines as people name them."""

from __future__ import annotations

import pytest

from v4quant.planner.detect import read_nvidia_line
from v4quant.planner.machines import (
    GIB,
    MIB,
    MachineError,
    boxed_size,
    parse_cards,
    parse_machine,
    with_generation,
    with_memory,
)


@pytest.mark.parametrize(
    ("name", "count", "generation"),
    [
        ("2x3090", 2, "sm86"),
        ("RTX 4090", 1, "sm89"),
        ("2 x rtx-5090", 2, "sm120"),
        ("rtx-pro-6000", 1, "sm120"),
        ("8xh100", 8, "sm90"),
        ("dgx-spark", 1, "sm121"),
        ("m3-ultra-512", 1, ""),
    ],
)
def test_names(name: str, count: int, generation: str) -> None:
    machine = parse_machine(name)
    assert (machine.count, machine.generation) == (count, generation)


def test_a_near_miss_is_answered_with_what_was_meant() -> None:
    with pytest.raises(MachineError, match="did you mean rtx-pro-6000"):
        parse_machine("rtx-pro6000")


def test_sizes_are_as_sold() -> None:
    assert boxed_size("128GB") == 128 * GIB
    assert boxed_size("24564MiB") == 24564 * MIB
    machine = with_memory(parse_cards("2x24GB"), "192GB", 80)
    assert machine.card is not None
    assert (machine.card.nbytes, machine.ram, machine.ram_bandwidth) == (24 * GIB, 192 * GIB, 80e9)
    assert not [a for a in machine.assumptions if "memory" in a]
    assumed = with_memory(parse_cards("2x24GB"), "192GB", None).assumptions
    assert any("60 GB/s is assumed" in a and "--ram-bandwidth" in a for a in assumed)
    assert with_generation(machine, "sm120").generation == "sm120"


@pytest.mark.parametrize("text", ["24GB", "0x24GB", "2x", "2x24B", "2xRTX", "x24GB"])
def test_what_are_no_cards_is_refused(text: str) -> None:
    with pytest.raises(MachineError, match=r"write it like 2x24GB|2x3090"):
        parse_cards(text)


def test_numbers_without_end_are_none() -> None:
    for text in (f"2x{'9' * 5000}", f"2x{'9' * 400}GB", f"{'9' * 5000}x3090"):
        with pytest.raises(MachineError):
            parse_cards(text)
    with pytest.raises(MachineError, match="is not a size of memory"):
        boxed_size("9" * 400 + "GB")


def test_unified_memory_takes_no_further_memory() -> None:
    with pytest.raises(MachineError, match="share one memory"):
        with_memory(parse_machine("m4-max-128"), "64GB", None)


def test_cards_are_read_from_the_driver() -> None:
    card = read_nvidia_line("NVIDIA GeForce RTX 3090, 24576, 8.6")
    assert card is not None
    assert (card.nbytes, card.generation, card.bandwidth) == (24576 * MIB, "sm86", 936e9)
    ti = read_nvidia_line("NVIDIA GeForce RTX 3090 Ti, 24564, 8.6")
    assert ti is not None and ti.bandwidth == 1008e9
    spark = read_nvidia_line("NVIDIA GB10, [N/A], 12.1")
    assert spark is not None and spark.unified == "cuda"
    other = read_nvidia_line("NVIDIA Quadro T1000, 4096, 7.5")
    assert other is not None and other.nbytes == 4096 * MIB and other.generation == "sm75"
    assert read_nvidia_line("No devices were found") is None
