"""Engines' rules, one file an engine; see engine.py for what a rule is."""

from __future__ import annotations

from v4quant_formats.engines.engine import GPUS, Engine
from v4quant_formats.engines.llama_cpp import LLAMA_CPP
from v4quant_formats.engines.onnxruntime import ONNXRUNTIME
from v4quant_formats.engines.sglang import SGLANG
from v4quant_formats.engines.tensorrt_llm import TENSORRT_LLM
from v4quant_formats.engines.transformers import TRANSFORMERS
from v4quant_formats.engines.vllm import VLLM

ENGINES: dict[str, Engine] = {
    e.name: e for e in (VLLM, SGLANG, TRANSFORMERS, TENSORRT_LLM, LLAMA_CPP, ONNXRUNTIME)
}

__all__ = ["ENGINES", "GPUS", "Engine"]
