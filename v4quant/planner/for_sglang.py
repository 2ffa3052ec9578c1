"""Files that SGLang can serve on a machine, the release itself among them, and what would do."""

from __future__ import annotations

from v4quant.planner import sglang
from v4quant.planner.candidates import (
    Candidate,
    Request,
    Where,
)
from v4quant.planner.footprint import Footprint, Outline
from v4quant.planner.safetensors import (
    chat_options,
    files_for,
    has_attention,
    made_of,
    needed,
    no_attention,
    parts_of,
    scheme_of,
)
from v4quant.recipe import Recipe
from v4quant_formats.engines.sglang import FP4_PROBE_OFF, SGLANG
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_kernels.scheme import SCHEMES

# Containers it reads; a recipe refuses the schemes that SGLang does not load in them.
_FORMATS = (("deepseek", "neutral"), ("compressed-tensors", "sglang"), ("modelopt", "sglang"))
_PORT = 20000


def candidates(outline: Outline, request: Request) -> tuple[list[Candidate], list[str]]:
    machine = request.machine
    if machine.card is None or not has_attention(machine):
        return [], [no_attention(machine, "sglang")]
    config = parse_model_config(dict(outline.config), f"{outline.label}: config.json")
    if not parts_of(machine, config):
        return [], ["sglang: this model divides over 1, 2, 4 or 8 cards"]
    files = files_for(outline, _FORMATS)
    found = [c for r, f in files if (c := _candidate(outline, request, config, r, f))]
    if found:
        return found, []
    recipe, smallest = files[-1]
    scheme, context = SCHEMES[scheme_of(outline, recipe)], request.context
    told = needed(
        "sglang: the smallest file it loads", smallest, machine, config,
        sglang.smallest_card(smallest, machine, config, context),
        sglang.host_bytes(machine, config),
        lambda more: sglang.place(smallest, more, config, scheme, context) is not None,
    )  # fmt: skip
    return [], [f"{told}; packed integers of 2 and 3 bits are for vLLM"]


def _candidate(
    outline: Outline,
    request: Request,
    config: ModelConfig,
    recipe: Recipe | None,
    file: Footprint,
) -> Candidate | None:
    scheme = scheme_of(outline, recipe)
    row = SCHEMES[scheme]
    placed = sglang.place(file, request.machine, config, row, request.context)
    if placed is None:
        return None
    made = made_of(outline, request, recipe, file)
    boxes = request.machine.unified != "" and placed.serving.gpus > 1
    notes = (*made.notes, *_notes(config, placed, outline.draft_stages, boxes))
    gpus = placed.serving.gpus
    return Candidate(
        "sglang", recipe, scheme, file.total,
        Where((placed.weights + placed.pools,) * gpus, placed.tables, 0), placed.context_fits,
        made.loss, made.cost, 1 / placed.seconds,
        _options(config, placed, row.is_packed_integer, boxes), (), notes,
        others=made.others, sequences=placed.serving.sequences,
    )  # fmt: skip


def _options(
    config: ModelConfig, placed: sglang.Served, packed: bool, boxes: bool
) -> tuple[str, ...]:
    """Variables of the environment, then the server's options."""
    s = placed.serving
    cluster = (f"--nnodes {s.gpus}", "--node-rank 0", f"--dist-init-addr box1:{_PORT}")
    return (
        *((FP4_PROBE_OFF,) if packed else ()), *placed.environment, f"--tp {s.gpus}",
        *(cluster if boxes else ()), *((f"--ep-size {s.gpus}",) if placed.uncut else ()),
        f"--context-length {s.context}", f"--max-running-requests {s.sequences}",
        f"--chunked-prefill-size {s.chunk}", f"--mem-fraction-static {placed.share:g}",
        *chat_options(SGLANG, config),
    )  # fmt: skip


def _notes(config: ModelConfig, placed: sglang.Served, drafts: int, boxes: bool) -> list[str]:
    notes = []
    if placed.uncut:
        notes.append(f"{placed.uncut}: over {placed.serving.gpus} cards every card takes whole "
                     "experts")  # fmt: skip
    if placed.tables:
        notes.append(
            f"the Engram's tables take {placed.tables / 1e9:.0f} GB of system memory, shared by "
            "all cards"
        )
    if boxes:
        notes.append(
            "over the network between the boxes: start the same command on every box, each with "
            "its own --node-rank, and write the first one's address for box1"
        )
    if drafts:
        method = "EAGLE" if config.dspark is None else "DSPARK"
        notes.append(
            f"draft stages are not counted: --speculative-algorithm {method} takes their weights "
            "and caches besides"
        )
    return notes
