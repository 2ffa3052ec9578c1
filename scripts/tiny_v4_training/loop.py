"""The training loop: one schedule for trunk and draft stage, and a state one can resume from.

Progress is the larger share of the two budgets, steps and minutes, whichever is nearer its end; the
learning rate warms up, stays flat to 35 % and falls linearly to zero. Windows are short for the
first 60 % and long after: short ones give more distinct text per second, long ones are needed for
the compressed layers to have anything to look back at. Windows are drawn from seed and step number,
so that a resumed run goes on with the text it would have seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from tiny_v4_training.model import IndexerDistillation, RouterBalance
from tiny_v4_training.mtp import MtpStage, trunk_streams
from tiny_v4_training.muon import make_optimisers
from tiny_v4_training.precision import product_dtype
from tiny_v4_training.text import Stream, draw_windows

WARM_UP = 25
FLAT_UNTIL = 0.35
LONG_FROM = 0.6
REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What a run is made of; a state is resumed only by a run with the same settings."""

    seed: int
    bos: int
    short: int  # tokens per window, first part
    long: int  # tokens per window, last part
    tokens_per_step: int
    save_minutes: float


@dataclass(frozen=True)
class Budget:
    """When a phase ends; None means unlimited."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget used, 1 at the end."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_time)


@dataclass
class Phase:
    """A model being trained: its loss on a batch, its optimisers, how far it has come."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor, float], tuple[Tensor, Tensor]]  # language model, everything else
    after_step: Callable[[], float]
    before_update: Callable[[], None] = lambda: None
    settled: Callable[[str], bool] = lambda name: False  # names that come trained from elsewhere
    step: int = 0
    seconds: float = 0.0
    optimisers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.optimisers = make_optimisers(self.model, self.settled)

    def state(self) -> dict[str, Any]:
        """Everything a later process needs to go on."""
        return {
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]


def rate(step: int, progress: float) -> float:
    """Learning-rate factor: warm-up, flat, linear to zero."""
    falling = min(1.0, (1 - progress) / (1 - FLAT_UNTIL))
    return max(0.0, min(1.0, (step + 1) / WARM_UP, falling))


def trunk_phase(trunk: DeepseekV4ForCausalLM) -> Phase:
    """The trunk on next-token loss plus indexer distillation."""
    balance, distillation = RouterBalance(trunk), IndexerDistillation(trunk)
    topk = trunk.config.index_topk

    def loss(windows: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        distillation.see_everything(progress < LONG_FROM, topk)
        logits = trunk(windows[:, :-2], use_cache=False).logits
        return _cross_entropy(logits, windows[:, 1:-1]), distillation.take_loss()

    return Phase("trunk", trunk, loss, balance.step)


def mtp_phase(stage: MtpStage, trunk: DeepseekV4ForCausalLM) -> Phase:
    """The draft stage on the loss of the token after the next; the trunk stays as it is."""
    trunk.requires_grad_(False).eval()
    balance = RouterBalance(stage)

    def loss(windows: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        del progress
        streams, _ = trunk_streams(trunk, windows[:, :-2])
        logits = stage(trunk, streams, windows[:, 1:-1])
        return _cross_entropy(logits, windows[:, 2:]), logits.new_zeros(())

    return Phase("mtp", stage, loss, balance.step)


def train(
    phase: Phase,
    budget: Budget,
    settings: Settings,
    streams: Sequence[Stream],
    save: Callable[[], None],
) -> None:
    """Run a phase to the end of its budget, saving every `save_minutes` and at the end."""
    phase.model.train()
    average, saved, reported = 0.0, phase.seconds, -REPORT_SECONDS
    first = phase.step
    while (progress := budget.progress(phase.step, phase.seconds)) < 1:
        began = time.monotonic()
        loss, side, crowding = _one_step(phase, progress, settings, streams)
        average += (loss - average) / min(50, phase.step - first + 1)
        phase.step += 1
        phase.seconds += time.monotonic() - began
        if phase.seconds - reported >= REPORT_SECONDS:
            reported = phase.seconds
            print(
                f"{phase.name} step {phase.step} ({100 * progress:.0f} %, {phase.seconds:.0f} s): "
                f"loss {average:.3f}, indexer KL {side:.3f}, fullest expert {crowding:.1f}x mean",
                file=sys.stderr,
                flush=True,
            )
        if phase.seconds - saved >= 60 * settings.save_minutes:
            saved = phase.seconds
            save()
    save()


def save_state(path: Path, settings: Settings, phases: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the training state so that the file is always either the old or the new one."""
    temporary = path.with_name(path.name + ".part")
    torch.save({"settings": _fingerprint(settings), "phases": dict(phases)}, temporary)
    temporary.replace(path)


def load_state(path: Path, settings: Settings) -> dict[str, Any]:
    """Phases of a saved state, empty when there is none.

    Raises ValueError when the state belongs to a run with other settings.
    """
    if not path.exists():
        return {}
    state = torch.load(path, weights_only=True)
    if state["settings"] != _fingerprint(settings):
        raise ValueError(f"{path}: belongs to a run with other settings; delete it to start anew")
    phases: dict[str, Any] = state["phases"]
    return phases


def _one_step(
    phase: Phase, progress: float, settings: Settings, streams: Sequence[Stream]
) -> tuple[float, float, float]:
    length = settings.short if progress < LONG_FROM else settings.long
    rows = max(1, settings.tokens_per_step // length)
    seed = settings.seed * 2**32 + phase.step * 2 + (phase.name == "mtp")
    windows = draw_windows(streams, rows, length + 2, settings.bos, seed)
    dtype = product_dtype()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, side = phase.loss(windows, progress)
    torch.autograd.backward(loss + side)
    phase.before_update()
    factor = rate(phase.step, progress)
    for optimiser in phase.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = optimiser.defaults["lr"] * factor
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return float(loss.detach()), float(side.detach()), phase.after_step()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.reshape(-1))


def _fingerprint(settings: Settings) -> str:
    return repr(settings)
