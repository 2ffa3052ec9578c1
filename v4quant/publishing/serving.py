"""Exact commands that load a published conversion, for the engines that the preflight accepts.

The preflight reads headers and config.json and predicts, engine by engine, whether it loads. An
engine that it refuses, or that has no command here, is not on the card.
"""

from __future__ import annotations

from collections.abc import Sequence

from v4quant.evaluation.report.text import escape_markdown
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.engines import ENGINES, GPUS
from v4quant_formats.layouts.layout import Layout
from v4quant_formats.preflight import Preflight, preflight
from v4quant_kernels.scheme import SCHEMES

_PYTHON = (
    "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")'
)
# Engine -> (language of the block, command).
COMMANDS = {
    "vllm": ("sh", "vllm serve {repo}"),
    "sglang": ("sh", "{sglang}python -m sglang.launch_server --model-path {repo}"),
    "transformers": ("python", _PYTHON),
    "tensorrt-llm": ("sh", "trtllm-serve {repo}"),
    "llama.cpp": ("sh", "llama-server -hf {repo}"),
}


def accepted_engines(checkpoint: Checkpoint) -> tuple[Preflight, ...]:
    """What the preflight says of every engine that it thinks will load a checkpoint."""
    found = (preflight(checkpoint, name) for name in ENGINES)
    return tuple(f for f in found if f.loads)


def serving_lines(
    engines: Sequence[Preflight], layout: Layout | None, scheme: str, repo: str
) -> list[str]:
    """Markdown paragraphs, one an engine; a sentence when none is known to load it."""
    # Experts packed as integers are not what SGLang's probe of the files expects.
    packed = layout is not None and scheme in SCHEMES and SCHEMES[scheme].is_packed_integer
    sglang = "SGLANG_DSV4_FP4_EXPERTS=0 " if packed else ""
    lines = []
    for found in engines:
        if found.engine not in COMMANDS:
            continue
        language, command = COMMANDS[found.engine]
        lines.append(
            f"{ENGINES[found.engine].title}{_hardware(found)}:\n\n```{language}\n"
            f"{command.format(repo=repo, sglang=sglang)}\n```"
        )
        notes = [f.problem for f in found.findings if f.severity == "warning"]
        lines += [f"- {escape_markdown(note)}" for note in notes[:3]]
    if not lines and layout is not None and "llama.cpp" in layout.engines:
        lines.append(f"llama.cpp:\n\n```sh\n{COMMANDS['llama.cpp'][1].format(repo=repo)}\n```")
    return lines or ["The preflight knows no engine that loads this repository as it is."]


def _hardware(found: Preflight) -> str:
    cards = [GPUS.get(g, g) for g in found.gpus]
    told = f" ({', '.join(cards)})" if cards else ""
    splits = [str(n) for n in found.splits if n > 1]
    return told + (f", over {', '.join(splits)} GPUs if one is too small" if splits else "")
