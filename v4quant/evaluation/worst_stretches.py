"""Where the text diverges most: window, place and words of the verdict's worst stretches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.corpus.tokenizer import TextTokenizer, TokenizerError
from v4quant_calibration.evaluation.scoring import token_blocks

_MOST_TOKENS = 512


def worst_stretches(
    verdict: Mapping[str, Any], corpus: Corpus, words: TextTokenizer
) -> list[dict[str, Any]]:
    """`worst_stretches` of a result: the verdict's worst, each with its place and its text.

    corpus: all that ran, in order. The text is "" where there is no usable tokenizer.
    """
    place = {
        int(block): (number, int((blocks == block).nonzero()[0]))
        for number, blocks in enumerate(token_blocks(corpus))
        for block in blocks.unique()
    }
    found = []
    for stretch in verdict["worst"]:
        window, start = place[stretch["block"]]
        ids = corpus.windows[window][start : start + min(stretch["tokens"] + 1, _MOST_TOKENS)]
        try:
            text = words.text(ids)
        except TokenizerError:
            text = ""
        part = corpus.parts[corpus.part_of[window]].name
        facts = {k: v for k, v in stretch.items() if k != "block"}
        found.append({"part": part, "window": window + 1, "start": start, **facts, "text": text})
    return found
