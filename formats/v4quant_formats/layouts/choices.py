"""What options about files may be: engines, layouts, schemes, dense types; quick to import.

The command line says these in its help before anything heavy is loaded. What schemes a layout holds
stands in the schemes' own rows.
"""

from __future__ import annotations

from v4quant_kernels.ggml_types import GGML_TYPES
from v4quant_kernels.scheme import SCHEMES

NEUTRAL = "neutral"
ENGINE_CHOICES = (NEUTRAL, "vllm", "sglang")
"""What `--engine` of `quantize` takes: engines for which files have a form of their own."""

LAYOUT_NAMES = ("deepseek", "compressed-tensors", "modelopt", "gguf")

WRITABLE = tuple(s.name for s in SCHEMES.values() if s.formats)
"""Every scheme that some layout holds."""

DEFAULT_SPLIT = 45 * 10**9  # below the 50 GB that model hosts take as one file


def table_types() -> tuple[str, ...]:
    """What the Engram's tables may be in GGUF files: bf16, which is exact, or what is encoded."""
    return ("bf16", *(name for name, s in SCHEMES.items() if s.is_block_type))


def dense_types() -> tuple[str, ...]:
    """What dense matrices of GGUF files may be, types registered at run time included."""
    return tuple(kind.name for kind in GGML_TYPES.values() if kind.dense)
