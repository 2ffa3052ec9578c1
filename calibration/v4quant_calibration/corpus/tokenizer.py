"""A checkpoint's tokenizer.json, read when the first text needs it.

Special tokens are never added: BOS is put by whoever cuts windows, or stands in an encoded chat.
Those written in a text are recognised, as the release's own programs do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from v4quant_calibration.corpus.tokenizer_growth import (
    MAX_NORMALIZER_GROWTH,
    MAX_SPLITTER_GROWTH,
    grows_too_much,
    growth,
)
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import is_library_failure
from v4quant_formats.sidecars import MAX_SIDECAR_BYTES, TOKENIZER, place_of, small_file
from v4quant_kernels.errors import V4QuantError


class TokenizerError(V4QuantError):
    """A tokenizer.json that is missing or cannot be used."""


def tokenizer_of(checkpoint: Checkpoint) -> TextTokenizer:
    """The tokenizer of a checkpoint: the one given for it, its tokenizer.json, or what a GGUF file
    has in its place."""
    made = partial(small_file, checkpoint, TOKENIZER)
    return TextTokenizer(place_of(checkpoint, TOKENIZER), made)


class TextTokenizer:
    """Text to ids, and back."""

    def __init__(self, path: Path, made: Callable[[], bytes | None] = lambda: None) -> None:
        """`path`: a tokenizer.json; it need not exist if no text is tokenized. made: its content
        where there is no such file.
        """
        self._path, self._made = path, made
        self._tokenizer: Tokenizer | None = None
        self._growth = 1.0

    def __call__(self, text: str) -> Tensor:
        """Ids, int64 [length]. Raises TokenizerError."""
        # Half a surrogate pair, which JSON can spell, has no UTF-8 form for the tokenizer.
        text = text.encode(errors="replace").decode()
        tokenizer = self._loaded()
        with self._usable():
            if tokenizer.normalizer is not None:
                normalize = tokenizer.normalizer.normalize_str
                if grows_too_much(text, self._growth, normalize):
                    raise self._explodes()
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int64)

    def text(self, ids: Tensor) -> str:
        """The text of ids `[length]`, special tokens included. Raises TokenizerError."""
        tokenizer = self._loaded()
        with self._usable():
            return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _loaded(self) -> Tokenizer:
        if self._tokenizer is None:
            made = None if self._path.is_file() else self._made()
            if made is None and not self._path.is_file():
                raise TokenizerError(
                    f"{self._path}: missing; text needs the checkpoint's tokenizer.json "
                    "(give it by --tokenizer; a corpus can also be token ids, as .npy)"
                )
            if made is None and self._path.stat().st_size > MAX_SIDECAR_BYTES:
                raise TokenizerError(
                    f"{self._path}: has more than {MAX_SIDECAR_BYTES:,} bytes, no tokenizer"
                )
            with self._usable():
                self._tokenizer = self._checked(made or self._path.read_bytes())
        return self._tokenizer

    def _checked(self, data: bytes) -> Tokenizer:
        """A tokenizer whose steps do not fill the memory. Raises TokenizerError, or anything."""
        table = json.loads(data)
        self._growth = growth(table.get("normalizer"))
        cutting = growth(table.get("pre_tokenizer"))
        if self._growth > MAX_NORMALIZER_GROWTH or cutting > MAX_SPLITTER_GROWTH:
            raise self._explodes()
        return Tokenizer.from_str(data.decode())

    def _explodes(self) -> TokenizerError:
        return TokenizerError(
            f"{self._path}: its normalizer makes texts many times longer, which no model needs; "
            "use the tokenizer.json of the release"
        )

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Turn what tokenizers raises, bare exceptions and panics, into a TokenizerError."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, TokenizerError) or not is_library_failure(error):
                raise
            raise TokenizerError(f"{self._path}: is not a usable tokenizer ({error})") from None
