"""A plan in words: what fits, where its bytes lie, what it costs, and what to type."""

from __future__ import annotations

from collections.abc import Sequence

from v4quant.planner.candidates import Candidate, Way
from v4quant.planner.choose import Answer
from v4quant.planner.commands import Commands
from v4quant.planner.effort import hours_text
from v4quant.planner.machines import Machine

_TITLES = {"llama.cpp": "llama.cpp", "vllm": "vLLM", "sglang": "SGLang"}


def answer_text(
    answer: Answer, machine: Machine, commands: Sequence[Commands], context: int
) -> str:
    """The whole answer; `commands` are those of the candidates, in their order.

    context: tokens that were asked for.
    """
    lines = [f"machine: {machine.title}", *(f"  ({note})" for note in machine.assumptions), ""]
    if not answer.candidates:
        lines.append("Nothing fits. What would do:")
        lines += [f"  {remedy}" for remedy in answer.remedies]
        return "\n".join(lines)
    for number, (candidate, typed) in enumerate(zip(answer.candidates, commands, strict=True), 1):
        lines += _candidate(number, candidate, machine, context)
        lines += _commands(typed)
        lines.append("")
    if answer.remedies:
        lines.append("Not among these:")
        lines += [f"  {remedy}" for remedy in answer.remedies]
    return "\n".join(lines).rstrip()


def _candidate(number: int, candidate: Candidate, machine: Machine, asked: int) -> list[str]:
    what = candidate.scheme if candidate.recipe or candidate.budget else "the release as it is"
    lines = [
        f"{number}. {what} in {_TITLES[candidate.engine]}: {_gb(candidate.size)}",
        f"   where      {_where(candidate, machine)}",
        f"   context    {_context(candidate, asked)}",
        f"   loss       {candidate.loss.sentence()}",
    ]
    if candidate.loss.published:
        lines.append(f"              {candidate.loss.published}")
    if candidate.cost is not None:
        lines.append(f"   to make    {candidate.cost.sentence()}: {candidate.cost.level.words}")
    for title, ways in (("better", candidate.better), ("quicker", candidate.quicker)):
        if ways:
            lines.append(f"   {title:<10} {'; '.join(map(_way, ways))}")
    lines.append(
        f"   speed      at most {_rate(candidate.tokens_per_second)} tokens per second, one at a "
        "time: a bound from bandwidth, no measurement"
    )
    lines += [f"   note       {note}" for note in candidate.notes]
    return lines


def _context(candidate: Candidate, asked: int) -> str:
    several = f", or {candidate.sequences} sequences of {asked:,} at once"
    return f"{candidate.context:,} tokens fit{several if candidate.sequences > 1 else ''}"


def _commands(typed: Commands) -> list[str]:
    lines = []
    for title, group in (
        ("fetch", typed.fetch), ("make", typed.make), ("check", typed.check),
        ("serve", typed.serve), ("or", typed.sglang),
    ):  # fmt: skip
        for index, line in enumerate(group):
            lines.append(f"   {title if index == 0 else '':<7}$ {line}")
    return lines


def _where(candidate: Candidate, machine: Machine) -> str:
    parts = []
    cards = candidate.where.cards
    if machine.unified and len(cards) == 1:
        parts.append(f"{_gb(cards[0])} of {_gb(_card_bytes(machine))} in unified memory")
    elif cards:
        alike = len(set(cards)) == 1 and len(cards) > 1
        room = _gb(_card_bytes(machine))
        what = "boxes" if machine.unified else "cards"
        each = f"{_gb(cards[0])} of {room} on each of {len(cards)} {what}"
        several = f"{' + '.join(map(_gb, cards))} on the {what} of {room} each"
        one = f"{_gb(cards[0])} of {room} on the card"
        parts.append(one if len(cards) == 1 else each if alike else several)
    if candidate.where.memory:
        parts.append(f"{_gb(candidate.where.memory)} of {_gb(machine.ram)} in system memory")
    if candidate.where.disk:
        parts.append(f"{_gb(candidate.where.disk)} on disk only")
    return ", ".join(parts)


def _card_bytes(machine: Machine) -> int:
    return 0 if machine.card is None else machine.card.nbytes


def _way(way: Way) -> str:
    loses = "" if way.kl is None else f" and KL {way.kl:.4f}"
    return f"--effort {way.effort}, {hours_text(way.hours)}{loses}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
