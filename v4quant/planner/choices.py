"""What `plan` can be asked for: engines and effort; quick to import."""

from __future__ import annotations

from typing import Literal

EngineName = Literal["llama.cpp", "vllm", "sglang"]
ENGINE_NAMES: tuple[EngineName, ...] = ("llama.cpp", "vllm", "sglang")

Effort = Literal["minutes", "hours", "best", "auto"]
EFFORTS: tuple[Effort, ...] = ("minutes", "hours", "best", "auto")
DEFAULT_EFFORT: Effort = "auto"
