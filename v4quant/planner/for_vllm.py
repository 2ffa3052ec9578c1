"""Files that vLLM can serve on a machine, the release itself among them, and what would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from v4quant.planner import vllm
from v4quant.planner.candidates import (
    Candidate,
    Request,
    Where,
    loss_of,
    mixed_loss,
    mixture,
    scaled,
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
from v4quant_formats.engines.vllm import VLLM
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_kernels.scheme import SCHEMES

_MIX_RESERVE = 0.995
# Containers of safetensors that hold what is smaller than a release, and the variant for vLLM.
_FORMATS = (("compressed-tensors", "vllm"),)


def candidates(outline: Outline, request: Request) -> tuple[list[Candidate], list[str]]:
    machine = request.machine
    if machine.card is None or not has_attention(machine):
        return [], [no_attention(machine, "vllm")]
    config = parse_model_config(dict(outline.config), f"{outline.label}: config.json")
    if not parts_of(machine, config):
        return [], ["vllm: this model divides over 1, 2, 4 or 8 cards"]
    files = files_for(outline, _FORMATS)
    smallest = files[-1][1]
    found = [c for r, f in files if (c := vllm_candidate(outline, request, config, r, f))]
    if found:
        mixed = _mixed_candidate(outline, request, config, files, found[0])
        return found + ([mixed] if mixed is not None else []), []
    scheme, context = SCHEMES[scheme_of(outline, files[-1][0])], request.context
    told = needed(
        "vllm: the smallest file", smallest, machine, config,
        vllm.smallest_card(smallest, machine, config, context), vllm.host_bytes(machine, config),
        lambda more: vllm.place(smallest, more, config, scheme, context, 0) is not None,
    )  # fmt: skip
    return [], [told]


def _mixed_candidate(
    outline: Outline,
    request: Request,
    config: ModelConfig,
    files: Sequence[tuple[Recipe | None, Footprint]],
    largest: Candidate,
) -> Candidate | None:
    """A recipe of whole layers in two schemes, between the largest file that fits and the next."""
    sizes = [file.total for _, file in files]
    at = sizes.index(largest.size)
    if at == 0 or largest.loss.basis == "exact":
        return None
    machine, context = request.machine, request.context
    lower, upper = files[at][0], files[at - 1][0]
    coarser = max(
        (SCHEMES[scheme_of(outline, r)] for r in (lower, upper)), key=lambda s: s.group_size
    )
    found = mixture(
        files[at][1],
        files[at - 1][1],
        lambda file: vllm.place(file, machine, config, coarser, context, 0) is not None,
    )
    if found is None:
        return None
    share, file = found
    made = vllm_candidate(outline, request, config, lower, file)
    assert made is not None and made.cost is not None
    name = scheme_of(outline, upper)
    next_up = loss_of(outline, request, name, made.cost.level.solver)
    loss = mixed_loss(largest.loss, next_up, share)
    return replace(
        made, recipe=None, scheme=f"{name} and {largest.scheme}, chosen by layer",
        loss=loss, others=scaled(made.others, largest.loss, loss),
        budget=int(_MIX_RESERVE * file.total),
    )  # fmt: skip


def vllm_candidate(
    outline: Outline,
    request: Request,
    config: ModelConfig,
    recipe: Recipe | None,
    file: Footprint,
) -> Candidate | None:
    machine, drafts = request.machine, outline.draft_stages
    scheme = scheme_of(outline, recipe)
    row, context = SCHEMES[scheme], request.context
    with_drafts = vllm.place(file, machine, config, row, context, drafts) if drafts else None
    placed = with_drafts or vllm.place(file, machine, config, row, context, 0)
    if placed is None:
        return None
    made = made_of(outline, request, recipe, file)
    notes = [*made.notes]
    if drafts and with_drafts is None:
        notes.append("there is no room for the draft stages: serve without speculative decoding")
    elif drafts:
        notes.append(_draft_note(config, drafts))
    if machine.unified and machine.count > 1:
        notes.append("over the network between the boxes: start a Ray cluster first (vLLM's docs)")
    s = placed.serving
    notes += _notes(placed, s.gpus)
    extra = (*(("--enable-expert-parallel",) if placed.uncut else ()),)
    if placed.tables.option:
        extra += (placed.tables.option,)
    options = (
        f"--tensor-parallel-size {s.gpus}", f"--max-model-len {s.context}",
        f"--max-num-seqs {placed.together}", f"--max-num-batched-tokens {s.batched_tokens}",
        f"--gpu-memory-utilization {s.utilization:g}", "--kv-cache-dtype fp8", *extra,
        *chat_options(VLLM, config),
    )  # fmt: skip
    return Candidate(
        "vllm", recipe, scheme, file.total,
        Where((placed.taken,) * s.gpus, placed.tables.host, 0), placed.context_fits, made.loss,
        made.cost, 1 / placed.seconds, options, (), tuple(notes),
        others=made.others, sequences=placed.together,
    )  # fmt: skip


def _draft_note(config: ModelConfig, drafts: int) -> str:
    method, tokens = "mtp", drafts
    if config.dspark is not None:
        method, tokens = "dspark", config.dspark.block_size
    options = f'{{"method": "{method}", "num_speculative_tokens": {tokens}}}'
    return f"room for the draft stages is counted; to use them add --speculative-config '{options}'"


def _notes(placed: vllm.Served, gpus: int) -> Iterator[str]:
    if placed.uncut:
        yield f"{placed.uncut}: over {gpus} cards every card takes whole experts"
    if placed.tables.host:
        why = "" if placed.tables.option else ", rounded up to powers of two as pinned memory is"
        yield f"the Engram's tables take {placed.tables.host / 1e9:.0f} GB of system memory{why}"
    elif placed.tables.card:
        yield (
            "system memory is too small for the Engram's tables: each card holds its share. Forks "
            "of vLLM and SGLang read them from an NVMe disk instead (not examined)"
        )
