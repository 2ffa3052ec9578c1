"""One layer's weights on their way into an ONNX data file: one expert, or one piece, at a time.

Expert matrices follow the rule of every conversion here: codes that already are what is wanted are
copied, values that fit are recoded exactly, anything else is searched for the best scales. All
other tensors keep their values exactly.
"""

from __future__ import annotations

import torch

from v4quant.conversion.records import TensorRecord, lossy_record, make_record, refuse_overflow
from v4quant.onnx_export.plan import DenseTensor
from v4quant_calibration.rounding.measure import measured
from v4quant_calibration.rounding.solvers import optimal
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import WrongDtype
from v4quant_formats.onnx.decode import tile_scales
from v4quant_formats.onnx.experts import expert_pieces
from v4quant_formats.shards import ShardWriter
from v4quant_formats.weight_reading import check_finite, read_dense, read_weight
from v4quant_formats.weights import StoredWeight
from v4quant_kernels import codec
from v4quant_kernels.cast import can_cast, cast_mxfp4
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import fp8_block
from v4quant_kernels.scale_search import can_search
from v4quant_kernels.scheme import MXFP4, Scheme

_ROWS = 512  # rows of a matrix dequantized at a time; a multiple of every tile's height


def write_expert(
    checkpoint: Checkpoint,
    expert: int,
    sources: tuple[StoredWeight, StoredWeight, StoredWeight],
    scheme: Scheme,
    stats: Stats | None,
    writer: ShardWriter,
) -> list[TensorRecord]:
    """Recode one expert's w1, w3, w2 and write its slabs. Returns their records.

    Raises NonFiniteWeight, SourceChanged, FormatError or OutputError.
    """
    done = [_recode(checkpoint, stored, scheme, stats) for stored in sources]
    w1, w3, w2 = (q for q, _ in done)
    for name, first_byte, data in expert_pieces(expert, w1, w3, w2):
        writer.add_piece(name, first_byte, data)
    return [record for _, record in done]


def _recode(
    checkpoint: Checkpoint, stored: StoredWeight, scheme: Scheme, stats: Stats | None
) -> tuple[QTensor, TensorRecord]:
    importance = stats.importance(stored.module) if stats else None
    q = read_weight(checkpoint, stored) if stored.scheme else None
    if q is not None and q.scheme.name == scheme.name:
        return q, make_record(stored, "copied", scheme.name)
    if q is not None and q.scheme == MXFP4 and can_cast(scheme):
        cast = cast_mxfp4(q, scheme)
        if not cast.altered:
            return cast.tensor, make_record(stored, "cast", scheme.name)
        loss = measured(codec.dequantize(q), cast.tensor)
        return cast.tensor, lossy_record(stored, scheme, loss, "cast", cast.altered)
    if q is not None and can_search(q, scheme):
        found = optimal(q, scheme, importance)
        return found.tensor, lossy_record(stored, scheme, found, "quantized", 0)
    values = read_dense(checkpoint, stored.module) if q is None else codec.dequantize(q)
    refuse_overflow(checkpoint, stored, values)
    if scheme.coder:
        found = optimal(values, scheme, importance)
    else:
        found = measured(values, codec.quantize(values, scheme))
    return found.tensor, lossy_record(stored, scheme, found, "quantized", 0)


def write_dense(
    checkpoint: Checkpoint, dense: DenseTensor, experts: int, writer: ShardWriter
) -> None:
    """Write a tensor outside the routed experts, exactly.

    Raises WrongDtype for a table that names experts the layer does not have, NonFiniteWeight.
    """
    source, name = dense.source, dense.name
    if dense.form == "tiles":
        q = read_weight(checkpoint, source)
        assert q.scale is not None
        writer.add(f"{name}.codes", q.codes)
        writer.add(f"{name}.scales", tile_scales(fp8_block.decode_scale(q.scale), q.shape[0]))
        return
    spec = source.first
    if source.scheme is not None:
        rows, columns = source.shape
        for start in range(0, rows, _ROWS):
            q = read_weight(checkpoint, source, (start, min(start + _ROWS, rows)))
            writer.add_piece(name, start * columns * 4, codec.dequantize(q))
        return
    target = {"f32": torch.float32, "bf16": torch.bfloat16, "i64": torch.int64}[dense.form]
    written = 0
    for _, piece in checkpoint.read_chunks(spec.name):
        check_finite(checkpoint, spec, piece)
        if dense.form == "i64" and not bool(((piece >= 0) & (piece < experts)).all()):
            raise WrongDtype(
                f"{checkpoint.path / spec.file}: '{spec.name}' names experts outside 0 to "
                f"{experts - 1}; the file is damaged or belongs to another model"
            )
        data = piece.to(target)
        writer.add_piece(name, written, data)
        written += data.numel() * data.element_size()
