"""Saved logits: a reference's answers in a file, so that it need not be run, or owned, again.

`logits` [sequences, length, vocab] F32 is the whole truth, half a megabyte a token of a released
model. Compressed, a position keeps its K most probable tokens with their log-probabilities
(`top_ids`, `top_logprobs`), the probability of all others together (`rest`) and the
log-probability of the token that follows (`target_logprobs`). KL is then taken over these K and
"any other": joining outcomes never makes two distributions differ more, so that it is a lower
bound of the KL over the whole vocabulary, near it when little is left for the rest. Perplexities
are exact either way.

Beside them stand `input_ids`, against which a later run's text is checked, and `v4quant` (JSON as
bytes): digest of the checkpoint and how it was run.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.scoring import FlatText
from v4quant_calibration.evaluation.token_scores import BEST, Softmax, TokenScores, compared
from v4quant_calibration.forward.logits import LogitTile
from v4quant_formats.errors import FormatError
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shards import ShardWriter, plan_shard
from v4quant_formats.spec import TensorSpec, torch_dtype
from v4quant_formats.system import bytes_at, open_for_reading, open_regular
from v4quant_kernels.errors import V4QuantError

_FACTS = "v4quant"
_MOST_FACTS = 65536
_TOP = ("top_ids", "top_logprobs", "rest", "target_logprobs")


class LogitsError(V4QuantError):
    """Logits that cannot be saved in the requested form, or that belong to another run."""


@dataclass(frozen=True)
class LogitFacts:
    """Where logits come from: the checkpoint's digest and path, and what was rounded on the way."""

    checkpoint: str
    path: str
    activations: str
    products: str = "f32"


class LogitsFile:
    """Writes one model's logits as they are computed, whole or the `top_k` best of a position."""

    def __init__(
        self,
        path: Path,
        corpus: Corpus,
        vocab_size: int,
        facts: LogitFacts,
        top_k: int | None,
        place: Path | None = None,
    ) -> None:
        """Plan the file `path`, written to `place` if given. Raises LogitsError unless all windows
        have one length, and for a K that is too small or larger than the vocabulary."""
        windows = corpus.windows
        lengths = {len(w) for w in windows}
        if len(lengths) != 1:
            raise LogitsError(
                f"{path}: --save-logits needs windows of one length, these have "
                f"{min(lengths)} to {max(lengths)} tokens; drop the short ones"
            )
        if top_k is not None and not BEST <= top_k <= vocab_size:
            raise LogitsError(f"--save-top-k must be {BEST} to {vocab_size}, not {top_k}")
        length = lengths.pop()
        self._vocab, self._top_k, self._text = vocab_size, top_k, FlatText(corpus)
        count = len(windows)
        told = torch.frombuffer(bytearray(json.dumps(vars(facts)).encode()), dtype=torch.uint8)
        specs = [TensorSpec("input_ids", "I64", (count, length)),
                 TensorSpec(_FACTS, "U8", (len(told),))]  # fmt: skip
        if top_k is None:
            specs.append(TensorSpec("logits", "F32", (count, length, vocab_size)))
        else:
            specs.append(TensorSpec("top_ids", "I32", (count, length, top_k)))
            specs.append(TensorSpec("top_logprobs", "F32", (count, length, top_k)))
            specs.append(TensorSpec("rest", "F32", (count, length)))
            specs.append(TensorSpec("target_logprobs", "F32", (count, length)))
        self._writer = ShardWriter(place or path, plan_shard(specs), nameless=True)
        self._writer.add("input_ids", torch.stack(windows))
        self._writer.add(_FACTS, told)
        self._rows: Softmax | None = None

    def __call__(self, piece: LogitTile) -> None:
        """Write one tile; the scored model's logits stand at index 1 (0 when alone)."""
        scored = piece.logits[1] if len(piece.logits) > 1 else piece.logits[0]
        scored = scored.float().cpu()
        if self._top_k is None:
            self._whole(piece, scored)
            return
        if piece.first == 0:
            targets = self._text.targets[piece.start : piece.stop]
            self._rows = Softmax(targets, self._top_k)
        assert self._rows is not None
        self._rows.add(scored, piece.first)
        if piece.last == self._vocab:
            self._compressed(piece.start, self._rows)

    def _whole(self, piece: LogitTile, scored: Tensor) -> None:
        if scored.shape[1] == self._vocab:
            self._writer.add_piece("logits", piece.start * self._vocab * 4, scored)
            return
        for row, values in enumerate(scored, piece.start):
            self._writer.add_piece("logits", (row * self._vocab + piece.first) * 4, values)

    def _compressed(self, start: int, rows: Softmax) -> None:
        assert self._top_k is not None
        logprobs = rows.best_logits.double() - rows.log_sum.unsqueeze(1)
        rest = (1 - logprobs.exp().sum(1)).clamp_min_(0)
        wide, narrow = start * self._top_k * 4, start * 4
        self._writer.add_piece("top_ids", wide, rows.best.int())
        self._writer.add_piece("top_logprobs", wide, logprobs.float())
        self._writer.add_piece("rest", narrow, rest.float())
        self._writer.add_piece("target_logprobs", narrow, -rows.nll.float())

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._writer.abort()


class SavedLogits:
    """A file of saved logits as the reference of a run; see `SavedReference`."""

    known = None

    def __init__(self, path: Path) -> None:
        """Open and check the file. Raises LogitsError and what reading a header raises."""
        self.path = path
        self._specs = read_header(path)
        whole = "logits" in self._specs
        wanted = {"input_ids": "I64"} | (
            {"logits": "F32"}
            if whole
            else dict(zip(_TOP, ("I32", "F32", "F32", "F32"), strict=True))
        )
        for name, dtype in wanted.items():
            spec = self._specs.get(name)
            if spec is None or spec.dtype != dtype:
                raise LogitsError(
                    f"{path}: no tensor '{name}' of {dtype}; this is not a file of --save-logits"
                )
        place = self._specs["input_ids"].shape
        wide = "logits" if whole else "top_ids"
        self._width = self._specs[wide].shape[-1] if self._specs[wide].shape else 0
        shapes = dict.fromkeys((wide, "top_logprobs"), (*place, self._width))
        for name in wanted:
            if self._specs[name].shape != shapes.get(name, place) or len(place) != 2:
                raise LogitsError(
                    f"{path}: '{name}' is {list(self._specs[name].shape)}, which does not fit "
                    f"'input_ids' {list(place)}"
                )
        self.vocab_size = self._width if whole else None
        self.top_k = None if whole else self._width
        if self.top_k is not None and self.top_k < BEST:
            raise LogitsError(f"{path}: holds {self.top_k} tokens per position; at least {BEST}")
        self.facts = self._read_facts()
        self._file = open_for_reading(path)

    @property
    def kl(self) -> str:
        """Over what a KL divergence from these logits is taken."""
        return "whole vocabulary" if self.top_k is None else "lower bound"

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> SavedLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, corpus: Corpus, vocab_size: int) -> None:
        """Raise LogitsError unless the file is about exactly this text and vocabulary."""
        remedy = "use the --corpus, --tokens, --seq-len and --mode it was saved with"
        count, length = self._specs["input_ids"].shape
        windows = corpus.windows
        if (count, {length}) != (len(windows), {len(w) for w in windows}):
            found = sorted({len(w) for w in windows})
            raise LogitsError(
                f"{self.path}: holds {count} windows of {length} tokens, the text is "
                f"{len(windows)} of {found[0]}" + (f" to {found[-1]}" if len(found) > 1 else "") +
                f"; {remedy}"
            )  # fmt: skip
        for number, window in enumerate(windows):
            if not torch.equal(self.read("input_ids", number * length, length), window):
                raise LogitsError(f"{self.path}: window {number} is other text; {remedy}")
        if self.vocab_size is not None and self.vocab_size != vocab_size:
            raise LogitsError(
                f"{self.path}: logits of {self.vocab_size} tokens, the model has {vocab_size}"
            )

    def begin(self, start: int, model: Softmax) -> _WholeRows | _TopRows:
        """The rows from `start` on."""
        if self.top_k is None:
            return _WholeRows(self, start, model)
        return _TopRows(self, start, model, self.top_k)

    def read(self, name: str, first: int, count: int) -> Tensor:
        """`count` elements of a tensor from its element `first` on."""
        spec = self._specs[name]
        dtype = torch_dtype(spec.dtype)
        return self._bytes(spec, first * dtype.itemsize, count * dtype.itemsize).view(dtype)

    def _bytes(self, spec: TensorSpec, first: int, count: int) -> Tensor:
        data = bytes_at(self._file, count, spec.offset + first)
        if len(data) != count:
            raise FormatError(f"{self.path}: became shorter while it was read")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if count else torch.empty(0)

    def _read_facts(self) -> LogitFacts | None:
        """Where the logits come from, if the file says."""
        spec = self._specs.get(_FACTS)
        if spec is None or spec.dtype != "U8" or spec.nbytes > _MOST_FACTS:
            return None
        with open_regular(self.path) as file:
            file.seek(spec.offset)
            data = file.read(spec.nbytes)
        try:
            told: Any = json.loads(data)
            said = {k: str(told[k]) for k in ("checkpoint", "path", "activations")}
            return LogitFacts(**said, products=str(told.get("products", "f32")))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise LogitsError(
                f"{self.path}: '{_FACTS}' is damaged; save the logits again"
            ) from None


class _WholeRows:
    """Rows with the whole vocabulary: scored like a model that runs."""

    def __init__(self, saved: SavedLogits, start: int, model: Softmax) -> None:
        self._saved, self._start = saved, start
        self._scores = TokenScores(model.targets, 2)

    def add(self, logits: Tensor, first: int) -> None:
        """Read the same entries of the file."""
        saved, width = self._saved, self._saved.vocab_size
        assert width is not None
        rows, columns = logits.shape
        if columns == width:
            mine = saved.read("logits", self._start * width, rows * width).view(rows, width)
        else:
            pieces = [
                saved.read("logits", (self._start + row) * width + first, columns)
                for row in range(rows)
            ]
            mine = torch.stack(pieces)
        if not bool(torch.isfinite(mine).all()):
            raise LogitsError(f"{saved.path}: logits hold NaN or infinity; save them again")
        self._scores.add([mine, logits], first)

    def columns(self) -> dict[str, Tensor]:
        """Columns of TokenRecords."""
        return self._scores.columns()[0]


class _TopRows:
    """Rows with the K best: KL over these and "any other", a lower bound of the whole."""

    def __init__(self, saved: SavedLogits, start: int, model: Softmax, top_k: int) -> None:
        rows = model.targets.shape[0]
        self._model = model
        self._ids = saved.read("top_ids", start * top_k, rows * top_k).view(rows, top_k).long()
        logprobs = saved.read("top_logprobs", start * top_k, rows * top_k).view(rows, top_k)
        self._log_p = logprobs.double()
        self._rest = saved.read("rest", start, rows).double()
        self._target = saved.read("target_logprobs", start, rows).double()
        held = torch.cat([self._log_p.flatten(), self._rest, self._target])
        if not bool(torch.isfinite(held).all()) or int(self._ids.min()) < 0:
            raise LogitsError(f"{saved.path}: holds NaN, infinity or negative ids; save it again")
        self._logits = torch.full((rows, top_k), torch.nan)

    def add(self, logits: Tensor, first: int) -> None:
        """Pick the entries the file names."""
        place = self._ids - first
        here = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1))
        self._logits = torch.where(here, found, self._logits)

    def columns(self) -> dict[str, Tensor]:
        """Columns of TokenRecords. Raises LogitsError for ids outside the vocabulary."""
        if bool(self._logits.isnan().any()):
            raise LogitsError("saved logits name tokens outside the model's vocabulary")
        log_q = self._logits.double() - self._model.log_sum.unsqueeze(1)
        p = self._log_p.exp()
        kl = (p * (self._log_p - log_q)).sum(1)
        # Sums of float32 leave about 1e-7 of a rest that is nothing.
        rest_q = (1 - log_q.exp().sum(1)).clamp_min(1e-9)
        rest_p = self._rest.clamp_min(1e-9)
        kl += rest_p * (rest_p.log() - rest_q.log())
        return compared(self._model, self._ids[:, :BEST], -self._target, p[:, 0], kl)
