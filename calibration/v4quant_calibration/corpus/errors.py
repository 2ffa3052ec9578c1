"""The error of a corpus."""

from __future__ import annotations

from v4quant_kernels.errors import V4QuantError


class CorpusError(V4QuantError):
    """A corpus that cannot be read, is too short, or does not fit the model's vocabulary."""
