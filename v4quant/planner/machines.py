"""Machines: cards with their memory and bandwidth, system memory, and how people name them.

Sizes on a box are binary: a card "of 24 GB" reports 24,576 MiB and memory modules of 128 GB hold
128 GiB. So `--cards 2x24GB` and `--ram 128GB` mean that here. Cards in the table have what their
driver reports, and the bandwidth of the vendor's data sheet. What a name leaves open (system memory
behind two RTX 3090, say) is assumed, and `Machine.assumptions` says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.near_names import did_you_mean

GIB = 2**30
MIB = 2**20
MOST_CARDS = 1024

Unified = Literal["", "metal", "cuda", "vulkan"]


class MachineError(V4QuantError):
    """A machine that cannot be read or does not exist."""


@dataclass(frozen=True)
class Card:
    """One accelerator, or the memory a chip shares with its GPU.

    nbytes: what the driver reports. generation: compute capability as `verify --gpu` takes it, ""
    where no engine but llama.cpp has kernels. bandwidth: bytes per second. host: whose machine it
    is usually in, which decides what is assumed of system memory.
    """

    name: str
    title: str
    nbytes: int
    generation: str
    bandwidth: float
    host: Literal["desktop", "workstation", "server"] = "desktop"
    unified: Unified = ""


@dataclass(frozen=True)
class Machine:
    """Equal cards and system memory; sizes in bytes, bandwidths in bytes per second.

    For unified memory `count` is 1 a box, the card's memory is all there is, and `ram` is 0.
    assumptions: what the name left open, as sentences.
    """

    name: str
    count: int
    card: Card | None
    ram: int
    ram_bandwidth: float
    disk_bandwidth: float = 3e9
    assumptions: tuple[str, ...] = ()

    @property
    def unified(self) -> Unified:
        """How memory is shared between processor and GPU; "" where it is not."""
        return "" if self.card is None else self.card.unified

    @property
    def generation(self) -> str:
        """Compute capability of the cards; "" for none or one no table has."""
        return "" if self.card is None else self.card.generation

    @property
    def is_amd(self) -> bool:
        """Whether its cards are AMD's."""
        return self.card is not None and self.card.name.startswith(("7900", "mi300"))

    @property
    def title(self) -> str:
        """The machine in words."""
        if self.card is None:
            return f"no card, {_gib(self.ram)} of memory"
        if self.unified:
            boxes, each = (f"{self.count} x ", " each") if self.count > 1 else ("", "")
            return f"{boxes}{self.card.title}, {_gib(self.card.nbytes)} of unified memory{each}"
        return (
            f"{self.count} x {self.card.title} ({_gib(self.card.nbytes)} each), "
            f"{_gib(self.ram)} of memory"
        )


def _cards(*rows: tuple[str, str, int, str, int]) -> list[Card]:
    return [Card(n, t, mib * MIB, g, bw * 1e9) for n, t, mib, g, bw in rows]


def _unified(name: str, title: str, gib: int, bandwidth: int, kind: Unified, gen: str = "") -> Card:
    return Card(name, title, gib * GIB, gen, bandwidth * 1e9, "desktop", kind)


_DESKTOP = _cards(
    ("3060", "RTX 3060", 12288, "sm86", 360),
    ("3090", "RTX 3090", 24576, "sm86", 936),
    ("3090-ti", "RTX 3090 Ti", 24564, "sm86", 1008),
    ("4060-ti-16", "RTX 4060 Ti 16 GB", 16380, "sm89", 288),
    ("4080", "RTX 4080", 16376, "sm89", 717),
    ("4090", "RTX 4090", 24564, "sm89", 1008),
    ("5060-ti-16", "RTX 5060 Ti 16 GB", 16311, "sm120", 448),
    ("5070-ti", "RTX 5070 Ti", 16303, "sm120", 896),
    ("5080", "RTX 5080", 16303, "sm120", 960),
    ("5090", "RTX 5090", 32607, "sm120", 1792),
    ("7900-xtx", "Radeon RX 7900 XTX", 24560, "", 960),
)
_WORKSTATION = _cards(
    ("a6000", "RTX A6000", 49140, "sm86", 768),
    ("rtx-6000-ada", "RTX 6000 Ada", 49140, "sm89", 960),
    ("rtx-pro-5000", "RTX PRO 5000", 48935, "sm120", 1344),
    ("rtx-pro-6000", "RTX PRO 6000", 97887, "sm120", 1792),
)
_SERVER = _cards(
    ("v100-32", "V100 32 GB", 32510, "", 900),
    ("a40", "A40", 46068, "sm86", 696),
    ("a100-40", "A100 40 GB", 40960, "sm80", 1555),
    ("a100", "A100 80 GB", 81920, "sm80", 2039),
    ("l40s", "L40S", 46068, "sm89", 864),
    ("h20", "H20", 97871, "sm90", 4000),
    ("h100", "H100 80 GB", 81559, "sm90", 3350),
    ("h100-nvl", "H100 NVL", 95830, "sm90", 3938),
    ("h200", "H200", 143771, "sm90", 4800),
    ("gh200", "GH200 96 GB", 97871, "sm90", 4000),
    ("b200", "B200", 183359, "sm100", 8000),
    ("b300", "B300", 275040, "sm103", 8000),
    ("mi300x", "MI300X", 196592, "", 5300),
)
_SHARED = [
    _unified("m1-max-64", "Apple M1 Max", 64, 400, "metal"),
    _unified("m1-ultra-128", "Apple M1 Ultra", 128, 800, "metal"),
    _unified("m2-max-96", "Apple M2 Max", 96, 400, "metal"),
    _unified("m2-ultra-192", "Apple M2 Ultra", 192, 800, "metal"),
    _unified("m3-max-128", "Apple M3 Max", 128, 400, "metal"),
    _unified("m3-ultra-96", "Apple M3 Ultra", 96, 819, "metal"),
    _unified("m3-ultra-256", "Apple M3 Ultra", 256, 819, "metal"),
    _unified("m3-ultra-512", "Apple M3 Ultra", 512, 819, "metal"),
    _unified("m4-pro-64", "Apple M4 Pro", 64, 273, "metal"),
    _unified("m4-max-64", "Apple M4 Max", 64, 546, "metal"),
    _unified("m4-max-128", "Apple M4 Max", 128, 546, "metal"),
    _unified("dgx-spark", "DGX Spark (GB10)", 119, 273, "cuda", "sm121"),
    _unified("strix-halo-128", "Ryzen AI Max+ 395", 125, 256, "vulkan"),
]

CARDS: dict[str, Card] = {
    c.name: c
    for c in (
        *_DESKTOP,
        *(replace(c, host="workstation") for c in _WORKSTATION),
        *(replace(c, host="server") for c in _SERVER),
        *_SHARED,
    )
}
_SPOKEN = {
    "m3-ultra": "m3-ultra-512",
    "m2-ultra": "m2-ultra-192",
    "m4-max": "m4-max-128",
    "m3-max": "m3-max-128",
    "spark": "dgx-spark",
    "gb10": "dgx-spark",
    "strix-halo": "strix-halo-128",
    "ryzen-ai-max-395": "strix-halo-128",
    "pro-6000": "rtx-pro-6000",
    "a100-80": "a100",
    "h100-80": "h100",
    "h200-141": "h200",
    "rtx-a6000": "a6000",
    "rtx-6000-pro": "rtx-pro-6000",
}
# What a size alone most likely is: its generation and bandwidth are then assumed.
_BY_SIZE = {
    12: "3060", 16: "4080", 24: "3090", 32: "5090", 40: "a100-40", 48: "a6000", 80: "h100",
    96: "rtx-pro-6000", 128: "dgx-spark", 141: "h200", 180: "b200", 192: "b200", 288: "b300",
}  # fmt: skip

# GiB of system memory and bytes per second that are assumed for a card, and at most for a machine.
_HOSTS = {
    "desktop": (64, 256, 60e9),
    "workstation": (128, 512, 60e9),
    "server": (256, 2048, 300e9),
}
_CPU_BANDWIDTH = _HOSTS["desktop"][2]


def parse_machine(name: str) -> Machine:
    """A machine by name: `2x3090`, `8xh100`, `m3-ultra-512`. Raises MachineError."""
    match = re.fullmatch(r"\s*(?:(\d{1,4})\s*x\s*)?(.+?)\s*", name.lower())
    number = int(match[1] or 1) if match else 0
    if match is None or not 1 <= number <= MOST_CARDS:
        raise MachineError(f"'{name}' names no machine; {_advice('')}")
    return _machine(name, number, _find_card(match[2]))


def parse_cards(text: str) -> Machine:
    """Cards by number and size or name: `2x24GB`, `4x3090`, `none`. Raises MachineError."""
    if text.strip().lower() in ("none", "0", "cpu"):
        notes = (_ram_note(64), _bandwidth_note(_CPU_BANDWIDTH))
        return Machine("cpu", 0, None, 64 * GIB, _CPU_BANDWIDTH, assumptions=notes)
    match = re.fullmatch(r"\s*(\d{1,4})\s*x\s*(.+?)\s*", text.lower())
    if match is None or not 1 <= int(match[1]) <= MOST_CARDS:
        raise MachineError(f"'{text}' names no cards; write it like 2x24GB or 2x3090")
    if re.fullmatch(r"\d{1,6}", match[2]) and int(match[2]) in _BY_SIZE:
        raise MachineError(f"'{text}' has no unit; write {match[1]}x{match[2]}GB")
    size = re.fullmatch(r"\d+(\.\d+)?\s*[mgt]i?b?", match[2])
    if size is None:
        return _machine(text, int(match[1]), _find_card(match[2]))
    nbytes = boxed_size(match[2])
    if nbytes < GIB:
        raise MachineError(f"'{text}' are cards of {nbytes:,} bytes; write it like 4x24GB")
    likely = CARDS[_BY_SIZE[min(_BY_SIZE, key=lambda gib: abs(gib * GIB - nbytes))]]
    card = replace(
        likely, name=match[2], title=f"card of {match[2].upper()}", nbytes=nbytes, unified=""
    )
    note = (
        f"a card of {match[2].upper()} is taken to be like {likely.title} "
        f"({likely.generation or 'no CUDA'}, {likely.bandwidth / 1e9:.0f} GB/s); name it instead "
        "(2x3090) or give --gpu if it is another"
    )
    machine = _machine(text, int(match[1]), card)
    return replace(machine, assumptions=(note, *machine.assumptions))


def boxed_size(text: str) -> int:
    """Bytes of a size as sold: `128GB` is 128 GiB, `98304MiB` what it says. Raises MachineError."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([mgt])i?b?\s*", text.lower())
    if match is None:
        unit = f"has no unit; write {text.strip()}GB" if text.strip().isdecimal() else ""
        raise MachineError(f"'{text}' {unit or 'is not a size of memory; write it like 128GB'}")
    return int(float(match[1]) * {"m": MIB, "g": GIB, "t": 1024 * GIB}[match[2]])


def with_memory(machine: Machine, ram: str | None, bandwidth: float | None) -> Machine:
    """The machine with another amount of memory, or bandwidth of it (GB/s)."""
    if ram is not None:
        if machine.unified:
            raise MachineError(
                f"{machine.title}: processor and GPU share one memory, so --ram says nothing more"
            )
        kept = tuple(a for a in machine.assumptions if not a.startswith("system memory"))
        machine = replace(machine, ram=boxed_size(ram), assumptions=kept)
        if machine.ram > _HOSTS["desktop"][1] * GIB and bandwidth is None:
            machine = _with_more_channels(machine)
    if bandwidth is not None:
        kept = tuple(a for a in machine.assumptions if not a.startswith("memory of"))
        machine = replace(machine, ram_bandwidth=bandwidth * 1e9, assumptions=kept)
    return machine


def _with_more_channels(machine: Machine) -> Machine:
    """With a server's bandwidth, where a desktop's was assumed: it could not hold this much."""
    server = _HOSTS["server"][2]
    notes = list(machine.assumptions)
    for index, note in enumerate(notes):
        if note == _bandwidth_note(machine.ram_bandwidth) and machine.ram_bandwidth < server:
            notes[index] = _bandwidth_note(server)
            return replace(machine, ram_bandwidth=server, assumptions=tuple(notes))
    return machine


def with_generation(machine: Machine, generation: str) -> Machine:
    """The machine with cards of another generation."""
    if machine.card is None:
        raise MachineError("--gpu says which cards: there are none")
    kept = tuple(a for a in machine.assumptions if not a.startswith("a card of"))
    return replace(machine, card=replace(machine.card, generation=generation), assumptions=kept)


def _machine(name: str, count: int, card: Card) -> Machine:
    if card.unified:
        return Machine(name, count, card, 0, card.bandwidth)
    each, most, bandwidth = _HOSTS[card.host]
    gib = min(each * count, most)
    notes = (_ram_note(gib), _bandwidth_note(bandwidth))
    return Machine(name, count, card, gib * GIB, bandwidth, assumptions=notes)


def _ram_note(gib: int) -> str:
    return f"system memory of {gib} GB is assumed; say what you have with --ram"


def _bandwidth_note(bandwidth: float) -> str:
    return (
        f"memory of {bandwidth / 1e9:.0f} GB/s is assumed, which decides the speed of what lies "
        "there; say what yours has with --ram-bandwidth"
    )


def _find_card(name: str) -> Card:
    short = re.sub(r"\s+", "-", name.strip())
    for prefix in ("", "rtx-", "nvidia-", "geforce-rtx-", "apple-"):
        found = short.removeprefix(prefix) if prefix else short
        found = _SPOKEN.get(found, found)
        if found in CARDS:
            return CARDS[found]
    raise MachineError(f"'{name}' is not a known machine; {_advice(short)}")


def _advice(name: str) -> str:
    return (
        f"{did_you_mean(name, [*CARDS, *_SPOKEN])}known are {', '.join(CARDS)}; write 2x3090 for "
        "two of a card, or give --cards 2x24GB --ram 128GB"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.0f} GB"
