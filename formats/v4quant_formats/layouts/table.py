"""The table of layouts, and which one a scheme and an engine go to."""

from __future__ import annotations

from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.layouts.choices import NEUTRAL
from v4quant_formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from v4quant_formats.layouts.deepseek import DEEPSEEK
from v4quant_formats.layouts.gguf import GGUF
from v4quant_formats.layouts.layout import Layout
from v4quant_formats.layouts.modelopt import MODELOPT
from v4quant_kernels.near_names import did_you_mean
from v4quant_kernels.scheme import Scheme

LAYOUTS: dict[str, Layout] = {x.name: x for x in (DEEPSEEK, COMPRESSED_TENSORS, MODELOPT, GGUF)}


def choose_layout(scheme: Scheme, name: str | None, engine: str = NEUTRAL) -> Layout:
    """The layout for a scheme: the named one, or the first its row names, for an engine.

    Raises UnsupportedPair listing the pairs that work.
    """
    if name is not None and name not in LAYOUTS:
        meant = did_you_mean(name, LAYOUTS)
        raise UnsupportedPair(
            f"unknown format '{name}'; {meant}choose one of: {', '.join(LAYOUTS)}"
        )
    if scheme.formats and name in (None, *scheme.formats):
        return _for_engine(LAYOUTS[name or scheme.formats[0]], scheme, engine)
    pairs = "; ".join(f"{x.name}: {', '.join(x.schemes)}" for x in LAYOUTS.values())
    wanted = f"scheme '{scheme.name}'" + (f" in format '{name}'" if name else "")
    raise UnsupportedPair(f"{wanted} cannot be written; the pairs that work are {pairs}")


def _for_engine(layout: Layout, scheme: Scheme, engine: str) -> Layout:
    if reason := layout.refuses(engine, scheme):
        raise UnsupportedPair(
            f"scheme '{scheme.name}' in format '{layout.name}' cannot be written for {engine}: "
            f"{reason}. As it is, the file loads in {layout.engines}"
        )
    return layout.variants.get(engine, layout)
