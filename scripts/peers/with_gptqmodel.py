"""Quantize a V4's routed experts with GPTQModel, in an interpreter that has it.

    python with_gptqmodel.py SOURCE WINDOWS.json BITS GROUP OUT.safetensors

Its GPTQ with its defaults (symmetric, damping and activation order as the library sets them), on
the CPU, attention and shared experts excluded by rules. Weights are taken as its solver returns
them, before they are packed. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# On two cores it makes one worker and then asks for two; and packing needs no compiler here.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import save_file

FOUND: dict[str, torch.Tensor] = {}


def main(source: str, windows: str, bits: str, group: str, out: str) -> None:
    """Quantize, and save the experts' weights as the solver returned them."""
    ids = json.loads(Path(windows).read_text())
    parts = ("self_attn", "shared_experts")
    kept: dict[str, dict[str, Any]] = {rf"-:.*{part}.*": {} for part in parts}
    config = QuantizeConfig(bits=int(bits), group_size=int(group), dynamic=kept)
    plain = GPTQ.quantize

    def quantize(solver: Any, *arguments: Any, **named: Any) -> Any:
        result = plain(solver, *arguments, **named)
        FOUND[solver._named_module.full_name] = result[0].detach().float().contiguous()
        return result

    GPTQ.quantize = quantize
    model = GPTQModel.load(source, config, device="cpu", dtype=torch.float32)
    started = time.process_time()
    model.quantize([{"input_ids": x, "attention_mask": [1] * len(x)} for x in ids], batch_size=1)
    seconds = time.process_time() - started
    save_file(FOUND, out)
    packages = ("gptqmodel", "transformers", "torch")
    print(json.dumps({"versions": {p: version(p) for p in packages}, "core_seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
