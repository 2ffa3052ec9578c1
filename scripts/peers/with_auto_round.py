"""Quantize a DeepSeek-V4's routed experts with auto-round, in an interpreter that has it.

    python with_auto_round.py SOURCE WINDOWS.json BITS GROUP OUT.safetensors [ITERATIONS]

Without iterations its search of scales weighted by activations (`iters=0`, `enable_opt_rtn`); with
them its tuning of rounding and of the range by the sign of gradients (200 is its default).
auto-round 0.16.1 does not know V4, and two things of a layer are handed over in another form here.
It drops inputs that are dictionaries, which the rotary tables are: they come as single tensors. And
it weighs outputs by tokens as if they were [batch, tokens, width]: the four streams of a token lie
side by side between layers. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = ("main", "compress")


def main(source: str, windows: str, bits: str, group: str, out: str, iterations: str = "0") -> None:
    """Quantize, and save the experts' weights as they are after it."""
    ids = json.loads(Path(windows).read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for layer in model.model.layers:
        flatten(layer)
    model.model.hc_head.register_forward_pre_hook(_as_streams)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(source),
        scheme="W4A16",
        bits=int(bits),
        group_size=int(group),
        sym=True,
        iters=int(iterations),
        enable_opt_rtn=iterations == "0",
        disable_model_free=True,
        enable_torch_compile=False,
        amp=False,
        nsamples=len(ids),
        seqlen=len(ids[0]),
        batch_size=8,
        dataset=[torch.tensor([x]) for x in ids],
        layer_config={name: {"bits": 16} for name in linear},  # experts become linear later
    )
    started = time.process_time()
    model, _ = rounding.quantize()
    seconds = time.process_time() - started
    found = {
        name: module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if ".mlp.experts." in name and hasattr(module, "weight")
    }
    save_file(found, out)
    packages = ("auto-round", "transformers", "torch")
    facts = {"versions": {p: version(p) for p in packages}, "core_seconds": seconds}
    print(json.dumps({**facts, "iterations": int(iterations)}))


def flatten(layer: Any) -> None:
    """Let a decoder layer take its rotary tables, and its token ids, as single tensors, and pass
    streams on as one row per token."""
    kind = type(layer)
    if not hasattr(kind, "plain_forward"):
        kind.plain_forward = kind.forward
        kind.streams = layer.attn_hc.hc_mult

        def forward(self: Any, hidden_states: Any, **inputs: Any) -> Any:
            if "token_ids" in inputs:
                inputs["input_ids"] = inputs.pop("token_ids").long()
                inputs["position_embeddings"] = {
                    k: (inputs.pop(f"{k}_cos"), inputs.pop(f"{k}_sin")) for k in KINDS
                }
            if hidden_states.dim() == 3:
                hidden_states = hidden_states.unflatten(-1, (self.streams, -1))
            return self.plain_forward(hidden_states, **inputs).flatten(-2)

        kind.forward = forward
    layer.register_forward_pre_hook(_flat, with_kwargs=True)


def _as_streams(head: Any, args: Any) -> Any:
    return (args[0].unflatten(-1, (head.hc_mult, -1)),)


def _flat(layer: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    del layer
    inputs = dict(inputs)
    tables = inputs.pop("position_embeddings", None)
    if tables is not None:
        for kind in KINDS:
            inputs[f"{kind}_cos"], inputs[f"{kind}_sin"] = tables[kind]
        inputs["token_ids"] = inputs.pop("input_ids")
    return args, inputs


if __name__ == "__main__":
    main(*sys.argv[1:])
