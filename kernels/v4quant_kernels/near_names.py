"""Near names: what somebody may have meant who wrote `q4_k_m`, `Q4_K`, `int4` or `iq2xxs`.

Wherever a name is looked up (schemes, engines, formats, presets, releases, machines, keys of a
file), the error that says it is unknown begins with what `did_you_mean` finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_MOST = 3
_LONGEST = 64  # a name from a file may have a megabyte
_LIKE_ENOUGH = 0.6


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of `known` that are spelled much like `name`, the likeliest first.

    Case and punctuation do not count: a name that is the same without them is the only answer.
    Names that go on where `name` ends, or end where it goes on, come before those that differ
    inside.
    """
    from difflib import SequenceMatcher  # only errors need it

    wanted = _bare(name[:_LONGEST])
    if not wanted:
        return []
    ranked = []
    for candidate in dict.fromkeys(known):
        bare = _bare(candidate)
        if bare == wanted:
            return [candidate]
        begins = min(len(bare), len(wanted)) > 2 and (
            bare.startswith(wanted) or wanted.startswith(bare)
        )
        likeness = SequenceMatcher(None, wanted, bare).ratio()
        if begins or likeness >= _LIKE_ENOUGH:
            ranked.append((not begins, -likeness, candidate))
    begun = [r for r in ranked if not r[0]]
    return [candidate for *_, candidate in sorted(begun or ranked, key=lambda r: r[:2])][:_MOST]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean q4_k? `, to stand before what is known; "" where nothing is near."""
    near = near_names(name, known)
    return f"did you mean {' or '.join(near)}? " if near else ""


def not_one_of(name: str, known: Iterable[str], where: str = "") -> str:
    """`'vLLM' is not one of neutral, vllm; did you mean vllm?`. where: said behind the name."""
    names = list(known)
    meant = did_you_mean(name, names).rstrip()
    return f"'{name}'{where} is not one of {', '.join(names)}" + (f"; {meant}" if meant else "")


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
