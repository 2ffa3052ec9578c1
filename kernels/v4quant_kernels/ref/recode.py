"""Recoding by table, in torch: what the loops of `native.recode` compute."""

from __future__ import annotations

from torch import Tensor

from v4quant_kernels.ref.mx import GROUP

ROW_BYTES = 1 << 18  # bytes of codes recoded at a time, to stay within the cache


def recode(codes: Tensor, row: Tensor, table: Tensor, changed: Tensor, out: Tensor) -> int:
    """The meaning of `native.recode.recode`."""
    altered, step = 0, max(1, ROW_BYTES // max(codes.shape[1], 1))
    for start in range(0, codes.shape[0], step):
        part = codes[start : start + step]
        index = part.int().view(part.shape[0], -1, GROUP // 2)
        index = (index + row[start : start + step].int().unsqueeze(-1) * 256).view(-1)
        out[start : start + step] = table[index].view(part.shape)
        altered += int(changed.view(-1)[index].sum())
    return altered
