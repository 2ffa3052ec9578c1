"""LayerSolver: a layer's matrices solved at the moment their inputs are there.

Attention comes first, from the rows the layer is about to run on (dense_solver.py); then, when the
experts' rows are known, the routed experts, a few at a time within the memory cap, and the shared
one as an expert that every token visits with weight 1. Within an expert w2 is solved on the hidden
rows of the already coded w1 and w3. A file that exists is not solved again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from v4quant_calibration.model.caches import SharedCaches
from v4quant_calibration.model.experts import expert_hidden
from v4quant_calibration.model.numerics import quantized_input
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.streams import Streams
from v4quant_calibration.rounding.second_moments import (
    borrowed_rows,
    correction,
    damped,
    gram_sum,
    pooled,
    shrunk,
)
from v4quant_calibration.rounding.solvers import solve_batch
from v4quant_calibration.solve.dense_solver import DenseSolver, source_matrix
from v4quant_calibration.solve.models import InputKeeper
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solution import stage_file
from v4quant_calibration.solve.solving_bar import SolvingBar
from v4quant_calibration.solve.stage_writer import StageWriter
from v4quant_calibration.solve.team import ALONE, Team
from v4quant_calibration.statistics.collect import MomentObserver
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PROJECTIONS, expert_module
from v4quant_formats.model_config import ModelConfig
from v4quant_formats.weights import find_weight
from v4quant_kernels.codec import dequantize
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import Scheme

# Tokens of the layer sent through every expert, for the pooled moments of its w2's inputs.
_POOL_SAMPLE = 512
# Tokens that speak for all in the shared expert's moments: several times Pro's channels.
_SHARED_ROWS = 32768


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

    def rows_of(self, expert: str) -> tuple[Tensor, Tensor]:
        """Tokens an expert is given, int64 `[n]`, and their routing weights `[n]`.

        The shared expert is given all, of which many enough are taken.
        """
        if expert == shared_expert(self.name):
            step = max(1, self.x.shape[0] // _SHARED_ROWS)
            tokens = torch.arange(0, self.x.shape[0], step, device=self.x.device)
            return tokens, self.weights.new_ones(len(tokens))
        number = int(expert.rpartition(".")[2])
        tokens, slots = (self.expert_ids == number).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, slots]


def shared_expert(layer: str) -> str:
    """Base name of a layer's shared expert."""
    return f"{layer}.ffn.shared_experts"


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
        params: Params,
        reference: InputKeeper | None,
        bar: SolvingBar,
        team: Team = ALONE,
    ) -> None:
        """params: of the model that streams. reference: keeper of the original's inputs, None
        without propagation. team: who solves together.
        """
        super().__init__(config, stages)
        self._checkpoint, self._config = checkpoint, config
        self._settings = settings
        self._folder, self._options, self._reference = folder, options, reference
        self._bar = bar
        self._team = team
        self._dense = DenseSolver(
            checkpoint, config, settings, folder, options, params, reference, team
        )

    def on_layer(self, layer: str, before: Streams, caches: SharedCaches | None) -> None:
        """Solve the layer's attention, unless its file is there."""
        self._dense.solve_attention(layer, before, caches)

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Solve the layer, unless its file is there."""
        experts = self._config.facts(layer).experts
        if self._team.agree(stage_file(self._folder, layer).exists()):
            self._bar.passed()
            return
        self._bar.begin()
        team, own = self._team, x
        x, expert_ids, weights = (team.gather(t) for t in (x, expert_ids, weights))
        original = x
        if self._reference is not None:
            assert self._reference.layer == layer, (self._reference.layer, layer)
            assert self._reference.x.shape == own.shape, (self._reference.x.shape, own.shape)
            original = team.gather(self._reference.x)
        total = gram_sum(x, x, weights.square().mean(1))
        pool = pooled(total, x.shape[0], borrowed_rows(total))
        given = _Layer(layer, x, original, expert_ids, weights, pool)
        schemes = self._wanted(layer)
        shapes = {module: self._shape(module) for module in schemes}
        names = team.share(
            [*(f"{layer}.ffn.experts.{e}" for e in range(experts)), shared_expert(layer)]
        )
        mine = {m for m in schemes if m.rpartition(".")[0] in names}
        writer = StageWriter(team, self._folder, layer, shapes, schemes, mine)
        try:
            routed = [name for name in names if name != shared_expert(layer)]
            step = self._batch()
            for first in range(0, len(routed), step):
                self._solve_group(given, routed[first : first + step], schemes, writer)
                self._bar.solved(team.size * len(routed[first : first + step]))
            if len(routed) < len(names):
                self._solve_group(given, [shared_expert(layer)], schemes, writer)
        except BaseException:
            writer.abort()
            raise
        writer.close()

    def _wanted(self, layer: str) -> dict[str, Scheme]:
        """Schemes of the expert matrices that are solved, the shared expert's among them."""
        found = {}
        modules = [
            expert_module(layer, expert, projection)
            for expert in range(self._config.facts(layer).experts)
            for projection in PROJECTIONS
        ]
        for module in (*modules, *(f"{shared_expert(layer)}.{p}" for p in PROJECTIONS)):
            scheme = self._settings.scheme_of(module, self._shape(module)[1])
            if scheme is not None:
                found[module] = scheme
        return found

    def _shape(self, module: str) -> tuple[int, int]:
        rows, columns = find_weight(self._checkpoint, module).shape
        return rows, columns

    def _batch(self) -> int:
        """Experts solved together within the memory cap."""
        config, memory = self._config, self._settings.memory
        return experts_at_once(memory, config.hidden_size, config.moe_intermediate_size)

    def _solve_group(
        self,
        given: _Layer,
        experts: Sequence[str],
        schemes: Mapping[str, Scheme],
        writer: StageWriter,
    ) -> None:
        """Solve w1 and w3 of some experts, then w2 on what those make of the inputs."""
        gate, down = schemes.get(f"{experts[0]}.w1"), schemes.get(f"{experts[0]}.w2")
        if gate is None and down is None:
            return
        device = given.x.device
        gate_up = {e: [self._read(f"{e}.{p}", device) for p in ("w1", "w3")] for e in experts}
        solved = gate_up if gate is None else self._solve_gate_up(given, gate_up, gate)
        if gate is not None:
            for expert, (w1, w3) in solved.items():
                writer.add(f"{expert}.w1", w1)
                writer.add(f"{expert}.w3", w3)
        if down is None:
            return
        sources = [[self._read(f"{e}.w2", device)] for e in experts]
        moments = [self._hidden_moments(given, e, gate_up[e], solved[e]) for e in experts]
        for expert, (w2,) in zip(experts, self._solved(sources, moments, down), strict=True):
            writer.add(f"{expert}.w2", w2)

    def _read(self, module: str, device: torch.device) -> QTensor:
        return source_matrix(self._checkpoint, module).to(device)

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
        self, given: _Layer, sources: dict[str, list[QTensor]], scheme: Scheme
    ) -> dict[str, list[QTensor]]:
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
        self, given: _Layer, expert: str, source: list[QTensor], solved: list[QTensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Damped moments of what w2 multiplies, and the correction of its target."""
        before = [dequantize(q) for q in source]
        after = before if self._reference is None else [dequantize(q) for q in solved]
        tokens, weights = given.rows_of(expert)
        hidden = self._hidden(expert, given.x[tokens], after, weights)
        step = max(1, given.x.shape[0] // _POOL_SAMPLE)
        # The root of the mean square over the layer's own weights keeps the pool's scale right.
        typical = given.weights.square().mean().sqrt()
        sample = given.x[::step]
        rows = self._hidden(expert, sample, after, typical.expand(sample.shape[0]))
        total = gram_sum(rows, rows)
        pool = pooled(total, sample.shape[0], borrowed_rows(total))
        gram = damped(shrunk(gram_sum(hidden, hidden), len(tokens), pool))
        if self._reference is None:
            return gram.float(), None
        wanted = self._hidden(expert, given.original[tokens], before, weights)
        return gram.float(), correction(wanted - hidden, hidden, gram)

    def _hidden(self, expert: str, x: Tensor, matrices: list[Tensor], weights: Tensor) -> Tensor:
        limit = self._config.swiglu_limit
        if expert.endswith(".shared_experts") and not self._options.shared_clamp:
            limit = 0.0
        hidden = expert_hidden(x, matrices[0], matrices[1], limit, self._options)
        return quantized_input(hidden * weights.unsqueeze(1), self._config, self._options)


def experts_at_once(memory: int, hidden: int, intermediate: int) -> int:
    """Experts solved together in so many bytes, one at least."""
    return max(1, memory // expert_bytes(hidden, intermediate))


def expert_bytes(hidden: int, intermediate: int) -> int:
    """What solving one expert takes: its moments in float64 with a factor and copies in float32;
    weights, work space and codes."""
    wide = max(hidden, intermediate)
    return 48 * wide * wide + 64 * hidden * intermediate
