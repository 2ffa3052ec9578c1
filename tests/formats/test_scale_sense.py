"""Scales that make no weights are named before work begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY
from tests.support.other_tools import stored
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.checks.soundness import require_sound
from v4quant_formats.errors import WrongDtype
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.structure import find_defects
from v4quant_formats.weight_reading import read_dense


def _inverted(checkpoint: EditableCheckpoint, module: str) -> None:
    tensor = checkpoint[f"{module}.scale"]
    tensor.data = bytes(254 - exponent for exponent in tensor.data)


@pytest.mark.parametrize("module", ["layers.2.ffn.experts.1.w3", "layers.0.attn.wq_b"])
def test_scales_that_are_to_be_divided_by_are_named(module: str, tmp_path: Path) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    _inverted(checkpoint, module)
    with open_checkpoint(checkpoint.write(tmp_path)) as opened:
        (note,) = find_defects(opened).notes
        assert module in note and "reciprocals" in note


def test_what_reading_would_refuse_is_refused_before(tmp_path: Path) -> None:
    """Whatever a dry run accepts converts: float scales are sampled before work begins."""
    checkpoint, name = EditableCheckpoint.read(TINY), "layers.0.attn.wq_b.scale"
    powers = torch.frombuffer(bytearray(checkpoint[name].data), dtype=torch.uint8).double() - 127
    checkpoint[name] = stored(torch.exp2(-powers).float().view(checkpoint[name].shape))
    with open_checkpoint(checkpoint.write(tmp_path)) as opened:
        with pytest.raises(WrongDtype, match=r"wq_b' would reach .* reciprocals"):
            require_sound(opened)
        with pytest.raises(WrongDtype, match=r"reciprocals"):
            read_dense(opened, "layers.0.attn.wq_b")
