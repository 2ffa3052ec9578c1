"""allocate: a scheme for every layer and projection, within a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from v4quant.allocation.allocate import (
    Allocation,
    check_budget,
    choose,
    find_losses,
    recipe_toml,
)
from v4quant.allocation.budget import bits_budget, cards_budget, machine_budget
from v4quant.allocation.card_budget import (
    CardMemory,
    Cards,
    card_memory,
    cards_bytes,
    check_split,
    model_config,
    parse_cards,
    table_bytes,
)
from v4quant.allocation.costs import TAKING_PART, Costs, Options, find_costs
from v4quant.allocation.findings import Findings, findings_key
from v4quant.allocation.sensitivity import Sample
from v4quant.api.arguments import (
    PathLike,
    Size,
    SourceLike,
    asked_of,
    config_of,
    listed_files,
    output_of,
    path_of,
    read_corpus,
    size_of,
    source_of,
)
from v4quant.builtin import MIXED_CALIBRATION
from v4quant.conversion.calibrated import stats_of
from v4quant.conversion.plan import make_plan
from v4quant.existing import NewFiles, recipe_file, signed
from v4quant.finished import request_of
from v4quant.outputs import refuse_inputs
from v4quant.planner.footprint import outline_checkpoint
from v4quant.progress import default_progress
from v4quant.recipe import recipe_from_table
from v4quant.source import open_source
from v4quant_calibration.corpus.chat_dialects import DEFAULT_MODE
from v4quant_calibration.corpus.chat_keys import MESSAGES
from v4quant_calibration.solve.solution import SOLUTION_NAME, is_solution
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.engines.vllm_memory import UTILIZATION, Serving, default_batch
from v4quant_formats.layouts.choices import NEUTRAL
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.sidecars import TOKENIZER, place_of
from v4quant_kernels.errors import OptionError
from v4quant_kernels.progress import Progress
from v4quant_kernels.user_cache import cache_folder

_BY_PLACE = ("chosen", "losses")


@dataclass(frozen=True)
class AllocationResult:
    """path: the recipe file. found: the recipe, its bytes and predicted loss. card: what each card
    holds, with `serving`, where vLLM was asked for. skipped_rows: rows of the corpus left out
    because they cannot be read."""

    path: str
    found: Allocation
    card: CardMemory | None = None
    serving: Serving | None = field(default=None, repr=False)
    skipped_rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        found = self.found
        facts: dict[str, Any] = {
            "recipe": found.recipe.as_dict(),
            "budget": found.budget,
            "bytes": found.nbytes,
            "smallest": found.smallest,
            "largest": found.largest,
            "bits_per_weight": found.bits_per_weight,
            "room_left": found.room_left,
            "needs_text": list(found.needs_text),
            "loss": sum(found.losses.values()),
            "loss_is_measured": found.measured,
            "skipped_rows": self.skipped_rows,
        }
        if self.card is not None:
            facts["card"] = {**asdict(self.card), "free": self.card.free}
        return facts


def allocate(
    source: SourceLike,
    out: PathLike,
    *,
    budget: Size = None,
    bpw: float | None = None,
    fits: str | None = None,
    ram: str | None = None,
    context: int = 32768,
    sequences: int = 1,
    batched_tokens: int | None = None,
    gpu_memory_utilization: float = UTILIZATION,
    expert_parallel: bool = False,
    format: str = "gguf",
    engine: str = NEUTRAL,
    dense: str = "",
    engram: str = "",
    draft: str = "convert",
    split_size: str = "",
    stats: PathLike | None = None,
    measure_kl: bool = False,
    corpus: PathLike | Sequence[PathLike] = MIXED_CALIBRATION,
    chat_keys: str = MESSAGES,
    skip_bad_rows: int = 0,
    tokens: int = 4096,
    seq_len: int = 256,
    experts: int = 4,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AllocationResult:
    """Choose a scheme for every layer and projection of `source`; write the recipe to `out`.

    Exactly one of budget (bytes of the output), bpw (bits per weight, over all parameters) and fits
    (cards like "4x24GB" that must hold it beside `context` tokens) says how large. ram: system
    memory that experts may lie in as well, for llama.cpp, with sizes as sold. measure_kl:
    measure on `corpus` what rounding each layer does to predictions, else layers count alike.
    experts: how many of a layer are looked at. engram: as in `quantize`. overwrite: replace a
    recipe that `allocate` wrote and nobody changed.

    Raises OptionError for options that contradict each other, BudgetError for a size that nothing
    fits, RecipeError, CorpusError, StatsError.
    """
    asked = asked_of("allocate", locals())
    if sum(x is not None for x in (budget, bpw, fits)) != 1:
        raise OptionError("give one of --budget, --bpw and --fits")
    if ram is not None and (fits is None or engine == "vllm" or format != "gguf"):
        raise OptionError("--ram belongs to --fits with --format gguf: llama.cpp uses both")
    cards = None
    if fits is not None and engine == "vllm":
        number, size = parse_cards(fits)
        batch = batched_tokens or default_batch(size)
        serving = Serving(
            number, context, batch, sequences, gpu_memory_utilization, expert_parallel
        )
        cards = Cards(size, serving)
    elif (
        batched_tokens or sequences > 1 or expert_parallel or gpu_memory_utilization != UTILIZATION
    ):
        raise OptionError(
            "--sequences, --batched-tokens, --gpu-memory-utilization and --expert-parallel belong "
            "to --fits with --engine vllm"
        )
    parts = 1 if cards is None or expert_parallel else cards.serving.gpus
    options = Options(format, engine, dense, draft, split_size, Sample(experts), parts, engram)
    place = output_of(out)
    with open_source(source_of(source)) as checkpoint:
        refuse_inputs([place], [checkpoint], [*listed_files(corpus), path_of(stats)])
        request = request_of(
            asked,
            [*listed_files(corpus), *_stats_files(stats), place_of(checkpoint, TOKENIZER)],
            [checkpoint.digest()],
            [place],
        )
        if not overwrite and (told := request.answer()) is not None:
            return _result(out, _allocation_from(told), told["skipped_rows"], checkpoint, cards)
        files = NewFiles([recipe_file(place)], overwrite, request.key)
        if cards is not None:
            check_split(model_config(checkpoint), cards.serving)
        costs = find_costs(checkpoint, options)
        if ram is not None and fits is not None:
            outline, type_ = outline_checkpoint(checkpoint), _assumed_dense(dense)
            most = machine_budget(fits, ram, context, outline, type_, draft)
        else:
            most = _most(costs, budget, bpw, fits, context, cards)
        check_budget(costs, most)
        text = None
        if measure_kl:
            config = config_of(checkpoint)
            text = read_corpus(
                corpus, checkpoint, config, seq_len, tokens, DEFAULT_MODE, chat_keys, skip_bad_rows
            )
        evidence = None if stats is None else stats_of(checkpoint, Path(stats))
        key = findings_key(checkpoint, options.sample, evidence, text)
        known = Findings(place, key, cache_folder())
        try:
            losses = find_losses(
                checkpoint, costs, options, evidence, text, default_progress(progress), known
            )
        except BaseException:
            known.keep()
            raise
        found = choose(costs, losses, most)
        skipped = 0 if text is None else text.skipped_rows
        told = {**_allocation_told(found), "skipped_rows": skipped}
        with files.finishing(lambda: request.remember(told)):
            write_file_atomically(place, signed(recipe_toml(found, costs), ".toml").encode())
            known.finish()
        return _result(out, found, skipped, checkpoint, cards)


def _result(
    out: PathLike, found: Allocation, skipped: int, checkpoint: Checkpoint, cards: Cards | None
) -> AllocationResult:
    if cards is None:
        return AllocationResult(str(out), found, skipped_rows=skipped)
    memory = card_memory(make_plan(checkpoint, found.recipe), cards)
    return AllocationResult(str(out), found, memory, cards.serving, skipped)


def _allocation_told(found: Allocation) -> dict[str, Any]:
    """JSON form of an allocation."""
    places = {k: [[*place, v] for place, v in getattr(found, k).items()] for k in _BY_PLACE}
    return {**vars(found), **places, "recipe": found.recipe.as_dict()}


def _allocation_from(told: Mapping[str, Any]) -> Allocation:
    """Inverse of `_allocation_told`."""
    places = {k: {(a, b): v for a, b, v in told[k]} for k in _BY_PLACE}
    recipe = recipe_from_table(told["recipe"], "the recipe of an earlier request")
    plain = {f.name: told[f.name] for f in fields(Allocation)}
    return Allocation(**{**plain, **places, "recipe": recipe})


def _stats_files(stats: PathLike | None) -> list[Path | None]:
    path = path_of(stats)
    return [path / SOLUTION_NAME if path is not None and is_solution(path) else path]


def _assumed_dense(dense: str) -> str:
    """The dense type that room is counted for; what is chosen by layer is seldom larger."""
    return "q8_0" if dense in TAKING_PART else dense


def _most(
    costs: Costs,
    budget: Size,
    bpw: float | None,
    fits: str | None,
    context: int,
    cards: Cards | None,
) -> int:
    """Bytes the output may have."""
    if bpw is not None:
        return bits_budget(bpw, costs.weights)
    if cards is not None:
        return cards_bytes(costs, cards)
    if fits is not None:
        return cards_budget(fits, context, costs.base.config) + table_bytes(costs.base)
    return size_of(budget) or 0
