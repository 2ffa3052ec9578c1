"""Importance matrices: files that say which inputs of a matrix carry energy, as llama.cpp has them.

llama.cpp's quantizer weighs the error of every weight by the mean square of the input it meets.
`llama-imatrix` writes what it needs as a GGUF file without a model: for each tensor of the model
two more, `<name>.in_sum2`, the sums of squares over the calibration text, and `<name>.counts`, over
how many rows they were taken. Stacks of experts have one row of sums and one count for each expert.
Numbers are float32. A file converted from the older form (imatrix_dat.py) has one row and one
count for a whole stack. (Source: llama.cpp's tools/imatrix/imatrix.cpp, and load_imatrix in
tools/quantize/quantize.cpp, which overlooks tensors of other endings, as this does.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGUFValueType

from v4quant_formats.errors import FormatError, WrongMetadata
from v4quant_formats.gguf.file import ALIGNMENT, Field, plan_named
from v4quant_formats.gguf.header import MAGIC, GgufHeader, GgufTensor, read_gguf_header
from v4quant_formats.gguf.imatrix_dat import looks_like_dat, read_dat
from v4quant_formats.shards import ShardWriter
from v4quant_formats.spec import TensorSpec
from v4quant_formats.system import open_regular
from v4quant_kernels.late import torch

if TYPE_CHECKING:
    from torch import Tensor

IMATRIX = "imatrix"
_AUTHOR = "v4quant"
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Inputs:
    """What is known of a tensor's inputs.

    sums: sums of squares `[matrices, K]`, counts: rows they were taken over `[matrices]`; matrices
    is the number of experts in a stack, 1 elsewhere.
    """

    sums: Tensor
    counts: Tensor


def is_imatrix(header: GgufHeader) -> bool:
    """Whether a GGUF file holds an importance matrix instead of a model."""
    return header.metadata.get("general.type") == IMATRIX


def is_own_imatrix(path: Path) -> bool:
    """Whether a file is an importance matrix that `write_imatrix` wrote, as long as it made it."""
    try:
        header, size = read_gguf_header(path), path.stat().st_size
    except (FormatError, OSError):
        return False
    end = max((t.offset + t.nbytes for t in header.tensors.values()), default=size)
    whole = 0 <= size - end < ALIGNMENT
    return whole and is_imatrix(header) and header.metadata.get("general.author") == _AUTHOR


def looks_like_imatrix(path: Path) -> bool:
    """Whether a file begins as GGUF files do, or as importance matrices of the older form."""
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC or looks_like_dat(path)
    except OSError:
        return False


def write_imatrix(
    path: Path, inputs: Mapping[str, Inputs], corpora: Sequence[str], windows: int, window: int
) -> None:
    """Write `inputs` by llama.cpp's tensor names, one at a time, whole or not at all.

    corpora: names of what was read, in so many windows of at most `window` tokens. Raises
    OutputError.
    """
    fields = [
        Field("general.type", GGUFValueType.STRING, IMATRIX),
        Field("general.author", GGUFValueType.STRING, _AUTHOR),
        Field("imatrix.datasets", GGUFValueType.ARRAY, list(corpora), GGUFValueType.STRING),
        Field("imatrix.chunk_count", GGUFValueType.UINT32, windows),
        Field("imatrix.chunk_size", GGUFValueType.UINT32, window),
    ]
    specs = []
    for name, found in inputs.items():
        matrices, columns = found.sums.shape
        specs.append(TensorSpec(name + _SUMS, "F32", (matrices, columns)))
        specs.append(TensorSpec(name + _COUNTS, "F32", (matrices, 1)))
    writer = ShardWriter(path, plan_named(fields, specs), nameless=True)
    try:
        for name, found in inputs.items():
            writer.add(name + _SUMS, found.sums.float())
            writer.add(name + _COUNTS, found.counts.float().unsqueeze(1))
    except BaseException:
        writer.abort()
        raise
    writer.close()


def read_imatrix(path: Path) -> Iterator[tuple[str, Inputs]]:
    """(llama.cpp's tensor name, what is known of its inputs), a tensor at a time, float64.

    Of a stack of experts there may be one matrix, all experts' rows in a run. Raises WrongMetadata
    for a file of another kind or with half a pair, FormatError for numbers that are none, and what
    `read_gguf_header` and `read_dat` raise.
    """
    if looks_like_dat(path):
        for name, values, calls in read_dat(path):
            # Files of zero calls hold the means themselves.
            count = torch.tensor([max(calls, 1)]).double()
            yield name, Inputs(_checked(path, name, values.unsqueeze(0)), count)
        return
    header = read_gguf_header(path)
    if not is_imatrix(header):
        kind = str(header.metadata.get("general.architecture", "no model's"))[:80]
        raise WrongMetadata(
            f"{path}: is not an importance matrix (its architecture is {kind}); give what "
            "`llama-imatrix` or `calibrate --imatrix` wrote"
        )
    names = [n.removesuffix(_SUMS) for n in header.tensors if n.endswith(_SUMS)]
    halves = sum(n.endswith((_SUMS, _COUNTS)) for n in header.tensors)
    if not names or halves != 2 * len(names):
        raise WrongMetadata(f"{path}: does not hold pairs of '{_SUMS}' and '{_COUNTS}'")
    for name in names:
        sums, counts = header.tensors[name + _SUMS], header.tensors.get(name + _COUNTS)
        if counts is None:
            raise WrongMetadata(f"{path}: '{name}{_COUNTS}' is missing beside its sums")
        yield name, _inputs(path, sums, counts)


def _inputs(path: Path, sums: GgufTensor, counts: GgufTensor) -> Inputs:
    matrices = 1
    for length in sums.shape[:-1]:
        matrices *= length
    count = _read(path, counts).reshape(-1)
    if len(count) != matrices:
        raise WrongMetadata(
            f"{path}: '{sums.name}' is of {matrices} matrices, '{counts.name}' of {len(count)}"
        )
    return Inputs(_read(path, sums).reshape(matrices, -1), count)


def _read(path: Path, tensor: GgufTensor) -> Tensor:
    if tensor.dtype != "F32":
        raise WrongMetadata(f"{path}: '{tensor.name}' is {tensor.dtype}, expected F32")
    with open_regular(path) as file:
        file.seek(tensor.offset)
        data = bytearray(file.read(tensor.nbytes))
    return _checked(path, tensor.name, torch.frombuffer(data, dtype=torch.float32)).view(
        tensor.shape
    )


def _checked(path: Path, name: str, values: Tensor) -> Tensor:
    """The values in float64. Raises FormatError for what no sum of squares is."""
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise FormatError(f"{path}: '{name}' holds NaN, infinity or negative numbers")
    return values.double()
