"""The two architectures behind one face: what the script asks of either to train, write and score.

`family_of` looks at `model_type`. V4 is transformers' model with a stage of ours behind it; V4.1 is
written here, since transformers has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import DeepseekV4ForCausalLM

from tiny_v4_training import export, heldout, loop, model, mtp, text
from tiny_v4_training.v41_draft import Draft
from tiny_v4_training.v41_engram import hash_plan
from tiny_v4_training.v41_export import write_v41_release
from tiny_v4_training.v41_heldout import v41_scores
from tiny_v4_training.v41_model import V41Trunk, initialise
from tiny_v4_training.v41_phases import v41_draft_phase, v41_trunk_phase
from tiny_v4_training.v41_start import continue_from, from_v4, from_v41, start_from

T = TypeVar("T", bound=nn.Module)
D = TypeVar("D", bound=nn.Module)


class Family(Protocol[T, D]):
    """One architecture, its trunk T and its draft D.

    `raw` is the release's config.json, `flat` the part on the text model.
    """

    raw: dict[str, Any]
    flat: Mapping[str, Any]

    def trunk(self, streams: Sequence[text.Stream], tokenizer: Tokenizer, seed: int) -> T:
        """A fresh trunk."""

    def start(self, trunk: T, draft: D, folder: Path) -> None:
        """Take over a trained checkpoint's weights."""

    def trunk_phase(self, trunk: T, start: Path | None) -> loop.Phase:
        """How the trunk is trained, afresh or started from another checkpoint."""

    def draft(self, seed: int) -> D:
        """Fresh draft stages."""

    def draft_phase(self, draft: D, trunk: T) -> loop.Phase:
        """How the draft is trained; freezes the trunk."""

    def write(self, out: Path, trunk: T, draft: D, tokenizer: Path, tokenizer_json: str) -> int:
        """Write the checkpoint and return its tensor bytes."""

    def scores(self, out: Path, draft: D, windows: torch.Tensor) -> str:
        """Held-out figures of the written folder, in words."""


class V4:
    """DeepSeek-V4."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.flat: Mapping[str, Any] = raw

    def trunk(
        self, streams: Sequence[text.Stream], tokenizer: Tokenizer, seed: int
    ) -> DeepseekV4ForCausalLM:
        """transformers' model with hash tables that suit the text."""
        del tokenizer
        return model.build_trunk(self.raw, text.token_counts(streams, self.raw["vocab_size"]), seed)

    def start(self, trunk: DeepseekV4ForCausalLM, draft: mtp.MtpStage, folder: Path) -> None:
        """Not offered: another run goes on from its own state."""
        raise SystemExit("--start is for V4.1, which it starts from a V4")

    def trunk_phase(self, trunk: DeepseekV4ForCausalLM, start: Path | None) -> loop.Phase:
        """Next-token loss and indexer distillation."""
        del start
        return loop.trunk_phase(trunk)

    def draft(self, seed: int) -> mtp.MtpStage:
        """The multi-token-prediction stage."""
        return mtp.MtpStage(self.raw, seed)

    def draft_phase(self, draft: mtp.MtpStage, trunk: DeepseekV4ForCausalLM) -> loop.Phase:
        """Loss of the token after the next."""
        return loop.mtp_phase(draft, trunk)

    def write(
        self,
        out: Path,
        trunk: DeepseekV4ForCausalLM,
        draft: mtp.MtpStage,
        tokenizer: Path,
        tokenizer_json: str,
    ) -> int:
        """The V4 layout."""
        states = trunk.state_dict(), draft.state_dict()
        return export.write_release(out, self.raw, *states, tokenizer, tokenizer_json)

    def scores(self, out: Path, draft: mtp.MtpStage, windows: torch.Tensor) -> str:
        """Read back by transformers."""
        written = heldout.load_written(out)
        draft.eval()
        value, error = heldout.perplexity(written, windows)
        agreement = heldout.draft_agreement(written, draft, windows)
        return f"perplexity {value:.2f} +- {error:.2f}, draft agreement {100 * agreement:.1f} %"


class V41:
    """DeepSeek-V4.1."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.flat: Mapping[str, Any] = raw["text_config"]

    def trunk(self, streams: Sequence[text.Stream], tokenizer: Tokenizer, seed: int) -> V41Trunk:
        """Our model. The config must name the table sizes that the tokenizer gives."""
        del streams
        plan = hash_plan(self.flat, tokenizer)
        told = self.flat["engram_num_embeddings"], self.flat["engram_compressed_vocab_size"]
        if told != (plan.rows, plan.compressed):
            raise SystemExit(
                f"the tokenizer gives tables of {plan.rows} rows and {plan.compressed} compressed "
                f"ids, config.json says {told[0]} and {told[1]}; put these into text_config"
            )
        torch.manual_seed(seed)
        trunk = V41Trunk(self.flat, plan)
        initialise(trunk, self.flat["initializer_range"])
        return trunk

    def start(self, trunk: V41Trunk, draft: Draft, folder: Path) -> None:
        """Experts, attention and embeddings of a V4 of the same widths, or all of a V4.1."""
        if _is_v41(model.read_config(folder / "config.json")):
            continue_from(trunk, draft, folder)
        else:
            start_from(trunk, folder)

    def trunk_phase(self, trunk: V41Trunk, start: Path | None) -> loop.Phase:
        """Next-token loss and indexer distillation, rounded weights at the end."""
        if start is None:
            return v41_trunk_phase(trunk)
        again = _is_v41(model.read_config(start / "config.json"))
        return v41_trunk_phase(trunk, from_v41 if again else from_v4)

    def draft(self, seed: int) -> Draft:
        """DSpark's stages."""
        return Draft(self.flat, seed)

    def draft_phase(self, draft: Draft, trunk: V41Trunk) -> loop.Phase:
        """Loss of drafted blocks."""
        return v41_draft_phase(draft, trunk)

    def write(
        self, out: Path, trunk: V41Trunk, draft: Draft, tokenizer: Path, tokenizer_json: str
    ) -> int:
        """The V4.1 layout."""
        return write_v41_release(out, self.raw, trunk, draft, tokenizer, tokenizer_json)

    def scores(self, out: Path, draft: Draft, windows: torch.Tensor) -> str:
        """Read back by the trainer's own model, with the Engram and without it."""
        return v41_scores(out, self.flat, windows)


def family_of(raw: dict[str, Any]) -> Family[Any, Any]:
    """The architecture of a config.json."""
    return V41(raw) if _is_v41(raw) else V4(raw)


def _is_v41(raw: Mapping[str, Any]) -> bool:
    return bool(raw["model_type"] == "deepseek_v41")
