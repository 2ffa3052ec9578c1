"""Token scores: what one position's logits say, gathered from stretches of the vocabulary.

A softmax needs the whole row, and a row of a large vocabulary for thousands of positions and
several models does not fit. So each stretch is used once and dropped; what stays is, per position,
the largest logit m, the sum of exp(l - m) (rescaled when a later stretch holds a larger one: the
online softmax of arXiv 1805.02867), the five largest with their ids, and the logit of the token
that follows. KL(p || q) needs one more sum: with p_i proportional to exp(l_i - m),

    KL = sum_i p_i (l_i - l'_i) - log Z_p + log Z_q.

Equal logits make every term and so the result exactly zero. Exponentials are taken in float32 as
the logits are, sums in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BEST = 5


class Softmax:
    """Running softmax of n rows: normaliser, best entries and the entry of each row's target."""

    def __init__(self, targets: Tensor, keep: int = BEST) -> None:
        """targets: int64 `[n]`, the token that follows. keep: how many of the best are kept."""
        count = targets.shape[0]
        self.targets = targets
        self._keep = keep
        self._sum = torch.zeros(count, dtype=torch.float64)
        self.peak = torch.full((count,), -torch.inf)
        self._target = torch.zeros(count)
        self._best = torch.empty(count, 0)
        self._ids = torch.empty(count, 0, dtype=torch.int64)

    def add(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Entries `first` .. of every row, `[n, c]` float32 on the CPU, finite.

        Returns exp(logits - peak) with the new peak, and the factor, float64 `[n]`, by which what
        was summed with the old one shrinks.
        """
        peak = torch.maximum(self.peak, logits.amax(-1))
        factor = (self.peak.double() - peak.double()).exp()
        powers = (logits - peak.unsqueeze(-1)).exp_()
        self._sum = self._sum * factor + powers.sum(-1, dtype=torch.float64)
        self.peak = peak
        place = self.targets - first
        here = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self._target = torch.where(here, found, self._target)
        best, ids = logits.topk(min(self._keep, logits.shape[1]), -1)
        best, ids = torch.cat([self._best, best], 1), torch.cat([self._ids, ids + first], 1)
        self._best, kept = best.topk(min(self._keep, best.shape[1]), -1)
        self._ids = ids.gather(1, kept)
        return powers, factor

    @property
    def log_sum(self) -> Tensor:
        """log of the sum of exp(l), float64 `[n]`."""
        return self._sum.log() + self.peak.double()

    @property
    def share_sum(self) -> Tensor:
        """Sum of exp(l - peak), float64 `[n]`."""
        return self._sum

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the target, float64 `[n]`."""
        return self.log_sum - self._target.double()

    @property
    def best(self) -> Tensor:
        """Ids of the largest, int64 `[n, keep]`, best first."""
        return self._ids

    @property
    def best_logits(self) -> Tensor:
        """Their logits, float32 `[n, keep]`."""
        return self._best

    @property
    def top_p(self) -> Tensor:
        """Probability of the best, float64 `[n]`."""
        return (self.peak.double() - self.log_sum).exp().clamp_max_(1)


class TokenScores:
    """Scores of n positions under several models; with more than one the first is the reference."""

    def __init__(self, targets: Tensor, models: int) -> None:
        """targets: int64 `[n]`."""
        self.softmax = [Softmax(targets) for _ in range(models)]
        self._gaps = [torch.zeros(targets.shape[0], dtype=torch.float64) for _ in range(models - 1)]

    def add(self, logits: Sequence[Tensor], first: int) -> None:
        """Entries `first` .. of every model's rows, `[n, c]`."""
        reference = logits[0].float().cpu()
        shares, factor = self.softmax[0].add(reference, first)
        for number, values in enumerate(logits[1:]):
            other = values.float().cpu()
            self.softmax[number + 1].add(other, first)
            gap = (shares * (reference - other)).sum(-1, dtype=torch.float64)
            self._gaps[number] = self._gaps[number] * factor + gap

    def columns(self) -> list[dict[str, Tensor]]:
        """Columns of TokenRecords of the models after the first; of the first when it is alone."""
        reference = self.softmax[0]
        if len(self.softmax) == 1:
            return [{"nll": reference.nll}]
        found = []
        for other, gap in zip(self.softmax[1:], self._gaps, strict=True):
            kl = gap / reference.share_sum - reference.log_sum + other.log_sum
            found.append(compared(other, reference.best, reference.nll, reference.top_p, kl))
        return found


def compared(
    other: Softmax, best: Tensor, nll_reference: Tensor, top_p: Tensor, kl: Tensor
) -> dict[str, Tensor]:
    """Columns of a model beside a reference of which these are known."""
    shared = (best.unsqueeze(2) == other.best[:, :BEST].unsqueeze(1)).any(2)
    nll = other.nll
    return {
        "nll": nll,
        "nll_reference": nll_reference,
        "kl": kl.clamp_min(0),
        "top1": best[:, 0] == other.best[:, 0],
        "top5": shared.double().mean(1),
        "top_p": top_p,
        "delta_p": (-nll).exp() - (-nll_reference).exp(),
    }


def score_tokens(logits: Tensor, targets: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
    """Columns of TokenRecords for whole rows of logits `[n, vocab]` predicting `targets` `[n]`."""
    scores = TokenScores(targets, 1 if reference is None else 2)
    scores.add([logits] if reference is None else [reference, logits], 0)
    return scores.columns()[0]
