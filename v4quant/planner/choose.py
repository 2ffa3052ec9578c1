"""choose: the few files a machine can serve, best quality first, and what would do where none fits.

Every scheme of every container an engine loads is a candidate, and so is the release itself where
an engine takes it as it is. One is kept unless a better one is about as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from v4quant.planner import for_llama_cpp, for_sglang, for_vllm
from v4quant.planner.candidates import Candidate, Request
from v4quant.planner.footprint import Outline
from v4quant_kernels.scheme import SCHEMES

_MOST = 5
# A worse file is worth showing beside a better one when it is this much faster; the second figure
# and so on where there are too many.
_FASTER = (1.25, 1.5, 2.0, 3.0)
_LEAST_BITS = 2.0
_ENGINES = {
    "llama.cpp": for_llama_cpp.candidates,
    "vllm": for_vllm.candidates,
    "sglang": for_sglang.candidates,
}


@dataclass(frozen=True)
class Answer:
    """Candidates, best quality first; where there are none, `remedies` says what would do."""

    candidates: tuple[Candidate, ...]
    remedies: tuple[str, ...]


def choose(outline: Outline, request: Request) -> Answer:
    """The files of `outline` that the machine can serve. Raises what reading its config raises."""
    found: list[Candidate] = []
    remedies: list[str] = []
    for engine in request.engines:
        kept, missing = _ENGINES[engine](outline, request)
        found += kept
        remedies += missing
    return Answer(tuple(_best(_joined(found))), tuple(_said_once(remedies)))


def _said_once(remedies: Sequence[str]) -> list[str]:
    """What several engines say alike, in one line: `vllm, sglang: ...`."""
    engines: dict[str, list[str]] = {}
    for remedy in remedies:
        engine, _, told = remedy.partition(": ")
        engines.setdefault(told, []).append(engine)
    return [f"{', '.join(names)}: {told}" for told, names in engines.items()]


def _joined(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without SGLang's where vLLM serves the release as well: its options then stand beside."""
    release = {c.engine: c for c in candidates if c.recipe is None and not c.budget}
    if "vllm" not in release or "sglang" not in release:
        return list(candidates)
    both = replace(release["vllm"], sglang=release["sglang"].options)
    gone = (release["vllm"], release["sglang"])
    return [both, *(c for c in candidates if c not in gone)]


def _best(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those no better one outdoes: first the best in quality, then what is clearly faster.

    What waits for the disk is there only where nothing else fits. A mixture, which takes a recipe,
    does not stand in the way of the plain scheme below it.
    """
    resident = [c for c in candidates if not c.where.disk]
    ordered = sorted(
        resident or candidates, key=lambda c: (c.loss.order, -c.tokens_per_second, c.size)
    )
    ordered = _worth_showing(ordered)
    for factor in _FASTER:
        kept = _front(ordered, factor)
        kept += [c for c in _roomier(ordered, kept) if c not in kept]
        # The way in another engine is worth a line, slower or not.
        kept += [c for c in _other_engines(ordered, kept) if c.loss.order > kept[0].loss.order]
        if len(kept) <= _MOST:
            break
    return sorted(kept[:_MOST], key=lambda c: (c.loss.order, -c.tokens_per_second))


def _worth_showing(ordered: Sequence[Candidate]) -> list[Candidate]:
    """Without types below two bits, unless nothing else fits: no speed makes up for their loss.

    Where tokens wait for a disk it may, so there they stay.
    """
    if any(c.where.disk for c in ordered):
        return list(ordered)
    good = [c for c in ordered if c.recipe is None or _bits(c) >= _LEAST_BITS]
    plain = [c for c in good if not c.budget]
    return good if plain else list(ordered)


def _bits(candidate: Candidate) -> float:
    assert candidate.recipe is not None
    return SCHEMES[candidate.recipe.scheme].bits_per_weight


def _roomier(ordered: Sequence[Candidate], kept: Sequence[Candidate]) -> list[Candidate]:
    """The best file that leaves room, where the best of all nearly fills the memory."""
    first = next((c for c in kept if not c.budget), None)
    if first is None or not first.tight:
        return []
    return [c for c in ordered if c.size < first.size and not c.tight and not c.budget][:1]


def _front(ordered: Sequence[Candidate], factor: float) -> list[Candidate]:
    """The first, and every later one that is faster by `factor` than all kept before it."""
    kept: list[Candidate] = []
    for candidate in ordered:
        faster = (
            candidate.tokens_per_second >= factor * other.tokens_per_second
            for other in kept
            if candidate.budget or not other.budget
        )
        if all(faster):
            kept.append(candidate)
    return kept


def _other_engines(ordered: Sequence[Candidate], kept: Sequence[Candidate]) -> list[Candidate]:
    """The best candidate of each engine that `kept` has none of."""
    missing = {c.engine for c in ordered} - {c.engine for c in kept}
    return [next(c for c in ordered if c.engine == engine) for engine in sorted(missing)]
