"""llama.cpp: loads GGUF files only, on any hardware."""

from __future__ import annotations

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
    container="gguf",
    advice="it loads GGUF files, not safetensors folders; quantize the release with --format gguf",
)
