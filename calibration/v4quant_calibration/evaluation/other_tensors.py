"""What is no coded matrix: norms, routers, biases, hyper-connections, tables of routing.

A conversion copies these, or stores them in another float type. So nothing has to be estimated: a
difference that rounding to that type does not explain is a defect, however small its effect. A norm
that is 2 % too large changes predictions less than another order of sums does, and no text shows
it; here it shows. Tensors that the candidate lacks are the structure's business, not this one's.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from v4quant_calibration.evaluation.weight_defects import explain_values, ratio, squares
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.spec import TensorSpec

_FLOATS, _INTEGERS = ("F32", "F16", "BF16"), ("I64", "I32")
_ELSEWHERE = ("embed", "head")  # compared as matrices
# Rounding to a type costs what it costs; two ways to decode the same value differ by less.
_ABOVE, _NEGLIGIBLE = 1.01, 1e-6
_PIECE = 2**24  # values of one tensor looked at together


def differences(reference: Checkpoint, candidate: Checkpoint) -> list[tuple[str, str]]:
    """(tensor, what is wrong) of every tensor that both have as plain floats, or as integers.

    Those that are compared as matrices, or coded in either file, are passed over. Memory: 2^24
    values of each. Raises what reading raises.
    """
    found = []
    for spec in reference:
        name = parse_name(spec.name)
        if name is None or name.is_linear or name.module in _ELSEWHERE:
            continue
        if spec.name in candidate and candidate.spec(spec.name).shape == spec.shape:
            told = _compared(reference, candidate, spec)
            if told:
                found.append((spec.name, told))
    return found


def _compared(reference: Checkpoint, candidate: Checkpoint, spec: TensorSpec) -> str:
    other = candidate.spec(spec.name)
    pairs = _pieces(reference, candidate, spec)
    if spec.dtype in _INTEGERS and other.dtype in _INTEGERS:
        wrong = sum(int((a.long() != b.long()).sum()) for a, b in pairs)
        return f"{wrong:,} of its entries are others" if wrong else ""
    if spec.dtype not in _FLOATS or other.dtype not in _FLOATS:
        return ""
    error = norm = own = 0.0
    last: tuple[Tensor, Tensor] | None = None
    count = 0
    for right, mine in pairs:
        whole, given = _rows(right), _rows(mine)
        more, square = squares(given, whole)
        error, norm = error + more, norm + square
        own += squares(_rows(right.to(mine.dtype)), whole)[0]
        last, count = (given, whole), count + 1
    lost, cost = ratio(error, norm), ratio(own, norm)
    if lost <= _ABOVE * cost + _NEGLIGIBLE:
        return ""
    told = f"relative error {lost:.3g}, rounding to its type costs "
    told += f"about {cost:.2g}" if cost > _NEGLIGIBLE else "nothing"
    like = explain_values(*last, lost) if last is not None and count == 1 else ""
    return f"{told}; {like}" if like else told


def _pieces(
    reference: Checkpoint, candidate: Checkpoint, spec: TensorSpec
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensor of both, some rows at a time where it is large."""
    if not spec.shape:
        yield reference.read(spec.name), candidate.read(spec.name)
        return
    count = spec.shape[0]
    width = max(1, spec.numel // max(count, 1))
    step = max(1, _PIECE // width)
    for start in range(0, count, step):
        stop = min(start + step, count)
        mine = candidate.read_rows(spec.name, start, stop)
        yield reference.read_rows(spec.name, start, stop), mine


def _rows(values: Tensor) -> Tensor:
    return values.float().reshape(values.shape[0] if values.dim() > 1 else 1, -1)
