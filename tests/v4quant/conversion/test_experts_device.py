"""`quantize --device`: experts computed on a device that is only pretended give the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support.conversion import TINY, convert, recipe_of
from tests.support.pretend_device import DEVICE, PretendDevice
from v4quant.conversion import experts, shard_writing
from v4quant.conversion.job import run_job
from v4quant.conversion.plan import make_plan
from v4quant_formats.opening import open_checkpoint


@pytest.mark.parametrize("scheme", ["nvfp4", "int4-g32", "fp8"])
def test_conversion_elsewhere(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recoded, searched, and with what gate and up share."""
    convert(TINY, tmp_path / "here", scheme)
    convert_unit, convert_matrix = shard_writing.convert_unit, experts._convert_matrix
    there: list[bool] = []

    def elsewhere(*arguments: Any) -> Any:
        with PretendDevice():  # each worker is a thread of its own
            return convert_unit(*arguments)

    def noted(*arguments: Any) -> Any:
        result, record = convert_matrix(*arguments)
        parts: tuple[Tensor | None, ...] = result.codes, result.scale, result.global_scale
        there.append(all(p.is_cuda for p in parts if p is not None))
        return result, record

    monkeypatch.setattr(shard_writing, "convert_unit", elsewhere)
    monkeypatch.setattr(experts, "_convert_matrix", noted)
    with open_checkpoint(TINY) as checkpoint:
        plan = make_plan(checkpoint, recipe_of(scheme))
        run_job(replace(plan, device=DEVICE), tmp_path / "there")
    assert there and all(there)
    for file in (tmp_path / "here").iterdir():
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes(), file.name
