"""Files that vLLM can serve on a machine, the release itself among them, and what would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from v4quant.planner import vllm
from v4quant.planner.candidates import (
    Candidate,
    Request,
    Where,
    draft_count,
    has_fp4,
    is_exact,
    loss_of,
    mixed_loss,
    mixture,
    proof_notes,
)
from v4quant.planner.effort import cost_of
from v4quant.planner.footprint import Footprint, Outline, footprint
from v4quant.planner.loss import KnownLoss
from v4quant.planner.machines import GIB
from v4quant.recipe import Recipe
from v4quant_formats.engines.engine import V4_ATTENTION
from v4quant_formats.engines.vllm_split import possible_splits
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.scheme import SCHEMES, get_scheme

# A lossy file must be this much smaller than the exact release to be worth its loss.
_SMALLER = 0.97
# Containers of safetensors that hold what is smaller than a release, and the variant for vLLM.
_MIX_RESERVE = 0.995
_V41_SHARE = 0.8
_FORMATS = (("compressed-tensors", "vllm"),)


def candidates(outline: Outline, request: Request) -> tuple[list[Candidate], list[str]]:
    machine = request.machine
    if machine.card is None or not vllm.has_attention(machine):
        return [], [
            f"vllm: has attention kernels for DeepSeek-V4 on {', '.join(V4_ATTENTION)} only"
        ]
    if outline.dimensions.v41 is not None:
        return _weights_only(outline, request)
    config = parse_model_config(dict(outline.config), f"{outline.label}: config.json")
    if not vllm.parts_of(machine, config):
        return [], ["vllm: this model divides over 1, 2, 4 or 8 cards"]
    files = sorted(_vllm_files(outline), key=lambda entry: -entry[1].trunk)
    smallest = files[-1][1]
    found = [c for r, f in files if (c := _vllm_candidate(outline, request, config, r, f))]
    if found:
        mixed = _mixed_candidate(outline, request, config, files, found[0])
        return found + ([mixed] if mixed is not None else []), []
    size = vllm.smallest_card(smallest, machine, config, request.context)
    return [], [
        f"vllm: the smallest file, {smallest.trunk / 1e9:.0f} GB, needs cards of "
        f"{size / GIB:.0f} GB, {vllm.parts_of(machine, config)} of them"
        f"{_more_cards(request, config, smallest)}"
    ]


def _weights_only(outline: Outline, request: Request) -> tuple[list[Candidate], list[str]]:
    """V4.1 as released, where its weights leave a fifth of every card for what is not known."""
    machine, dims = request.machine, outline.dimensions
    assert machine.card is not None
    file = footprint(outline, Recipe("mxfp4"))
    parts = max((n for n in possible_splits(dims) if n <= machine.count), default=1)
    each = -(-file.cut // parts) + file.whole
    if each > _V41_SHARE * machine.card.nbytes:
        enough = each / _V41_SHARE / GIB
        return [], [
            f"vllm: the release needs {parts} cards of about {enough:.0f} GB, or more cards"
        ]
    note = "what V4.1's KV cache takes is not known; a fifth of every card is left for it"
    active = sum(x.experts * file.active + x.rest for x in file.layers) + file.head
    made = Candidate(
        "vllm", None, "mxfp4", file.total, Where((each,) * parts, 0, 0), request.context,
        KnownLoss("exact", 0.0, 1.0), None, machine.card.bandwidth * parts / active,
        (f"--tensor-parallel-size {parts}", f"--max-model-len {request.context}"), (),
        ("the release as it is: nothing to convert. SGLang serves it as well", note),
    )  # fmt: skip
    return [made], []


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
    found = mixture(
        files[at][1],
        files[at - 1][1],
        lambda file: vllm.place(file, machine, config, context, 0) is not None,
    )
    if found is None:
        return None
    share, file = found
    made = _vllm_candidate(outline, request, config, files[at][0], file)
    assert made is not None and made.cost is not None
    upper = files[at - 1][0]
    name = upper.scheme if upper is not None else "mxfp4"
    next_up = loss_of(outline, request, name, made.cost.level.solver)
    return replace(
        made, recipe=None, scheme=f"{name} and {largest.scheme}, chosen by layer",
        loss=mixed_loss(largest.loss, next_up, share), budget=int(_MIX_RESERVE * file.total),
    )  # fmt: skip


def _more_cards(request: Request, config: ModelConfig, file: Footprint) -> str:
    for count in (2, 4, 8, 16):
        more = replace(request.machine, count=count)
        if count > request.machine.count and vllm.place(file, more, config, request.context, 0):
            return f", or {count} of these"
    return ""


def _vllm_files(outline: Outline) -> Iterator[tuple[Recipe | None, Footprint]]:
    """The release itself, then every scheme smaller than it (no exact one is)."""
    native = Recipe("mxfp4" if has_fp4(outline) else "fp8")
    release = footprint(outline, native)
    yield None, release
    for format_, engine in _FORMATS:
        for scheme in LAYOUTS[format_].schemes:
            if SCHEMES[scheme].bits_per_weight >= SCHEMES[native.scheme].bits_per_weight:
                continue
            try:
                recipe = Recipe(scheme, format=format_, engine=engine)
                file = footprint(outline, recipe)
            except V4QuantError:
                continue
            if file.trunk < _SMALLER * release.trunk:
                yield recipe, file


def _vllm_candidate(
    outline: Outline,
    request: Request,
    config: ModelConfig,
    recipe: Recipe | None,
    file: Footprint,
) -> Candidate | None:
    machine, drafts = request.machine, draft_count(outline)
    with_drafts = vllm.place(file, machine, config, request.context, drafts) if drafts else None
    placed = with_drafts or vllm.place(file, machine, config, request.context, 0)
    if placed is None:
        return None
    scheme = recipe.scheme if recipe is not None else ("mxfp4" if has_fp4(outline) else "fp8")
    notes: list[str] = []
    if recipe is None:
        loss, cost = KnownLoss("exact", 0.0, 1.0), None
        notes.append("the release as it is: nothing to convert. SGLang serves it as well")
    else:
        exact = is_exact(outline, scheme)
        cost = cost_of(
            outline, get_scheme(scheme), file.total, request.effort, request.cores, exact
        )
        loss = loss_of(outline, request, scheme, cost.level.solver)
        notes += proof_notes(outline, scheme)
    if drafts and with_drafts is None:
        notes.append("there is no room for the draft stages: serve without speculative decoding")
    if machine.unified and machine.count > 1:
        notes.append("over the network between the boxes: start a Ray cluster first (vLLM's docs)")
    s = placed.serving
    options = (
        f"--tensor-parallel-size {s.gpus}", f"--max-model-len {s.context}",
        f"--max-num-seqs {s.sequences}", f"--max-num-batched-tokens {s.batched_tokens}",
        f"--gpu-memory-utilization {s.utilization:g}", "--kv-cache-dtype fp8",
    )  # fmt: skip
    return Candidate(
        "vllm", recipe, scheme, file.total,
        Where((placed.taken,) * s.gpus, 0, 0), placed.context_fits, loss, cost,
        1 / placed.seconds, options, (), tuple(notes),
    )  # fmt: skip
