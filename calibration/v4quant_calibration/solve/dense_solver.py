"""DenseSolver: matrices outside the experts, solved on the rows they multiply.

A layer's attention is run once more before the layer itself, on the rows the model being converted
gives it, only to sum the moments of what its matrices multiply; then they are solved and the layer
runs with the result. wq_a and wkv share their rows with the compressors' projections, wq_b with the
indexer's; wo_a has a part for every group of heads, each with inputs of its own. So attention is
solved on what the layers before it lost, and what wq_a or wo_a lose is not made up for further on.
The target of those that read the layer's input is corrected for that input's error, as experts'
are. Moments of all tokens are summed in float64: about 1.8 GB for Flash's widest layer.

The head comes last, on the rows of both models behind the trunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from v4quant_calibration.forward.logits import head_inputs
from v4quant_calibration.model.block import attention_sublayer
from v4quant_calibration.model.caches import SharedCaches
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.sharing import SHARING
from v4quant_calibration.model.streams import Streams, spans
from v4quant_calibration.rounding.second_moments import (
    CrossSums,
    damped,
    gram_sum,
    pooled,
    rows_of_no_direction,
)
from v4quant_calibration.rounding.solvers import solve_batch
from v4quant_calibration.solve.models import InputKeeper
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solution import HEAD, attention_file, stage_file
from v4quant_calibration.solve.stage_writer import StageWriter
from v4quant_calibration.solve.team import ALONE, Team
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import ModelConfig
from v4quant_formats.weight_reading import read_dense, read_weight
from v4quant_formats.weights import find_weight
from v4quant_kernels.codec import dequantize
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES, Scheme

# Matrices of an attention by the one whose rows they share.
_SHARING = {shared: names for shared, names in SHARING.items() if shared.startswith("attn.")}
_ROWS = 4096


def source_matrix(checkpoint: Checkpoint, module: str) -> QTensor:
    """A matrix of the source, coded or plain."""
    stored = find_weight(checkpoint, module)
    if stored.scheme is not None:
        return read_weight(checkpoint, stored)
    return _plain(read_dense(checkpoint, module))


def _plain(values: Tensor) -> QTensor:
    # BF16's decoder widens whatever float it finds, so float32 values pass through it unchanged.
    return QTensor(SCHEMES["bf16"], (values.shape[0], values.shape[1]), values)


class _Moments(SilentObserver):
    """Sums the moments of what an attention's matrices multiply, `[groups, K, K]` by matrix."""

    def __init__(self, original: Sequence[Tensor] | None) -> None:
        """original: pieces of the reference's rows of the layer's input, in order; None without."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.lost: CrossSums | None = None
        self._original = None if original is None else iter(original)

    def on_linear(self, module: str, x: Tensor) -> None:
        """Add the rows."""
        matrix = module.rpartition(".")[2]
        grouped = x if x.ndim == 3 else x.unsqueeze(0)
        found = torch.stack([gram_sum(rows, rows) for rows in grouped])
        self.sums[matrix] = self.sums[matrix] + found if matrix in self.sums else found
        self.counts[matrix] = self.counts.get(matrix, 0) + grouped.shape[1]
        if matrix == "wkv" and self._original is not None:
            if self.lost is None:
                self.lost = CrossSums(x.shape[1], x.device)
            self.lost.add(next(self._original) - x, x)

    def join(self, team: Team) -> None:
        """Add what the other ranks have seen."""
        if team.size == 1:
            return
        for matrix in self.sums:
            self.sums[matrix] = team.total(self.sums[matrix])
            count = torch.tensor([self.counts[matrix]], device=self.sums[matrix].device)
            self.counts[matrix] = int(team.total(count))
        if self.lost is not None:
            self.lost.join(team.total)

    def damped(self, matrix: str) -> Tensor:
        """Damped moments, float64 `[groups, K, K]`."""
        total, count = self.sums[matrix], self.counts[matrix]
        moments = pooled(total, count, rows_of_no_direction(total.shape[-1], count))
        return torch.stack([damped(one) for one in moments])


class DenseSolver:
    """Solves attentions and the head for the schemes that the settings name; writes their files."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        settings: SolveSettings,
        folder: Path,
        options: ForwardOptions,
        params: Params,
        reference: InputKeeper | None,
        team: Team = ALONE,
    ) -> None:
        """As `LayerSolver`."""
        self._team = team
        self._checkpoint, self._config, self._settings = checkpoint, config, settings
        self._folder, self._options, self._params = folder, options, params
        self._reference = reference

    def solve_attention(self, layer: str, before: Streams, caches: SharedCaches | None) -> None:
        """Solve a layer's attention on the rows it is about to run on, unless its file is there."""
        wanted = self._wanted(f"{layer}.{name}" for names in _SHARING.values() for name in names)
        file = attention_file(layer)
        if not wanted or self._team.agree(stage_file(self._folder, file).exists()):
            return
        original = None if self._reference is None else self._reference.attention
        seen = _Moments(original)
        attention_sublayer(
            self._params, self._config, layer, before, None, self._options, seen, caches
        )
        seen.join(self._team)
        found: dict[str, QTensor] = {}
        parts = {
            shared: [m for name in names if (m := f"{layer}.{name}") in wanted]
            for shared, names in _SHARING.items()
        }
        for shared in self._team.share([shared for shared, modules in parts.items() if modules]):
            modules = parts[shared]
            matrix = shared.removeprefix("attn.")
            gram = seen.damped(matrix)
            lost = None
            if seen.lost and matrix == "wkv":
                borrowed = rows_of_no_direction(gram.shape[-1], seen.counts[matrix])
                lost = seen.lost.correction(gram[0], borrowed)
            found |= self._solved(modules, gram.float(), lost, wanted)
        self._write(file, wanted, found)

    def solve_head(self, params: Sequence[Params], streams: Sequence[Streams]) -> None:
        """Solve the head on the trunk's last rows; the last model is the one being converted."""
        wanted = self._wanted([HEAD])
        if not wanted or self._team.agree(stage_file(self._folder, HEAD).exists()):
            return
        total, lost = None, None
        tokens = streams[0].shape.tokens
        for start, stop in spans(0, tokens, _ROWS):
            rows = [
                head_inputs(p, s, start, stop, self._config)
                for p, s in zip(params, streams, strict=True)
            ]
            x = rows[-1]
            total = gram_sum(x, x) if total is None else total + gram_sum(x, x)
            if len(rows) > 1:
                lost = lost or CrossSums(x.shape[1], x.device)
                lost.add(rows[0] - x, x)
        assert total is not None, "there is text"
        total = self._team.total(total)
        tokens = int(self._team.total(torch.tensor([tokens], device=total.device)))
        if lost is not None:
            lost.join(self._team.total)
        found: dict[str, QTensor] = {}
        if self._team.is_first:
            borrowed = rows_of_no_direction(len(total), tokens)
            gram = damped(pooled(total, tokens, borrowed))
            correction = None if lost is None else lost.correction(gram, borrowed)
            found = self._solved([HEAD], gram.float().unsqueeze(0), correction, wanted)
        self._write(HEAD, wanted, found)

    def _wanted(self, modules: Iterable[str]) -> dict[str, Scheme]:
        schemes = self._settings.schemes or {}
        return {module: schemes[module] for module in modules if module in schemes}

    def _solved(
        self,
        modules: Sequence[str],
        gram: Tensor,
        correction: Tensor | None,
        wanted: Mapping[str, Scheme],
    ) -> dict[str, QTensor]:
        """Matrices that multiply the same rows; where moments are grouped, so are their rows."""
        found: dict[str, QTensor] = {}
        groups = len(gram)
        corrections = None if correction is None else correction.unsqueeze(0)
        for scheme in dict.fromkeys(wanted[m] for m in modules):
            own = [m for m in modules if wanted[m] == scheme]
            sources = [source_matrix(self._checkpoint, m) for m in own]
            batch = [sources]
            if groups > 1:
                batch = [[_plain(part)] for part in dequantize(sources[0]).chunk(groups)]
            solved = solve_batch(batch, gram, corrections, scheme, self._settings.sweeps)
            if groups > 1:
                codes = torch.cat([q.codes for (q,) in solved])
                solved = [[QTensor(scheme, sources[0].shape, codes)]]
            found |= dict(zip(own, solved[0], strict=True))
        return found

    def _write(self, name: str, wanted: Mapping[str, Scheme], found: Mapping[str, QTensor]) -> None:
        """wanted: all that the file holds. found: what this rank has solved."""
        shapes = {}
        for module in wanted:
            rows, columns = find_weight(self._checkpoint, module).shape
            shapes[module] = (rows, columns)
        writer = StageWriter(self._team, self._folder, name, shapes, wanted, found)
        try:
            for module, q in found.items():
                writer.add(module, q)
        except BaseException:
            writer.abort()
            raise
        writer.close()


def dense_bytes(config: ModelConfig) -> int:
    """What solving an attention takes: the moments of what all its matrices multiply, and copies
    and a factor of the largest."""
    heads = config.num_attention_heads * config.head_dim // config.o_groups
    parts = [
        config.hidden_size**2,
        config.q_lora_rank**2,
        config.o_groups * heads**2,
        (config.o_groups * config.o_lora_rank) ** 2,
    ]
    return 8 * sum(parts) + 40 * max(parts)
