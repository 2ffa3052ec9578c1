"""coverage: draw text until every expert has seen enough of its own tokens.

A router sends most tokens to few experts, so a corpus that feeds the average expert well may leave
some with nothing. Drawing goes in rounds. The first takes the windows asked for; as long as some
expert has fewer tokens than the floor, and text is left, another round takes the windows that
promise most to the starved. What a token id promises is learned from the rounds before: a hash
layer's table says outright which experts an id visits; in other layers each occurrence tells how
far an expert's router score lay below the last one chosen, and ids whose occurrences came close are
the likeliest to get there in another context. All starved experts of all layers vote, each with
what it lacks of the floor, and one number per token id is all that is kept. Who is starved is known
only when a layer's last token has been routed, so a layer's router scores are kept until then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from v4quant_calibration.model.params import Params
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.model_config import ModelConfig

# A round draws this share of what was drawn before, so that there are few rounds.
_ROUND = 0.5
# Tokens whose nearness to starved experts is computed at once.
_ROWS = 4096


class Demand:
    """How much starved experts want each token id, learned while a round streams."""

    def __init__(self, config: ModelConfig, params: Params, floor: int) -> None:
        """Nothing wanted yet. floor: tokens per expert must see."""
        self._config, self._params, self._floor = config, params, floor
        self._ids = torch.empty(0, dtype=torch.int64)
        self._routed = 0
        self._scores: Tensor | None = None
        self.wanted = torch.zeros(config.vocab_size, dtype=torch.float64)

    def begin(self, windows: Sequence[Tensor]) -> None:
        """A new round over these windows: forget what the last one taught."""
        self._ids = torch.cat(list(windows))
        self.wanted.zero_()

    def follow(self, token_ids: Tensor) -> None:
        """The rows that layers get from now on stand for these ids of the round's text."""
        self._ids = token_ids

    def learn(self, layer: str, x: Tensor, tokens: Tensor) -> None:
        """Tokens of one layer of the round, in order: expert inputs x `[n, hidden]`, and how many
        tokens each expert has so far, these included, int64 `[E]`."""
        lack = (1 - tokens / self._floor).clamp_min(0).double()
        starved = lack.nonzero().squeeze(1)
        facts = self._config.facts(layer)
        first, self._routed = self._routed, self._routed + x.shape[0]
        if len(starved) and not facts.hashed:
            self._keep_scores(f"{layer}.ffn.gate", x, first)
        if self._routed < len(self._ids):
            return
        if len(starved) and facts.hashed:
            self.wanted += lack[self._params(f"{layer}.ffn.gate.tid2eid").cpu()].sum(1)
        elif len(starved):
            self._learn_scores(starved, lack[starved], facts.experts_per_token)
        self._routed, self._scores = 0, None

    def _keep_scores(self, gate: str, x: Tensor, first: int) -> None:
        found = softplus(x @ self._params(gate).mT).sqrt() + self._params(f"{gate}.bias")
        if self._scores is None:
            self._scores = torch.empty(len(self._ids), found.shape[1])
        self._scores[first : self._routed] = found

    def _learn_scores(self, starved: Tensor, lack: Tensor, chosen: int) -> None:
        assert self._scores is not None
        unit, near = self._scores.std().clamp_min(1e-6), []
        for biased in torch.split(self._scores, _ROWS):
            last = biased.topk(chosen, 1).values[:, -1:]
            below = (last - biased[:, starved]).clamp_min(0)
            near.append(torch.exp(-below / unit).double() @ lack)
        self._add(torch.cat(near))

    def _add(self, near: Tensor) -> None:
        """How near each token of the round came, by the ids they stand for."""
        size = self._config.vocab_size
        seen = torch.bincount(self._ids, minlength=size)
        total = torch.bincount(self._ids, weights=near, minlength=size)
        # Ids this round has not met promise the average.
        self.wanted += torch.where(seen > 0, total / seen.clamp_min(1), near.mean())


def next_round(reserve: Sequence[Tensor], drawn: int, wanted: Tensor) -> list[int]:
    """Indices of the reserve's windows to draw next, ascending: those that promise most a token.

    drawn: windows drawn so far. wanted: float64 `[vocab]`.
    """
    gain = torch.stack([wanted[ids].mean() for ids in reserve])
    count = min(len(reserve), max(1, int(drawn * _ROUND)))
    return sorted(gain.argsort(descending=True, stable=True)[:count].tolist())


def spread(tokens: Tensor) -> dict[str, int]:
    """Distribution of token counts over experts: minimum, quartiles, maximum."""
    ordered = tokens.sort().values
    last = len(ordered) - 1
    places = {"min": 0, "q1": last // 4, "median": last // 2, "q3": 3 * last // 4, "max": last}
    return {name: int(ordered[place]) for name, place in places.items()}


def coverage(stats: Stats) -> dict[str, object]:
    """Coverage in the form reports and `--json` use."""
    return {
        "measured_on": "calibration",
        "floor": stats.floor,
        "layers": [
            {
                "name": name,
                "tokens_per_expert": stage.tokens.tolist(),
                "spread": spread(stage.tokens),
                "first_draw": spread(stats.first[name]) if name in stats.first else None,
            }
            for name, stage in stats.stages.items()
        ],
        "starved": [
            {"layer": layer, "expert": expert, "tokens": tokens}
            for layer, expert, tokens in stats.starved()
        ],
    }
