"""What a written checkpoint is worth on text it never saw.

The folder is read back by transformers, so that the number belongs to the stored bytes rather than
to the weights in memory, and so that a name it does not know is noticed at once.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV4ForCausalLM

from tiny_v4_training.mtp import MtpStage, trunk_streams


class NotLoadable(Exception):
    """transformers found names missing or did not know them."""


def load_written(folder: Path) -> DeepseekV4ForCausalLM:
    """Read a checkpoint folder back in float32. Raises NotLoadable unless every name fits."""
    # bfloat16 first: read as float32, the parts stored in bfloat16 would keep that type.
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
    )
    wrong = {k: sorted(v)[:5] for k, v in report.items() if v}
    if wrong:
        raise NotLoadable(f"{folder}: {wrong}")
    return model.float().eval()


def heldout_windows(ids: Tensor, length: int, limit: int, bos: int) -> Tensor:
    """int64 `[n, length]` of consecutive windows, each BOS and `length - 1` tokens; n <= limit."""
    step = length - 1
    count = min(limit, ids.numel() // step)
    body = ids[: count * step].reshape(count, step)
    return torch.cat([torch.full((count, 1), bos, dtype=torch.int64), body], dim=1)


@torch.no_grad()
def perplexity(model: DeepseekV4ForCausalLM, windows: Tensor) -> tuple[float, float]:
    """Perplexity over all tokens but the BOS, and its standard error over windows.

    Tokens of one window are not independent, so the error comes from the windows' means.
    """
    means = []
    for window in windows:
        logits = model(window.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        means.append(float(F.cross_entropy(logits, window[1:])))
    nll = torch.tensor(means, dtype=torch.float64)
    value = math.exp(float(nll.mean()))
    error = float(nll.std()) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return value, value * error


@torch.no_grad()
def draft_agreement(trunk: DeepseekV4ForCausalLM, stage: MtpStage, windows: Tensor) -> float:
    """Share of positions where the draft stage names the trunk's greedy next-but-one token."""
    same = total = 0
    for window in windows.unsqueeze(1):
        streams, logits = trunk_streams(trunk, window)
        guess = stage(trunk, streams[:, :-1], window[:, 1:]).argmax(-1)
        agree = guess == logits[:, 1:].argmax(-1)
        same += int(agree.sum())
        total += agree.numel()
    return same / total
