"""`--machine auto`: the cards and the memory of this machine, as its drivers tell them."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import replace

from v4quant.planner.machines import CARDS, MIB, Card, Machine
from v4quant_formats.system import total_memory_bytes

_BANDWIDTH = 60e9
_SECONDS = 10


def this_machine() -> Machine:
    """This machine."""
    ram = total_memory_bytes()
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return _apple(ram)
    cards = _nvidia()
    if not cards:
        note = "no NVIDIA card was found; name other cards with --cards or --machine"
        return Machine("auto", 0, None, ram, _BANDWIDTH, assumptions=(note,))
    first = cards[0]
    alike = [c for c in cards if c.name == first.name]
    notes = []
    if len(alike) < len(cards):
        notes.append(f"only the {len(alike)} cards like the first are planned with")
    if first.unified:
        return Machine("auto", 1, replace(first, nbytes=ram), 0, first.bandwidth)
    return Machine(
        "auto", len(alike), first, ram, _BANDWIDTH,
        assumptions=(*notes, "memory of 60 GB/s is assumed; say --ram-bandwidth"),
    )  # fmt: skip


def _nvidia() -> list[Card]:
    """What nvidia-smi lists; nothing where it is absent or fails."""
    fields = "name,memory.total,compute_cap"
    found = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    return [c for line in found.splitlines() if (c := read_nvidia_line(line)) is not None]


def read_nvidia_line(line: str) -> Card | None:
    """`NVIDIA GeForce RTX 3090, 24576, 8.6` -> the card; None for any other line."""
    parts = [part.strip() for part in line.rsplit(",", 2)]
    if len(parts) != 3:
        return None
    title, memory, capability = parts
    generation = "sm" + capability.replace(".", "")
    known = max(
        (c for c in CARDS.values() if _same(c.title, title)), key=lambda c: len(_words(c.title)),
        default=None,
    )  # fmt: skip
    if known is not None and known.unified:
        return known
    if not memory.isdigit():
        return None
    bandwidth = 500e9 if known is None else known.bandwidth
    return Card(title, title, int(memory) * MIB, generation, bandwidth)


def _same(known: str, title: str) -> bool:
    """Whether the driver's title has every word of ours that tells cards apart."""
    return _words(known) - {"dgx", "spark"} <= _words(title)


def _words(title: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"(\d) gb\b", r"\1gb", title.lower())))


def _apple(ram: int) -> Machine:
    chip = _output(["sysctl", "-n", "machdep.cpu.brand_string"]).strip() or "Apple silicon"
    alike = [c for c in CARDS.values() if c.unified == "metal" and c.title == chip]
    bandwidth = alike[0].bandwidth if alike else 200e9
    notes = () if alike else (f"{chip} is in no table: a bandwidth of 200 GB/s is assumed",)
    card = Card("auto", chip, ram, "", bandwidth, "desktop", "metal")
    return Machine("auto", 1, card, 0, bandwidth, assumptions=notes)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
