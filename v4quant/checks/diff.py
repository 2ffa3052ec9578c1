"""diff: what two checkpoints of any supported formats say differently, module by module.

Both sides are decoded by the second decoder and compared as numbers, so a re-encoding that keeps
every value is told from one that does not. Where values differ a lot, the usual mistakes are tried
in turn: nibbles in the other order, gate and up exchanged, the same codes under other scales (a
block size misread), packed FP4 taken for integers.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from v4quant.checks.independent_decoder import Array, decode_rows
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name, split_part
from v4quant_formats.errors import FormatError
from v4quant_formats.structure import find_defects
from v4quant_formats.weights import StoredWeight, find_weight
from v4quant_kernels.progress import Progress

SAME = ("equal", "exact")
_ROWS = 512
_SAMPLED_ROWS = 128  # a multiple of every tile's height
_SUSPICIOUS = 0.5  # relative error that no re-gridding to 2 bits or more explains
_EXPLAINS = 0.6  # a mistake explains a difference when undoing it leaves at most this part
_PARTNER = {"w1": "w3", "w3": "w1"}


@dataclass(frozen=True)
class Difference:
    """One module. `verdict`:

    equal (same bytes), exact (other encoding, same values), regridded (close; `relative_error` is
    RMS over RMS), scales (same codes under other scales), nibbles (halves of bytes exchanged),
    exchanged (gate and up exchanged), different (none of these), shape, missing (not in B), extra
    (not in A), unreadable.
    """

    module: str
    verdict: str
    a: str
    b: str
    relative_error: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class DiffResult:
    """Differences beyond `equal` and `exact`, counts of every verdict, how much was compared.

    defects: what is structurally wrong with either side, which no comparison of values would show.
    """

    compared: int
    skipped: int
    verdicts: dict[str, int]
    differences: tuple[Difference, ...]
    defects: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both hold the same values, as far as they were compared, and are understood."""
        return not self.differences and not self.defects


def diff_checkpoints(
    a: Checkpoint, b: Checkpoint, progress: Progress, full: bool = False, samples: int = 4
) -> DiffResult:
    """Compare two checkpoints, `a` being the one that is right.

    Headers of all modules are compared. Values: with `full` all of them; otherwise of every module
    outside the routed experts and of `samples` experts a stage, at most 128 rows each, the same
    ones every time.
    """
    left, right = _modules(a), _modules(b)
    wanted = [m for m in left if full or _is_sampled(m, samples)]
    found = [Difference(m, "missing", "present", "absent") for m in left if m not in right]
    found += [Difference(m, "extra", "absent", "present") for m in right if m not in left]
    both = [m for m in left if m in right]
    chosen = set(wanted)
    progress.start("Comparing", len(both), "modules")
    for module in both:
        found.append(_compare(a, b, module, full, module in chosen))
        progress.advance(1)
    progress.finish()
    counts = Counter(d.verdict for d in found)
    differences = tuple(d for d in found if d.verdict not in (*SAME, "unread"))
    skipped = counts.pop("unread", 0)
    defects = tuple(
        f"{side}: {defect}"
        for side, checkpoint in (("A", a), ("B", b))
        for defect in find_defects(checkpoint).defects
        if defect.blocking
    )
    return DiffResult(len(both) - skipped, skipped, dict(counts), differences, defects)


def _modules(checkpoint: Checkpoint) -> list[str]:
    return list(dict.fromkeys(split_part(spec.name)[0] for spec in checkpoint))


def _is_sampled(module: str, samples: int) -> bool:
    name = parse_name(f"{module}.weight")
    if name is None or name.expert is None:
        return True
    # Experts in a pseudo-random order a stage, the same in every run and for every projection.
    return _order(name.stage, name.expert) < samples * 2**32 // max(samples, 64)


def _order(stage: str, expert: int) -> int:
    if expert == 0:
        return 0
    return int.from_bytes(hashlib.sha256(f"{stage}.{expert}".encode()).digest()[:4], "big")


def _compare(a: Checkpoint, b: Checkpoint, module: str, full: bool, values: bool) -> Difference:
    try:
        x, y = find_weight(a, module), find_weight(b, module)
        kinds = _kind(x), _kind(y)
        if x.shape != y.shape:
            half = len(x.shape) == 2 and y.shape == (x.shape[0], x.shape[1] // 2)
            why = "half the columns: packed FP4 taken for 8-bit numbers" if half else ""
            text = f"{list(x.shape)} became {list(y.shape)}"
            return Difference(module, "shape", *kinds, detail=f"{text}; {why}" if why else text)
        if not values:
            return Difference(module, "unread", *kinds)
        if _same_bytes(a, b, x, y, full):
            return Difference(module, "equal", *kinds)
        if len(x.shape) != 2 or "" in x.parts or "" in y.parts:
            return _compare_small(a, b, x, y)
        return _compare_matrix(a, b, x, y, full)
    except FormatError as error:
        return Difference(module, "unreadable", "", "", detail=str(error))


def _kind(stored: StoredWeight) -> str:
    return stored.scheme.name if stored.scheme else stored.first.dtype


def _same_bytes(a: Checkpoint, b: Checkpoint, x: StoredWeight, y: StoredWeight, full: bool) -> bool:
    """Whether parts of the same dtypes hold the same bytes; names of parts do not count."""
    if x.base is not None or y.base is not None:
        return False
    theirs = list(y.parts.values())
    if [(s.dtype, s.shape) for s in x.parts.values()] != [(s.dtype, s.shape) for s in theirs]:
        return False
    for mine, other in zip(x.parts.values(), theirs, strict=True):
        pieces = zip(a.read_chunks(mine.name), b.read_chunks(other.name), strict=True)
        for (_, p), (_, q) in pieces:
            if not torch.equal(p.view(torch.uint8), q.view(torch.uint8)):
                return False
            if not full:
                break
    return True


def _compare_small(a: Checkpoint, b: Checkpoint, x: StoredWeight, y: StoredWeight) -> Difference:
    p, q = (c.read(s.first.name).double().numpy() for c, s in ((a, x), (b, y)))
    error = _relative(p, q)
    verdict = "exact" if not error else "regridded" if error < _SUSPICIOUS else "different"
    return Difference(x.module, verdict, _kind(x), _kind(y), error)


def _compare_matrix(
    a: Checkpoint, b: Checkpoint, x: StoredWeight, y: StoredWeight, full: bool
) -> Difference:
    squared = norm = 0.0
    for start, stop in _spans(x, full):
        p, q = decode_rows(a, x, start, stop), decode_rows(b, y, start, stop)
        squared += float(np.square(p - q).sum())
        norm += float(np.square(p).sum())
    error = math.sqrt(squared / norm) if norm else float(squared > 0)
    if not squared:
        return Difference(x.module, "exact", _kind(x), _kind(y))
    # Not `<`: NaN counts as suspicious.
    if error < _SUSPICIOUS and not _scales_only(a, b, x, y):
        return Difference(x.module, "regridded", _kind(x), _kind(y), error)
    verdict, detail = _diagnose(a, b, x, y)
    return Difference(x.module, verdict, _kind(x), _kind(y), error, detail)


def _spans(stored: StoredWeight, full: bool) -> Iterator[tuple[int, int]]:
    rows = stored.shape[0]
    if full:
        for start in range(0, rows, _ROWS):
            yield start, min(start + _ROWS, rows)
        return
    blocks = -(-rows // _SAMPLED_ROWS)
    digest = hashlib.sha256(stored.module.encode()).digest()
    start = int.from_bytes(digest[:4], "big") % blocks * _SAMPLED_ROWS
    yield start, min(start + _SAMPLED_ROWS, rows)


def _first(c: Checkpoint, stored: StoredWeight) -> Array:
    return decode_rows(c, stored, 0, min(_SAMPLED_ROWS, stored.shape[0]))


def _relative(p: Array, q: Array) -> float:
    norm = float(np.square(p).sum())
    squared = float(np.square(p - q).sum())
    return math.sqrt(squared / norm) if norm else float(squared > 0)


def _diagnose(a: Checkpoint, b: Checkpoint, x: StoredWeight, y: StoredWeight) -> tuple[str, str]:
    """Which usual mistake explains a large difference, from the first rows."""
    p, q = _first(a, x), _first(b, y)
    close = _EXPLAINS * _relative(p, q)
    swapped = (
        q.reshape(q.shape[0], -1, 2)[:, :, ::-1].reshape(q.shape) if q.shape[1] % 2 == 0 else q
    )
    if _relative(p, swapped) < close:
        return "nibbles", "even and odd columns are exchanged: nibbles in the other order"
    path, _, last = x.module.rpartition(".")
    partner = _PARTNER.get(last)
    if partner and f"{path}.{partner}" in {*_modules_near(a, path)}:
        other = find_weight(a, f"{path}.{partner}")
        if other.shape == x.shape and _relative(_first(a, other), q) < close:
            return "exchanged", f"holds the values of '{path}.{partner}' (gate and up exchanged)"
    if _scales_only(a, b, x, y):
        text = "the same codes under other scales: a block size misread, or scales of another "
        return "scales", text + "tensor"
    return "different", "no usual mistake explains it"


def _modules_near(c: Checkpoint, path: str) -> Iterator[str]:
    for last in _PARTNER:
        if any(f"{path}.{last}.{part}" in c for part in ("weight", "weight_packed")):
            yield f"{path}.{last}"


def _scales_only(a: Checkpoint, b: Checkpoint, x: StoredWeight, y: StoredWeight) -> bool:
    """Whether the ratio of both is constant in runs of 16 columns but not everywhere one.

    Then elements agree and only scales differ. A factor of one matrix-wide is included.
    """
    p, q = _first(a, x), _first(b, y)
    width = p.shape[1] - p.shape[1] % 16
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (q / p)[:, :width].reshape(p.shape[0], -1, 16)
    known = np.isfinite(ratio) & (ratio != 0)
    if known.mean() < 0.2:
        return False
    high = np.where(known, ratio, -np.inf).max(-1)
    low = np.where(known, ratio, np.inf).min(-1)
    some = known.any(-1)
    steady = np.abs(high[some] - low[some]) <= 1e-6 * np.abs(high[some])
    return bool(steady.all()) and bool((np.abs(high[some] - 1) > 1e-6).any())
