"""Run whole models layer by layer, several side by side, in the memory of one layer.

Between two layers a model's entire state is its residual streams, in V4.1 with the caches that few
layers make for all; a scored text needs no KV cache beyond.
So the loops are swapped: for each layer, for each model, push all tokens of all sequences through,
then forget the layer. Comparing two checkpoints of any size therefore takes the streams of both and
one expert. Side by side also allows the question no end result answers: what does the candidate's
layer do on the *reference's* input ("local")? There an error stands out in the layer that makes it,
before it drowns in the streams.

Where streams live, and whether a run that was killed goes on where it stopped, is the business of
a `StreamStore`: memory here, files in `scratch.py`, copies in `kept.py`. How logits leave is told
in `logits.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from v4quant_calibration.model.block import layer_forward
from v4quant_calibration.model.caches import OpenRows, SharedCaches
from v4quant_calibration.model.numerics import NonFiniteActivation
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params, read_rows
from v4quant_calibration.model.streams import PIECE, MemoryStreams, Streams, StreamShape, spans
from v4quant_formats.model_config import ModelConfig

EMBEDDING_ROWS = 4096


@dataclass(frozen=True)
class StreamModel:
    """One model of a run: weights, options, and who watches it.

    `local_observer` watches its layers when they run on the reference's input instead. `name`
    begins the messages of errors in it.
    """

    params: Params
    options: ForwardOptions = field(default_factory=ForwardOptions)
    observer: Observer | None = None
    local_observer: Observer | None = None
    name: str = ""


@dataclass(frozen=True)
class LayerResult:
    """One layer of one model, number `model` of the run; number 0 is the reference.

    before, reference: the reference's streams around the layer. after: this model's behind it.
    local: this model's layer applied to `before`, where asked for. What the reference's layer added
    is `reference - before`, the yardstick for `local - reference`. Streams hold these values only
    until the callback returns.
    """

    layer: str
    model: int
    before: Streams
    reference: Streams
    after: Streams
    local: Streams | None


OnLayer = Callable[[LayerResult], None]
Progress = Callable[[str, int, int], None]
"""Called when a layer of a model is done: its name ("layers.3"), how many there are done, of how
many in all."""


class StreamStore(Protocol):
    """Where the streams of a run live."""

    finished: int
    """Layers that all models have behind them, from an earlier process."""

    notes: dict[str, Any]
    """What the run wants to find again then, JSON values; `commit` keeps it."""

    def open(self, name: str, shape: StreamShape) -> Streams:
        """Room for streams; those called "M.L" are model M's behind L layers."""

    def behind(self, model: int, done: int, before: Streams, keep: bool) -> Streams:
        """Room for model `model`'s streams behind `done` layers; unless `before` must be kept, it
        may be that."""

    def keep(self, get: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """As `notes`, for tensors: `get` is asked when something is kept. Returns what an earlier
        process kept, nothing where there was none."""

    def commit(self, done: int) -> None:
        """All models have `done` layers behind them: what was there before is no longer needed."""


class Taps:
    """Keeps of the trunk what DSpark stages read: at some layers, the mean over streams."""

    def __init__(self, layers: Sequence[int], models: int, inputs: bool = False) -> None:
        """layers: their indices. models: of the run's models, how many from the first on. inputs:
        rows that a layer's attention reads, instead of those behind it."""
        self._layers, self._models, self._inputs = tuple(layers), models, inputs
        self._rows: dict[tuple[int, int], Streams] = {}

    @staticmethod
    def of_config(config: ModelConfig, models: int) -> Taps:
        """What a config's DSpark stages read, if it has any."""
        chain = config.dspark
        return (
            Taps((), models)
            if chain is None
            else Taps(chain.target_layer_ids, models, chain.reads_inputs)
        )

    def open(self, store: StreamStore, number: int, shape: StreamShape) -> None:
        """Room for a model, or what an earlier process kept there."""
        if number < self._models:
            flat = replace(shape, row=(1, shape.row[1]), pre=0)
            for index in self._layers:
                self._rows[number, index] = store.open(f"tap.{number}.{index}", flat)

    def before(self, number: int, index: int, streams: Streams) -> None:
        """A model's layer is about to read these rows."""
        if self._inputs:
            self._keep(number, index, streams)

    def behind(self, number: int, index: int, streams: Streams) -> None:
        """A model's layer is done."""
        if not self._inputs:
            self._keep(number, index, streams)

    def of(self, number: int) -> list[Streams]:
        """A model's rows `[T, 1, hidden]`, layer by layer in the order given."""
        return [self._rows[number, index] for index in self._layers]

    def _keep(self, number: int, index: int, streams: Streams) -> None:
        rows = self._rows.get((number, index))
        if rows is not None:
            for start, stop in spans(0, rows.shape.tokens, PIECE):
                rows.write(start, streams.read(start, stop).mean(1, keepdim=True))


class MemoryStore:
    """Streams in memory; nothing survives the process."""

    def __init__(self) -> None:
        """Nothing is finished."""
        self.finished = 0
        self.notes: dict[str, Any] = {}

    def open(self, name: str, shape: StreamShape) -> Streams:
        """Fresh room."""
        return MemoryStreams(shape)

    def behind(self, model: int, done: int, before: Streams, keep: bool) -> Streams:
        """The same room where possible."""
        return MemoryStreams(before.shape) if keep else before

    def keep(self, get: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Nothing was kept."""
        return {}

    def commit(self, done: int) -> None:
        """Nothing to do."""


@torch.no_grad()
def stream_forward(
    models: Sequence[StreamModel],
    config: ModelConfig,
    sequences: Sequence[Tensor],
    *,
    local: Collection[int] = (),
    on_layer: OnLayer | None = None,
    progress: Progress | None = None,
    store: StreamStore | None = None,
    taps: Taps | None = None,
) -> list[Streams]:
    """Push sequences through the trunk of every model; returns each model's final streams.

    sequences: int64 token ids `[T_i]`, T_i >= 1. local: models whose layers also run on the first
    model's input (on_layer receives the result). store: where streams live, by default in memory.
    taps: filled on the way.
    Raises NonFiniteActivation naming a layer, and whatever providers and store raise.
    """
    store = store or MemoryStore()
    ids = torch.cat(list(sequences))
    streams = [
        store.open(f"{number}.{store.finished}", _shape(model.params, config, sequences))
        for number, model in enumerate(models)
    ]
    taps = taps or Taps((), 0)
    caches = []
    for number, part in enumerate(streams):
        taps.open(store, number, part.shape)
        caches.append(SharedCaches(_cache_room(store, number), part.shape, config))
    if not store.finished:
        for model, room in zip(models, streams, strict=True):
            embed(model.params, ids, room)
    passes = config.num_hidden_layers * (len(models) + (len(local) if on_layer else 0))
    done = store.finished * passes // config.num_hidden_layers

    def advance(layer: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(layer, done, passes)

    for index in range(store.finished, config.num_hidden_layers):
        step = _Step(f"layers.{index}", index, config, ids, store)
        before = streams[0]
        for number, model in enumerate(models):
            keep = number == 0 and on_layer is not None
            streams[number] = step.run(number, model, streams[number], keep, caches[number], taps)
            advance(step.layer)
            if on_layer is not None:
                beside = None
                if number in local:
                    beside = step.beside(model, before, caches[0].reading())
                    advance(step.layer)
                on_layer(
                    LayerResult(step.layer, number, before, streams[0], streams[number], beside)
                )
                del beside
        del before
        store.commit(index + 1)
    return streams


@dataclass(frozen=True)
class _Step:
    """One layer of a run."""

    layer: str
    index: int
    config: ModelConfig
    ids: Tensor
    store: StreamStore

    def run(
        self,
        number: int,
        model: StreamModel,
        before: Streams,
        keep: bool,
        caches: SharedCaches,
        taps: Taps,
    ) -> Streams:
        """The layer on a model's own streams."""
        after = self.store.behind(number, self.index + 1, before, keep)
        on_input = partial(taps.before, number, self.index)
        self._forward(model, before, after, model.observer, caches, on_input)
        taps.behind(number, self.index, after)
        return after

    def beside(self, model: StreamModel, before: Streams, caches: SharedCaches) -> Streams:
        """The layer on the reference's streams and caches."""
        after = self.store.open("local", before.shape)
        self._forward(model, before, after, model.local_observer, caches, None)
        return after

    def _forward(
        self,
        model: StreamModel,
        before: Streams,
        after: Streams,
        observer: Observer | None,
        caches: SharedCaches,
        on_input: Callable[[Streams], None] | None,
    ) -> None:
        ids = self.ids.to(before.shape.device)
        try:
            layer_forward(
                model.params, self.config, self.layer, before, after, ids, model.options, observer,
                caches, on_input,
            )  # fmt: skip
        except NonFiniteActivation as error:
            raise NonFiniteActivation(named(model, str(error))) from None


def _cache_room(store: StreamStore, number: int) -> OpenRows:
    """Where a model's shared caches live."""
    return lambda kind, shape: store.open(f"shared.{number}.{kind}", shape)


def named(model: StreamModel, message: str) -> str:
    """A message that begins with the model's name, if it has one."""
    return f"{model.name}: {message}" if model.name else message


def _shape(params: Params, config: ModelConfig, sequences: Sequence[Tensor]) -> StreamShape:
    norm = params("norm")  # tells dtype and device of the arithmetic
    lengths = tuple(len(ids) for ids in sequences)
    return StreamShape(lengths, (config.hc_mult, config.hidden_size), norm.dtype, norm.device,
                       reading_width(config))  # fmt: skip


def reading_width(config: ModelConfig) -> int:
    """Reading weights that a row of streams carries."""
    return config.hc_mult if config.delayed_mixing else 0


def embed(params: Params, ids: Tensor, streams: Streams) -> None:
    """hc_mult equal streams of each token's embedding, of which the first sublayer reads number 0
    where reading weights are carried. Reads the rows of `embed` that occur."""
    for start, stop in spans(0, streams.shape.tokens, EMBEDDING_ROWS):
        rows = matrix_rows(params, "embed", ids[start:stop])
        embedded = rows.to(streams.shape.device, streams.shape.dtype)
        streams.write(start, embedded.unsqueeze(1).expand(-1, streams.shape.row[0], -1))
        if streams.shape.pre:
            first = torch.zeros(stop - start, streams.shape.pre, dtype=streams.shape.dtype)
            first[:, 0] = 1.0
            streams.write_pre(start, first)


def matrix_rows(params: Params, base: str, ids: Tensor) -> Tensor:
    """Rows of a matrix with a row per token, `[n, width]`, reading near those found in `ids`."""
    kinds, index = ids.unique(return_inverse=True)
    found, at = [], 0
    while at < len(kinds):
        first = int(kinds[at])
        end = int(torch.searchsorted(kinds, first + EMBEDDING_ROWS))
        block = read_rows(params, base, first, int(kinds[end - 1]) + 1)
        found.append(block[kinds[at:end] - first])
        at = end
    return torch.cat(found)[index]
