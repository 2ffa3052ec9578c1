"""llama.cpp: loads GGUF files only, on any hardware, in builds that know what is in them.

A build knows an architecture or a type or does not: it stops with "unknown model architecture" or
"invalid ggml type". What is older than the architecture itself (the K-types, the `iq` types,
MXFP4) needs no row here. Dates are those of the pull requests on GitHub; the package is
llama-cpp-python.
"""

from __future__ import annotations

from dataclasses import dataclass

from v4quant_formats.engines.engine import Engine
from v4quant_formats.engines.transformers import ANYWHERE
from v4quant_formats.engines.vllm import VLLM

LLAMA_CPP = Engine(
    name="llama.cpp",
    title="llama.cpp",
    module_name=VLLM.module_name,
    methods=(),
    experts={"gguf": ANYWHERE},
    dense={"gguf": ANYWHERE},
    chat_options={"v4": ("--jinja",), "v41": ("--jinja",)},
    container="gguf",
    advice="it loads GGUF files, not safetensors folders; quantize the release with --format gguf",
)


@dataclass(frozen=True)
class Since:
    """The first build known to load something.

    build: its number. date: of that build. pull: the request that added it. where: hardware on
    which that build computes it not or slowly. instead: a type of about the size that all builds
    with the architecture know.
    """

    build: int
    date: str
    pull: int
    where: str = ""
    instead: str = ""


ARCHITECTURES = {
    "deepseek4": Since(9840, "29 June 2026", 24162),
    "deepseek41": Since(11870, "autumn 2026", 28696),
}
"""By name in the file."""

TYPES = {
    "Q2_0": Since(
        9937, "9 July 2026", 24448, "Metal has it since build 9994, CUDA and Vulkan since later "
        "ones: on a card take a build of September 2026 or llama-cpp-python 0.3.36", "q2_k",
    )
}  # fmt: skip
"""Types younger than V4's architecture, by the name in tensor tables."""
