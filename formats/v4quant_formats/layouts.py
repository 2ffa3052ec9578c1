"""The table of layouts, and which one a scheme goes to when the user does not say."""

from __future__ import annotations

from v4quant_formats.compressed_tensors import COMPRESSED_TENSORS
from v4quant_formats.deepseek import DEEPSEEK
from v4quant_formats.layout import Layout
from v4quant_formats.modelopt import MODELOPT
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.scheme import Scheme

LAYOUTS: dict[str, Layout] = {x.name: x for x in (DEEPSEEK, COMPRESSED_TENSORS, MODELOPT)}


class UnsupportedPair(V4QuantError):
    """A scheme and a format that no engine loads together, or that v4quant cannot write yet."""


def choose_layout(scheme: Scheme, name: str | None) -> Layout:
    """The layout for a scheme: the named one, or the first that carries it.

    Raises UnsupportedPair listing the pairs that work.
    """
    if name is not None and name not in LAYOUTS:
        raise UnsupportedPair(f"unknown format '{name}'; choose one of: {', '.join(LAYOUTS)}")
    fitting = [x for x in LAYOUTS.values() if scheme.name in x.schemes]
    for layout in fitting:
        if name in (None, layout.name):
            return layout
    pairs = "; ".join(f"{x.name}: {', '.join(x.schemes)}" for x in LAYOUTS.values())
    wanted = f"scheme '{scheme.name}'" + (f" in format '{name}'" if name else "")
    raise UnsupportedPair(f"{wanted} cannot be written; the pairs that work are {pairs}")
