"""What adapter_config.json says: that it is LoRA of a kind that is merged here, and its factors.

What is more than that (DoRA, bases that were changed, layers that repeat) is refused: left out
silently, it would be a model nobody trained. `modules_to_save` and `bias` need no leave: what they
add are whole tensors, which the weights' file names (replaced.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant_formats.errors import FormatError, WrongDtype
from v4quant_formats.json_object import read_json_object

CONFIG_NAME = "adapter_config.json"
# Ways to begin A and B that leave the base as it is; PiSSA, OLoRA, LoftQ and others take part of it
# away, and such an adapter fits what is left only.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal")
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})\b.*", re.DOTALL)


class AdapterError(FormatError):
    """An adapter that is not plain LoRA, or not this model's."""


@dataclass(frozen=True)
class Settings:
    """adapter_config.json of an adapter that is merged here."""

    path: Path
    config: Mapping[str, Any]

    @property
    def peft_version(self) -> tuple[int, int] | None:
        """Major and minor version of the PEFT that wrote it; None where it does not say."""
        match = _VERSION.fullmatch(str(self.config.get("peft_version")))
        return (int(match[1]), int(match[2])) if match else None

    def scaling(self, name: str, rank: int) -> float:
        """The factor of B A: alpha / r, of rsLoRA alpha / sqrt(r).

        name: the module's in PEFT, with the parameter where one is targeted; rank: its tensors'.
        Raises WrongDtype for a rank that the file contradicts, AdapterError for an alpha that is no
        number.
        """
        alpha: Any = _pattern(self.config.get("alpha_pattern"), name)
        alpha = self.config.get("lora_alpha") if alpha is None else alpha
        said = _pattern(self.config.get("rank_pattern"), name)
        said = self.config.get("r") if said is None else said
        if said != rank:
            raise WrongDtype(f"{self.path}: says rank {said!r} of '{name}', whose rank is {rank}")
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not abs(alpha) < math.inf:
            raise AdapterError(f"{self.path}: lora_alpha is {str(alpha)[:40]!r}")
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_settings(folder: Path) -> Settings:
    """Read adapter_config.json. Raises AdapterError for what is not merged here, ConfigError."""
    config = read_json_object(folder / CONFIG_NAME)
    kind, begun = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    refused = {
        f"its peft_type is {str(kind)[:40]!r}": kind != "LORA",
        "it is DoRA (use_dora)": bool(config.get("use_dora")),
        "it trains biases of its own (lora_bias)": bool(config.get("lora_bias")),
        "its matrices are transposed (fan_in_fan_out)": bool(config.get("fan_in_fan_out")),
        "it repeats layers (layer_replication)": bool(config.get("layer_replication")),
        "it trains single tokens (trainable_token_indices)": bool(
            config.get("trainable_token_indices")
        ),
        "it is for some tokens of a text only (alora_invocation_tokens)": bool(
            config.get("alora_invocation_tokens")
        ),
        f"it changed the base it was trained on (init_lora_weights {str(begun)[:40]!r})": not (
            begun is None or isinstance(begun, bool) or begun in _PLAIN_BEGINNINGS
        ),
    }
    for what, holds in refused.items():
        if holds:
            where = folder / CONFIG_NAME
            raise AdapterError(f"{where}: {what}, which is not merged here; merge it with PEFT")
    return Settings(folder / CONFIG_NAME, config)


def _pattern(table: object, name: str) -> Any:
    """PEFT's patterns: a name's end, or a regular expression of it."""
    for form, value in table.items() if isinstance(table, dict) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({form})", name):
                return value
        except re.error:
            continue
    return None
