"""Quantize a V4's routed experts with llm-compressor's GPTQ, in an interpreter that has it.

    python with_llm_compressor.py SOURCE WINDOWS.json BITS GROUP OUT.safetensors

The documented way and the defaults: `oneshot` with a `GPTQModifier`, experts made linear, every
expert calibrated on all tokens. The model is held in float32, because the library's own forward
pass mixes dtypes otherwise; scales are float32 for the same reason, which favours it. Prints one
JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"


def main(source: str, windows: str, bits: str, group: str, out: str) -> None:
    """Quantize, and save the experts' weights as they are after it."""
    ids = json.loads(Path(windows).read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    linearize_moe(model)
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids]})
    weights = QuantizationArgs(
        num_bits=int(bits), type="int", symmetric=True, strategy="group", group_size=int(group)
    )
    scheme = QuantizationScheme(targets=[EXPERTS], weights=weights)
    started = time.process_time()
    oneshot(
        model=model,
        recipe=GPTQModifier(config_groups={"group_0": scheme}),
        dataset=data,
        num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False,
    )
    seconds = time.process_time() - started
    found = {
        name: module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    save_file(found, out)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    facts = {"versions": {p: version(p) for p in packages}, "core_seconds": seconds}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
