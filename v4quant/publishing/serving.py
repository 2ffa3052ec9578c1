"""Exact commands that load a published conversion, for the engines that the preflight accepts.

The preflight reads headers and config.json and predicts, engine by engine, whether it loads. An
engine that it refuses, or that has no command here, is not on the card.
"""

from __future__ import annotations

from collections.abc import Sequence

from v4quant.evaluation.report.text import escape_markdown
from v4quant.shell import command_line
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.engines import ENGINES, GPUS
from v4quant_formats.engines.engine import Release
from v4quant_formats.layouts.layout import Layout
from v4quant_formats.preflight import Preflight, preflight
from v4quant_kernels.scheme import SCHEMES

_PYTHON = (
    "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")'
)
# Engine -> (language of the block, command).
COMMANDS = {
    "vllm": ("sh", "vllm serve {repo}{chat}"),
    "sglang": ("sh", "{sglang}python -m sglang.launch_server --model-path {repo}{chat}"),
    "transformers": ("python", _PYTHON),
    "tensorrt-llm": ("sh", "trtllm-serve {repo}"),
    "llama.cpp": ("sh", "llama-server -hf {repo}{chat}"),
}
# What an engine's options for chats do; the options are the engine's own rule.
_VLLM = "vLLM has the release's chat format built in"
_HINTS: dict[tuple[str, Release], str] = {
    ("vllm", "v4"): f"{_VLLM}; the options also take thoughts and tool calls out of the answer.",
    ("vllm", "v41"): f"{_VLLM}, under this name for V4.1.",
    ("sglang", "v4"): (
        "SGLang has the release's chat format built in; the options take thoughts and tool calls "
        "out of the answer."
    ),
    ("sglang", "v41"): "SGLang has the release's chat format built in, under this name for V4.1.",
    ("llama.cpp", "v4"): "The file carries a chat template; `--jinja` uses it.",
    ("llama.cpp", "v41"): "The file carries a chat template; `--jinja` uses it.",
}
_ENCODE = (
    "transformers finds no chat template here; `encoding/`, or `v4quant encode`, turns messages "
    "into the text the model expects."
)


def accepted_engines(checkpoint: Checkpoint) -> tuple[Preflight, ...]:
    """What the preflight says of every engine that it thinks will load a checkpoint."""
    found = (preflight(checkpoint, name, every_split=True) for name in ENGINES)
    return tuple(f for f in found if f.loads)


def serve_command(layout: Layout, place: str, file: str, published: bool) -> str:
    """The command that serves a conversion: a folder `place` whose first file is `file`, or a
    repository. vLLM and SGLang run on Linux only, so theirs is for `sh`."""
    if "{file}" not in layout.serve:
        return command_line([w.format(path=place) for w in layout.serve.split()], "sh")
    if published:
        return command_line(["llama-server", "-hf", place])
    return command_line([w.format(path=place, file=file) for w in layout.serve.split()])


def serving_lines(
    engines: Sequence[Preflight],
    layout: Layout | None,
    scheme: str,
    repo: str,
    release: Release = "v4",
    templated: bool = False,
) -> list[str]:
    """Markdown paragraphs, one an engine; a sentence when none is known to load it.

    release: whose chat format it is, "v4" or "v41". templated: whether a Jinja template is there.
    """
    # Experts packed as integers are not what SGLang's probe of the files expects.
    packed = layout is not None and scheme in SCHEMES and SCHEMES[scheme].is_packed_integer
    sglang = "SGLANG_DSV4_FP4_EXPERTS=0 " if packed else ""
    lines = []
    for found in engines:
        if found.engine not in COMMANDS:
            continue
        language, command = COMMANDS[found.engine]
        chat, hint = _chat(found.engine, release), _HINTS.get((found.engine, release), "")
        lines.append(
            f"{ENGINES[found.engine].title}{_hardware(found)}:\n\n```{language}\n"
            f"{command.format(repo=repo, sglang=sglang, chat=chat)}\n```"
        )
        if found.engine == "transformers" and not templated:
            hint = _ENCODE
        if hint:
            lines.append(f"Chat: {hint}")
        notes = [f.problem for f in found.findings if f.severity == "warning"]
        lines += [f"- {escape_markdown(note)}" for note in notes[:3]]
    if not lines and layout is not None and "llama.cpp" in layout.engines:
        hint = _HINTS["llama.cpp", release]
        command = COMMANDS["llama.cpp"][1].format(repo=repo, chat=_chat("llama.cpp", release))
        lines += [f"llama.cpp:\n\n```sh\n{command}\n```", f"Chat: {hint}"]
    return lines or ["The preflight knows no engine that loads this repository as it is."]


def _chat(engine: str, release: Release) -> str:
    """An engine's options for chats, behind a command; two a line where there are several."""
    options = ENGINES[engine].chat_options.get(release, ())
    if len(options) == 1:
        return f" {options[0]}"
    lines = (" ".join(options[i : i + 2]) for i in range(0, len(options), 2))
    return "".join(f" \\\n  {line}" for line in lines)


def _hardware(found: Preflight) -> str:
    cards = [GPUS.get(g, g) for g in found.gpus]
    told = f" ({', '.join(cards)})" if cards else ""
    splits = [str(n) for n in found.splits if n > 1]
    return told + (f", over {', '.join(splits)} GPUs if one is too small" if splits else "")
