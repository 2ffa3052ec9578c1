"""imatrix: statistics as llama.cpp's importance matrices, and those of others as statistics.

Both say the same of an expert's inputs, the sum of squares of every channel and over how many
tokens it was taken; importance matrices also say it of matrices outside the routed experts, and
have no largest magnitudes. llama.cpp has a stack of experts for each of w1 and w3, which multiply
the same rows. (The rows of w2 include the routing weight here, as in the release.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from v4quant_calibration.model.sharing import SHARING
from v4quant_calibration.statistics.stats import DenseInputs, StageStats, Stats, StatsError
from v4quant_formats.deepseek_v4 import expert_module
from v4quant_formats.gguf.imatrix import Inputs, read_imatrix, write_imatrix
from v4quant_formats.gguf.names import meaning_of, place_of
from v4quant_formats.model_config import ModelConfig

_SOURCES = {"w1": "w13", "w3": "w13", "w2": "w2"}


def save_imatrix(
    path: Path, stats: Stats, config: ModelConfig, corpora: Sequence[str], windows: Sequence[Tensor]
) -> None:
    """Write statistics, with those of dense matrices where there are some, for llama.cpp.

    Stages that llama.cpp has no block for (DSpark's) are left out. Raises OutputError.
    """
    inputs = {name: found for name, found in _named(stats, config.num_hidden_layers) if name}
    longest = max((len(ids) for ids in windows), default=1)
    write_imatrix(path, inputs, corpora, len(windows), longest)


def _named(stats: Stats, layers: int) -> Iterator[tuple[str, Inputs]]:
    for stage, found in stats.stages.items():
        for projection, source in _SOURCES.items():
            place = place_of(expert_module(stage, 0, projection), layers)
            if place is not None:
                yield place.tensor, Inputs(found.sums[source], found.tokens)
    for module, seen in stats.dense.items():
        place = place_of(module, layers)
        if place is not None:
            yield place.tensor, Inputs(seen.sums.unsqueeze(0), torch.tensor([float(seen.rows)]))


def load_imatrix(path: Path, config: ModelConfig, source_digest: str, floor: int) -> Stats:
    """Somebody's importance matrix as statistics of the checkpoint with `source_digest`.

    The file does not say which model it is of; its shapes must be this one's. A layer without
    both of its experts' inputs is left out. Raises StatsError and what `read_imatrix` raises.
    """
    experts: dict[str, dict[str, Inputs]] = {}
    dense: dict[str, DenseInputs] = {}
    for name, found in read_imatrix(path):
        meaning = meaning_of(name, config.num_hidden_layers)
        if meaning is None or len(meaning.modules) != 1:
            continue
        module = meaning.modules[0]
        if not meaning.stacked:
            dense[module] = DenseInputs(found.sums.sum(0), int(found.counts.sum()))
            continue
        stage, _, projection = module.partition(".ffn.experts.{}.")
        source = _SOURCES[projection]
        stack = _spread(found, _shape_of(config, stage, source), floor)
        _check_shape(path, name, stack, config, stage, source)
        experts.setdefault(stage, {})[source] = stack
    stages = {
        stage: _stage(parts) for stage, parts in experts.items() if parts.keys() == {"w13", "w2"}
    }
    if not stages:
        raise StatsError(
            f"{path}: covers no layer of this model; give an importance matrix of a DeepSeek-V4"
        )
    return Stats(source_digest, floor, stages, dense=dense)


def _shape_of(config: ModelConfig, stage: str, source: str) -> tuple[int, int]:
    """Experts and channels of a stack's inputs."""
    columns = config.hidden_size if source == "w13" else config.moe_intermediate_size
    return config.facts(stage).experts, columns


def _spread(found: Inputs, shape: tuple[int, int], floor: int) -> Inputs:
    """A stack that is one row, as the older form of the file has it, by experts.

    How many tokens each saw is not known then, so none counts as starved but those whose values
    are all alike, which is how that form says that an expert saw none.
    """
    experts, columns = shape
    if tuple(found.sums.shape) != (1, experts * columns) or experts == 1:
        return found
    means = (found.sums / found.counts.clamp_min(1)).view(shape)
    counts = torch.where(means.amin(1) < means.amax(1), float(floor), 0.0).double()
    return Inputs(means * counts.unsqueeze(1), counts)


def _check_shape(
    path: Path, name: str, found: Inputs, config: ModelConfig, stage: str, source: str
) -> None:
    wanted = _shape_of(config, stage, source)
    if tuple(found.sums.shape) != wanted:
        raise StatsError(
            f"{path}: '{name}' is of {found.sums.shape[0]} experts of {found.sums.shape[1]} "
            f"channels, this model has {wanted[0]} of {wanted[1]}; it was made for another model"
        )


def _stage(parts: Mapping[str, Inputs]) -> StageStats:
    tokens = parts["w13"].counts.long()
    unknown = torch.zeros(len(tokens))
    sums = {source: found.sums for source, found in parts.items()}
    return StageStats(tokens, sums, dict.fromkeys(parts, unknown))


def spread_dense(seen: Mapping[str, DenseInputs]) -> dict[str, DenseInputs]:
    """What was seen of one matrix, for all that multiply the same rows."""
    found = {}
    for module, inputs in seen.items():
        stage = ".".join(module.split(".")[:2])
        for below in SHARING.get(module.removeprefix(f"{stage}."), ()):
            found[f"{stage}.{below}"] = inputs
    return found
