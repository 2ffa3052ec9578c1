"""The words of the page, and a sentence for each unusual figure with this run's own numbers."""

from __future__ import annotations

import math

from v4quant.evaluation.figures import Figures
from v4quant.evaluation.report.text import percent, plain

TERMS = (
    (
        "KL (divergence)",
        "how far the probabilities of the next token moved from the source's, in nats per token, "
        "over the whole vocabulary; 0 if not at all.",
    ),
    (
        "Noise floor",
        "the source compared with itself under another legitimate rounding. Only what exceeds "
        "it is caused by the conversion.",
    ),
    (
        "Perplexity",
        "how surprised the model is by the text, as a number of equally likely tokens. Gains and "
        "losses cancel in it, so it can stay while answers change.",
    ),
    (
        "Same top-1 token",
        "share of tokens for which the most probable next token stays the same. Most that change "
        "were near ties.",
    ),
    (
        "Stretch",
        "up to 512 consecutive tokens of one window; neighbours are hard or easy together, so "
        "tests and error bars count stretches, not tokens.",
    ),
    ("99th percentile", "one token in a hundred has a larger KL."),
    (
        "Local and stream error",
        "of a layer: what it adds alone, on the source's input, and what all layers so far have "
        "added up to, relative to what the layer adds.",
    ),
    (
        "Starved expert",
        "an expert reached by so few tokens that its error is poorly measured.",
    ),
)


def worked_sentences(result: Figures) -> list[str]:
    """What this run's unusual figures mean, one sentence each."""
    floor, lines = result.noise_floor, []
    for key, share in (("kl_p99", "One in 100"), ("kl_p999", "One in 1,000")):
        ours, base = getattr(result, key), getattr(floor, key)
        if ours is None or base is None or not base or not math.isfinite(ours / base):
            continue
        if ours / base >= 3:
            lines.append(
                f"{share} tokens has a KL of {plain(ours, 2)} nats or more, "
                f"{_times(ours / base)} times what rounding alone does to its worst: "
                f"{_meaning(ours)}."
            )
    flips = result.flips_confident
    if flips:
        lines.append(
            f"Of the tokens the source was more than half sure of, {percent(flips)} get another "
            "first choice: these change what the model writes."
        )
    return lines


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else plain(ratio, 2)


def _meaning(kl: float) -> str:
    if kl >= 1:
        return "the converted model expects something else there"
    if kl >= 0.1:
        return "probabilities moved by tens of percent"
    return "probabilities moved by a few percent, which rarely changes the choice"
