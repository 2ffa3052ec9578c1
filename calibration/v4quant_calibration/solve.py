"""solve: calibrate and quantize in one pass, layer by layer, storing no statistics.

The full moments of one Flash expert's inputs take 80 MB, those of all experts 900 GB; even a
sample of 2,048 rows an expert would be 270 GB, more than the model. But a layer's inputs are all
there at the moment the streams reach its experts. So the moments are formed then, for a few experts
at a time within the memory cap, the experts' codes solved and written to the stage's file, and the
moments dropped. What remains is the result.

That also gives error propagation for nothing. Two models stream side by side: the reference, and
a candidate whose provider answers solved experts from the file just written, so each layer is
solved on the inputs that the *converted* model will give it. Within an expert it is the same: w2 is
solved on the hidden rows of the already coded w1 and w3. Both targets are corrected for the
inputs' error (`gram.correction`). With propagation off there is one model, and every layer sees
the original's inputs.

A layer is solved at the first call of `on_experts`; a layer whose file exists is only read, so an
interrupted run repeats forward passes but no solving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4quant_calibration.calibrate import MomentObserver
from v4quant_calibration.draft_stream import drafts_of, stream_drafts
from v4quant_calibration.gram import correction, damped, gram_sum, shrunk
from v4quant_calibration.model.dspark import draft_blocks, require_blocks
from v4quant_calibration.model.experts import expert_hidden
from v4quant_calibration.model.numerics import quantized_input
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.provider import CheckpointParams
from v4quant_calibration.refine import DEFAULT_SWEEPS
from v4quant_calibration.scratch import Scratch
from v4quant_calibration.solution import (
    SOLUTION_VERSION,
    STATS_NAME,
    Solution,
    add_matrix,
    begin_solution,
    finish_solution,
    holds,
    load_solution,
    open_stage,
    stage_file,
    stage_specs,
)
from v4quant_calibration.solvers import solve_batch
from v4quant_calibration.stats import Stats, save_stats
from v4quant_calibration.stream import StreamModel, StreamStore, stream_forward
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PROJECTIONS, expert_module, parse_name, trunk_stages
from v4quant_formats.gguf_layout import fitting_type
from v4quant_formats.model_config import ModelConfig
from v4quant_formats.shards import ShardWriter, plan_shard, write_file_atomically
from v4quant_formats.weights import find_weight, read_weight
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.progress import Progress
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref.codec import dequantize
from v4quant_kernels.scheme import Scheme, get_scheme

DEFAULT_MEMORY = 4 * 2**30
# Tokens of the layer sent through every expert, for the pooled moments of its w2's inputs.
_POOL_SAMPLE = 512


@dataclass(frozen=True)
class SolveSettings:
    """How to solve.

    scheme: the routed experts', of integers or of GGUF's blocks. propagate: later layers see
    converted ones. sweeps: the most passes of refinement. memory: bytes that the moments and
    weights of one batch of experts may take. schemes: of every module to be solved, where not all
    routed experts get `scheme`; modules not named stay as they are.
    """

    scheme: Scheme
    propagate: bool = True
    sweeps: int = DEFAULT_SWEEPS
    memory: int = DEFAULT_MEMORY
    schemes: Mapping[str, Scheme] | None = None

    def scheme_of(self, module: str, columns: int) -> Scheme | None:
        """The scheme a routed expert's matrix is solved for; None where it is not."""
        if self.schemes is not None:
            return self.schemes.get(module)
        if self.scheme.element != "ggml":
            return self.scheme
        fitting = fitting_type(self.scheme.name, columns)
        return None if fitting == "bf16" else get_scheme(fitting)

    def described(self) -> dict[str, Any]:
        """For the header of a solution: modules are told by a digest of their schemes."""
        facts = {"scheme": self.scheme.name, "propagate": self.propagate, "sweeps": self.sweeps}
        if self.schemes is None:
            return facts
        lines = (f"{module}={scheme.name}\n" for module, scheme in sorted(self.schemes.items()))
        return {**facts, "schemes_digest": hashlib.sha256("".join(lines).encode()).hexdigest()}


class InputKeeper(SilentObserver):
    """Keeps one layer's expert inputs, for the candidate that streams beside the reference."""

    def __init__(self) -> None:
        """Nothing kept yet."""
        self.layer = ""
        self.x = torch.empty(0, 0)

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Keep the rows; drop those of the layer before."""
        self.layer, self.x = layer, x


class SolvedParams:
    """A checkpoint's weights, with experts of solved stages read from the solution."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        """`checkpoint` stays the caller's to close."""
        self._original = CheckpointParams(checkpoint)
        self._folder = folder
        self._stage: Checkpoint | None = None
        self._name = ""

    def __call__(self, base: str, /) -> Tensor:
        """The tensor called `base`, as the conversion will hold it."""
        name = parse_name(f"{base}.weight")
        if name is None or name.expert is None or not stage_file(self._folder, name.stage).exists():
            return self._original(base)
        if self._stage is None or self._name != name.stage:
            self.close()
            self._stage, self._name = open_stage(self._folder, name.stage), name.stage
        if not holds(self._stage, base):
            return self._original(base)
        return dequantize(read_weight(self._stage, find_weight(self._stage, base)))

    def close(self) -> None:
        """Close the stage last read."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None


@dataclass(frozen=True)
class _Layer:
    """What reaches a layer's experts: rows of the model being converted and of the original.

    x, original: `[T, hidden]`; original is x itself without propagation. expert_ids, weights:
    `[T, top_k]`. pool: float64 `[hidden, hidden]`, second moments of x over all tokens, where a
    token counts with the mean square of its routing weights.
    """

    name: str
    x: Tensor
    original: Tensor
    expert_ids: Tensor
    weights: Tensor
    pool: Tensor

    def rows_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens an expert is given, int64 `[n]`, and their routing weights `[n]`."""
        tokens, slots = (self.expert_ids == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, slots]


class LayerSolver(MomentObserver):
    """Solves each layer's experts when their inputs arrive, and writes the stage's file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        stages: Sequence[str],
        settings: SolveSettings,
        folder: Path,
        options: ForwardOptions,
        reference: InputKeeper | None,
        progress: Progress,
    ) -> None:
        """reference: keeper of the original's inputs, None without propagation."""
        super().__init__(config, stages)
        self._checkpoint, self._config = checkpoint, config
        self._settings = settings
        self._folder, self._options, self._reference = folder, options, reference
        self._progress = progress

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Solve the layer, unless its file is there."""
        experts = self._config.n_routed_experts
        if stage_file(self._folder, layer).exists():
            self._progress.advance(experts)
            return
        original = x
        if self._reference is not None:
            assert self._reference.layer == layer, (self._reference.layer, layer)
            original = self._reference.x
        pool = gram_sum(x, x, weights.square().mean(1)) / x.shape[0]
        given = _Layer(layer, x, original, expert_ids, weights, pool)
        specs = stage_specs(*self._wanted(layer))
        writer = ShardWriter(stage_file(self._folder, layer), plan_shard(specs))
        try:
            step = self._batch()
            for first in range(0, experts, step):
                chosen = range(first, min(first + step, experts))
                self._solve_group(given, chosen, writer)
                self._progress.advance(len(chosen))
        except BaseException:
            writer.abort()
            raise
        writer.close()

    def _wanted(self, layer: str) -> tuple[dict[str, tuple[int, int]], dict[str, Scheme]]:
        """Shapes and schemes of the layer's expert matrices that are solved."""
        shapes, schemes = {}, {}
        for expert in range(self._config.n_routed_experts):
            for projection in PROJECTIONS:
                module = expert_module(layer, expert, projection)
                rows, columns = find_weight(self._checkpoint, module).shape
                scheme = self._settings.scheme_of(module, columns)
                if scheme is not None:
                    shapes[module], schemes[module] = (rows, columns), scheme
        return shapes, schemes

    def _batch(self) -> int:
        """Experts solved together within the memory cap."""
        wide = max(self._config.hidden_size, self._config.moe_intermediate_size)
        matrix = self._config.hidden_size * self._config.moe_intermediate_size
        # Moments in float64 with a factor and copies in float32; weights, work space and codes.
        return max(1, self._settings.memory // (48 * wide * wide + 64 * matrix))

    def _solve_group(self, given: _Layer, experts: range, writer: ShardWriter) -> None:
        """Solve w1 and w3 of some experts, then w2 on what those make of the inputs."""
        gate_up = {e: [self._read(given.name, e, p) for p in ("w1", "w3")] for e in experts}
        solved = self._solve_gate_up(given, gate_up)
        down = {e: self._read(given.name, e, "w2") for e in experts}
        scheme = self._scheme_of(given.name, experts[0], "w2", down[experts[0]])
        codes = [[q] for q in down.values()]
        if scheme is not None:
            moments = [self._hidden_moments(given, e, gate_up[e], solved[e]) for e in experts]
            codes = self._solved(codes, moments, scheme)
        for e, (w2,) in zip(experts, codes, strict=True):
            for projection, q in (("w1", solved[e][0]), ("w2", w2), ("w3", solved[e][1])):
                if self._scheme_of(given.name, e, projection, q) is not None:
                    add_matrix(writer, expert_module(given.name, e, projection), q)

    def _scheme_of(self, layer: str, expert: int, projection: str, q: QTensor) -> Scheme | None:
        return self._settings.scheme_of(expert_module(layer, expert, projection), q.shape[1])

    def _solved(
        self,
        sources: Sequence[Sequence[QTensor]],
        moments: Sequence[tuple[Tensor, Tensor | None]],
        scheme: Scheme,
    ) -> list[list[QTensor]]:
        """Solve matrices under (damped moments, correction) of each member of the batch."""
        corrections = [m for _, m in moments if m is not None]
        return solve_batch(
            sources,
            torch.stack([h for h, _ in moments]),
            torch.stack(corrections) if corrections else None,
            scheme,
            self._settings.sweeps,
        )

    def _solve_gate_up(
        self, given: _Layer, sources: dict[int, list[QTensor]]
    ) -> dict[int, list[QTensor]]:
        first = next(iter(sources))
        scheme = self._scheme_of(given.name, first, "w1", sources[first][0])
        if scheme is None:
            return sources
        moments: list[tuple[Tensor, Tensor | None]] = []
        for expert in sources:
            tokens, weights = given.rows_of(expert)
            rows, squares = given.x[tokens], weights.square()
            total = gram_sum(rows, rows, squares)
            gram = damped(shrunk(total, len(tokens), given.pool))
            found = None
            if self._reference is not None:
                found = correction(given.original[tokens] - rows, rows, gram, squares)
            moments.append((gram.float(), found))
        codes = self._solved(list(sources.values()), moments, scheme)
        return dict(zip(sources, codes, strict=True))

    def _hidden_moments(
        self, given: _Layer, expert: int, source: list[QTensor], solved: list[QTensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Damped moments of what w2 multiplies, and the correction of its target."""
        device = given.x.device
        before = [dequantize(q).to(device) for q in source]
        after = before if self._reference is None else [dequantize(q).to(device) for q in solved]
        tokens, weights = given.rows_of(expert)
        hidden = self._hidden(given.x[tokens], after, weights)
        step = max(1, given.x.shape[0] // _POOL_SAMPLE)
        # The root of the mean square over the layer's own weights keeps the pool's scale right.
        typical = given.weights.square().mean().sqrt()
        sample = given.x[::step]
        pooled = self._hidden(sample, after, typical.expand(sample.shape[0]))
        pool = gram_sum(pooled, pooled) / sample.shape[0]
        gram = damped(shrunk(gram_sum(hidden, hidden), len(tokens), pool))
        if self._reference is None:
            return gram.float(), None
        wanted = self._hidden(given.original[tokens], before, weights)
        return gram.float(), correction(wanted - hidden, hidden, gram)

    def _hidden(self, x: Tensor, matrices: list[Tensor], weights: Tensor) -> Tensor:
        limit = self._config.swiglu_limit
        hidden = expert_hidden(x, matrices[0], matrices[1], limit, self._options)
        return quantized_input(hidden * weights.unsqueeze(1), self._options)

    def _read(self, layer: str, expert: int, projection: str) -> QTensor:
        module = expert_module(layer, expert, projection)
        return read_weight(self._checkpoint, find_weight(self._checkpoint, module))


def solve(
    checkpoint: Checkpoint,
    config: ModelConfig,
    windows: Sequence[Tensor],
    options: ForwardOptions,
    floor: int,
    settings: SolveSettings,
    folder: Path,
    progress: Progress,
    first: Mapping[str, Tensor] | None = None,
) -> Solution:
    """Solve every routed expert that windows (int64 ids) can reach; returns the finished folder.

    first: what is known of the first draw (`Stats.first`). The same call again resumes, layer by
    layer. Raises SolutionError, UnsupportedScheme for a scheme that error feedback is not for,
    DraftError for text too short for a DSpark block, NonFiniteActivation naming what computed NaN,
    and OutputError.
    """
    if settings.schemes is None and settings.scheme.element not in ("int", "ggml"):
        raise UnsupportedScheme(
            f"'{settings.scheme.name}' cannot be solved: error feedback is for integers and GGUF's "
            "block types; FP4 and FP8 schemes are cast from MXFP4, most of them exactly"
        )
    options = replace(options, expert_tokens=None)  # a layer is solved on all its rows
    drafts = drafts_of(checkpoint, config)
    if drafts.kind == "dspark":
        require_blocks(draft_blocks(windows, config))
    stages = [*trunk_stages(config), *drafts.stages]
    header = _header(checkpoint, windows, options, floor, settings)
    begin_solution(folder, header)
    progress.start("Solving", len(stages) * config.n_routed_experts, "expert")
    keeper = InputKeeper() if settings.propagate else None
    solver = LayerSolver(checkpoint, config, stages, settings, folder, options, keeper, progress)
    params = SolvedParams(checkpoint, folder)
    models = [StreamModel(CheckpointParams(checkpoint), options, solver)]
    if keeper is not None:
        models = [
            StreamModel(CheckpointParams(checkpoint), options, keeper),
            StreamModel(params, options, solver),
        ]
    with ExitStack() as stack:
        stack.callback(params.close)
        store = _stream_store(config, windows, len(models), settings.memory, folder, stack)
        taps = drafts.taps(config, len(models))
        streams = stream_forward(models, config, windows, store=store, taps=taps)
        stream_drafts(drafts, models, config, windows, streams, taps, store=store)
    progress.finish()
    digest = checkpoint.digest()
    stats = Stats(digest, floor, solver.stages)
    if first and not settings.propagate:  # counts of the same routing
        stats = replace(stats, first=first)
    write_file_atomically(folder / STATS_NAME, save_stats(stats))
    facts = {stage: {"tokens": stats.stages[stage].tokens.tolist()} for stage in stages}
    finish_solution(folder, header, facts)
    return load_solution(folder, digest)


def _stream_store(
    config: ModelConfig,
    windows: Sequence[Tensor],
    models: int,
    memory: int,
    folder: Path,
    stack: ExitStack,
) -> StreamStore | None:
    """Files for the streams, when they would take more than `memory`; None keeps them in memory.

    What an earlier run left there is not continued from: a solved layer is cheap to pass again,
    and the moments of its inputs are needed.
    """
    row = config.hc_mult * config.hidden_size * 4
    if 2 * models * row * sum(len(ids) for ids in windows) <= memory:
        return None
    scratch = stack.enter_context(Scratch(folder, hashlib.sha256(b"streams").hexdigest()))
    scratch.finished, scratch.notes = 0, {}
    stack.callback(scratch.remove)
    return scratch


def _header(
    checkpoint: Checkpoint,
    windows: Sequence[Tensor],
    options: ForwardOptions,
    floor: int,
    settings: SolveSettings,
) -> dict[str, Any]:
    """What a solution depends on; a folder begun with another header is not resumed."""
    sha = hashlib.sha256()
    for window in windows:
        sha.update(window.numpy().tobytes())
        sha.update(b"|")
    return {
        "version": SOLUTION_VERSION,
        "source_digest": checkpoint.digest(),
        **settings.described(),
        "activations": options.activations,
        "products": options.products,
        "floor": floor,
        "windows": len(windows),
        "tokens": sum(len(w) for w in windows),
        "corpus_digest": sha.hexdigest(),
    }
