"""ONNX Runtime: loads ONNX graphs only."""

from __future__ import annotations

from v4quant_formats.engines.engine import Engine
from v4quant_formats.engines.vllm import VLLM

ONNXRUNTIME = Engine(
    name="onnxruntime",
    title="ONNX Runtime",
    module_name=VLLM.module_name,
    methods=(),
    experts={"onnx": ("CPU",)},
    dense={"onnx": ("CPU",)},
    container="onnx",
    shards=False,
    advice="it loads ONNX graphs of layers, not safetensors folders of a model",
)
