"""TensorRT-LLM: Blackwell only; the release's own format and ModelOpt's NVFP4."""

from __future__ import annotations

from v4quant_formats.engines.engine import Engine
from v4quant_formats.engines.vllm import VLLM

_BLACKWELL = ("sm100", "sm103")

TENSORRT_LLM = Engine(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    module_name=VLLM.module_name,
    methods=("", "fp8"),
    others=("modelopt",),
    experts=dict.fromkeys(("plain", "mxfp4", "fp8", "nvfp4"), _BLACKWELL),
    dense=dict.fromkeys(("plain", "fp8"), _BLACKWELL),
    wo_a=("plain", "fp8"),
    unknown_names="warning",
    advice="sm100 and sm103 only; for compressed-tensors files use vLLM",
)
