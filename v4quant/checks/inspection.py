"""inspect: what a checkpoint is, from its headers alone (or, deep, from every byte).

Unlike the converter, inspection does not stop at the first defect: it lists all of them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import (
    TensorName,
    detect_release,
    draft_stages,
    parse_name,
    role_of,
)
from v4quant_formats.errors import FormatError
from v4quant_formats.model_config import Dimensions, LayerFacts
from v4quant_formats.structure import MAX_DEFECTS, find_defects
from v4quant_formats.weight_reading import check_finite, read_weight
from v4quant_formats.weights import StoredWeight
from v4quant_kernels.cast import nonzero_exponents
from v4quant_kernels.errors import NonFiniteWeight
from v4quant_kernels.progress import Progress
from v4quant_kernels.scheme import MXFP4


@dataclass
class ByteClass:
    """Tensors of one role. `weights` counts logical elements of matrices and tables."""

    role: str
    tensors: int = 0
    nbytes: int = 0
    weights: int = 0
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical element, scales included."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class ScaleStatistics:
    """Exponents of the routed experts' E8M0 scales over groups that hold a nonzero code.

    `span_fp8` and `span_nvfp4` are the largest spreads (octaves) inside a 128x128 tile and inside a
    matrix: at most 14 and 17 make the casts to fp8 and nvfp4 exact.
    """

    lowest: int
    highest: int
    span_fp8: int
    span_nvfp4: int
    matrices: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    layer_roles: which layers of V4.1 do what: source, reuse, reindex, candidate source, Engram.
    kv_bytes_per_token, kv_bytes_packed: in BF16, and as V4.1 is served; None where unknown.
    """

    path: str
    release: str
    files: int
    tensors: int
    nbytes: int
    layer_kinds: dict[str, int]
    layer_roles: dict[str, list[int]]
    hash_layers: int
    draft_stages: list[str]
    experts: int
    experts_per_token: int
    classes: list[ByteClass]
    kv_bytes_per_token: int | None
    kv_bytes_packed: int | None
    scales: ScaleStatistics | None
    defects: list[str]


def inspect_checkpoint(
    checkpoint: Checkpoint, progress: Progress, deep: bool = False
) -> Inspection:
    """Describe a checkpoint. `deep` also reads every coded matrix and every float tensor."""
    structure = find_defects(checkpoint)
    config, names, stored = structure.config, structure.names, dict(structure.stored)
    stored |= {n: _unknown(checkpoint, n) for n, parsed in names.items() if parsed is None}
    defects = [str(d) for d in structure.defects]
    scales = _read_all(checkpoint, config, names, stored, progress, defects) if deep else None
    expert_dtypes = {
        w.parts["weight"].dtype
        for w in stored.values()
        if (n := parse_name(f"{w.module}.weight")) and n.expert is not None and "weight" in w.parts
    }
    layers = config.layers if config else ()
    return Inspection(
        path=checkpoint.label,
        release=detect_release(
            checkpoint.tensors, expert_dtypes, str(checkpoint.config.get("model_type", ""))
        ),
        files=len(checkpoint.files),
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        layer_kinds=dict(Counter(layer.kind for layer in layers)),
        layer_roles=layer_roles(layers),
        hash_layers=sum(layer.hashed for layer in layers),
        draft_stages=draft_stages(checkpoint.tensors),
        experts=config.n_routed_experts if config else 0,
        experts_per_token=config.num_experts_per_tok if config else 0,
        classes=_classes(names, stored),
        kv_bytes_per_token=config.kv_bytes_per_token() if config else None,
        kv_bytes_packed=config.kv_bytes_per_token(packed=True) if config and config.v41 else None,
        scales=scales,
        defects=defects[:MAX_DEFECTS],
    )


def layer_roles(layers: Iterable[LayerFacts]) -> dict[str, list[int]]:
    """Numbers of the layers by what they do for others, or take from them; only V4.1's do."""
    found: dict[str, list[int]] = {}
    for layer in layers:
        for role in layer.roles:
            found.setdefault(role, []).append(layer.number)
    return found


def _unknown(checkpoint: Checkpoint, name: str) -> StoredWeight:
    spec = checkpoint.spec(name)
    return StoredWeight(name, {"": spec}, spec.shape, None)


def _classes(
    names: Mapping[str, TensorName | None], stored: dict[str, StoredWeight]
) -> list[ByteClass]:
    classes: dict[str, ByteClass] = {}
    counts: defaultdict[str, int] = defaultdict(int)
    roles: dict[str, str] = {}
    for name, parsed in names.items():
        module = parsed.module if parsed else name
        roles[module] = role_of(parsed)
        counts[module] += 1
    for module, weight in stored.items():
        entry = classes.setdefault(roles[module], ByteClass(roles[module]))
        entry.tensors += counts[module]
        entry.nbytes += weight.nbytes
        elements = math.prod(weight.shape)
        entry.weights += elements
        kind = weight.scheme.name if weight.scheme else weight.first.dtype
        entry.formats[kind] += elements
    return sorted(classes.values(), key=lambda c: -c.nbytes)


def _read_all(
    checkpoint: Checkpoint,
    config: Dimensions | None,
    names: Mapping[str, TensorName | None],
    stored: dict[str, StoredWeight],
    progress: Progress,
    defects: list[str],
) -> ScaleStatistics | None:
    """Read every module: NaN anywhere, E8M0 spreads, routing tables in range."""
    progress.start("Reading", checkpoint.nbytes, "B")
    routed = {n.module for n in names.values() if n and n.expert is not None}
    spans: list[tuple[int, int, int]] = []
    for module, weight in stored.items():
        try:
            if weight.scheme is not None:
                q = read_weight(checkpoint, weight)
                if module in routed and weight.scheme == MXFP4:
                    spans.append(_spans(nonzero_exponents(q)))
            else:
                _check_plain(checkpoint, weight)
        except (FormatError, NonFiniteWeight) as error:
            defects.append(str(error))
        progress.advance(weight.nbytes)
    progress.finish()
    return _summarise(spans)


def _check_plain(checkpoint: Checkpoint, weight: StoredWeight) -> None:
    spec = weight.first
    for _, piece in checkpoint.read_chunks(spec.name):
        check_finite(checkpoint, spec, piece)


def _spans(exponents: Tensor) -> tuple[int, int, int]:
    """(lowest, highest, largest spread in a 128x128 tile) of nonzero groups' exponents."""
    none = -127
    rows, groups = exponents.shape
    present = exponents[exponents > none]
    if present.numel() == 0:
        return 0, 0, 0
    padded = torch.nn.functional.pad(exponents, (0, -groups % 4, 0, -rows % 128), value=none)
    tiles = padded.view(padded.shape[0] // 128, 128, -1, 4)
    high = tiles.amax((1, 3))
    low = tiles.masked_fill(tiles == none, 128).amin((1, 3))
    return int(present.min()), int(present.max()), int((high - low).clamp_min(0).max())


def _summarise(spans: Iterable[tuple[int, int, int]]) -> ScaleStatistics | None:
    spans = list(spans)
    if not spans:
        return None
    return ScaleStatistics(
        lowest=min(s[0] for s in spans),
        highest=max(s[1] for s in spans),
        span_fp8=max(s[2] for s in spans),
        span_nvfp4=max(s[1] - s[0] for s in spans),
        matrices=len(spans),
    )
