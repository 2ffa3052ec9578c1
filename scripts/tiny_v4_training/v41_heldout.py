"""What a written V4.1 is worth on text it never saw, with its Engram and without.

The folder is decoded again into the trainer's model, so that the figures belong to the stored
bytes. What the product computes from the same folder is another program's answer to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from tiny_v4_training.v41_draft import Draft, block_windows
from tiny_v4_training.v41_engram import hash_plan
from tiny_v4_training.v41_formats import BLOCK, E2M1
from tiny_v4_training.v41_model import V41Trunk


def v41_scores(out: Path, c: Mapping[str, Any], windows: Tensor) -> str:
    """Perplexities and the share of drafted tokens that are right, in words."""
    trunk, draft = load_v41(out, c)
    means: dict[bool, list[float]] = {True: [], False: []}
    right = torch.zeros(c["dspark_block_size"])
    with torch.no_grad():
        for window in windows.split(1):
            for trunk.engram_on in (False, True):
                logits, _, targets = trunk(window)
                loss = F.cross_entropy(logits[0, :-1].float(), window[0, 1:])
                means[trunk.engram_on].append(float(loss))
            anchors, before, wanted = block_windows(window, c["dspark_block_size"], 16)
            guess, _ = draft(trunk, targets, anchors, before)
            right += (guess.argmax(-1) == wanted).float().mean((0, 1)) / len(windows)
    nll = torch.tensor(means[True], dtype=torch.float64)
    value = math.exp(float(nll.mean()))
    error = value * float(nll.std()) / math.sqrt(len(nll))
    without = math.exp(sum(means[False]) / len(means[False]))
    drafted = " ".join(f"{100 * float(r):.0f}" for r in right)
    return (
        f"perplexity {value:.2f} +- {error:.2f}, without the Engram {without:.2f}, "
        f"drafted tokens right {drafted} %"
    )


def load_v41(folder: Path, c: Mapping[str, Any]) -> tuple[V41Trunk, Draft]:
    """The models with the weights that the files hold. Raises KeyError for a missing tensor."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    trunk, draft = V41Trunk(c, hash_plan(c, tokenizer)), Draft(c, 0)
    for module in (trunk, draft):
        _fill(module, tensors)
        module.eval()
    return trunk, draft


@torch.no_grad()
def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, target in module.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        if leaf in ("gate_up_proj", "down_proj"):
            which = ("w1", "w3") if leaf == "gate_up_proj" else ("w2",)
            for expert in range(target.shape[0]):
                at = f"{parent}.experts.{expert}"
                target[expert] = torch.cat([_decode(tensors, f"{at}.{w}.weight") for w in which])
        elif leaf == "e_score_correction_bias":
            target.copy_(tensors[f"{parent}.bias"])
        else:
            target.copy_(_decode(tensors, name))


def _decode(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    stored = tensors[name]
    scale = tensors.get(f"{name.removesuffix('.weight')}.scale")
    if not name.endswith(".weight") or scale is None:
        return stored.float()
    if stored.dtype == torch.int8:
        bytes_ = stored.view(torch.uint8).int()
        stored = E2M1[torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(-2)]
    factor = scale.float().repeat_interleave(BLOCK, 1)
    if factor.shape[0] != stored.shape[0]:
        factor = factor.repeat_interleave(BLOCK, 0)
    return stored.float() * factor[: stored.shape[0], : stored.shape[1]]
