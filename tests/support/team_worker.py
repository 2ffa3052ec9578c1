"""One rank of a team that solves the tiny random checkpoint: experts, one attention and the head.

Started by torchrun (`python -m tests.support.team_worker FOLDER [PATIENCE]`), or alone; the windows
are the same in every process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from v4quant.calibration.ranks import solving_team
from v4quant.conversion import board
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solve import solve
from v4quant_formats.deepseek_v4 import PROJECTIONS, expert_module
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES, Scheme

TINY = Path(__file__).parents[1] / "data" / "tiny-a"
CONFIG = load_model_config(TINY)
_LAYER = "layers.1"
_DENSE = ("wq_a", "wkv", "wq_b", "wo_a", "wo_b", "indexer.wq_b", "compressor.wkv")


def windows() -> list[Tensor]:
    """Five texts of unequal lengths, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    lengths = (48, 30, 64, 17, 41)
    return [torch.randint(0, CONFIG.vocab_size, (n,), generator=generator) for n in lengths]


def schemes() -> dict[str, Scheme]:
    """Every expert in one type, one layer's attention and shared expert and the head in another."""
    stages = [f"layers.{i}" for i in range(CONFIG.num_hidden_layers)] + ["mtp.0"]
    experts = [
        expert_module(stage, expert, projection)
        for stage in stages
        for expert in range(CONFIG.n_routed_experts)
        for projection in PROJECTIONS
    ]
    dense = [f"{_LAYER}.attn.{name}" for name in _DENSE]
    dense += [f"{_LAYER}.ffn.shared_experts.{p}" for p in PROJECTIONS]
    return dict.fromkeys(experts, SCHEMES["q4_0"]) | dict.fromkeys(
        [*dense, "head"], SCHEMES["q5_0"]
    )


def main(folder: Path) -> None:
    """Solve into `folder`."""
    settings = SolveSettings(SCHEMES["mxfp4"], sweeps=2, schemes=schemes())
    with open_checkpoint(TINY) as checkpoint, solving_team(torch.device("cpu")) as (team, _):
        solve(
            checkpoint, CONFIG, windows(), ForwardOptions(), 1, settings, folder, SilentProgress(),
            team=team,
        ).close()  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 2:  # how many seconds of silence are death
        board.PATIENCE = float(sys.argv[2])
    main(Path(sys.argv[1]))
