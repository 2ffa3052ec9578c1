"""Weight errors: injected defects are found, named and explained; good conversions raise none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.conversion import TINY
from tests.support.shard_bytes import EditableCheckpoint
from v4quant_calibration.evaluation import coded_matrix
from v4quant_calibration.evaluation.weight_defects import relative_error
from v4quant_calibration.evaluation.weight_error import (
    NEGLIGIBLE,
    WeightComparison,
    WeightShapeError,
    compare_weights,
    robust_z,
)
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense, read_dense_rows
from v4quant_kernels.progress import SilentProgress


def compare(candidate: Path, reference: Path = TINY) -> WeightComparison:
    with open_checkpoint(reference) as before, open_checkpoint(candidate) as after:
        return compare_weights(before, [after], SilentProgress())[0]


def found(candidate: Path) -> dict[str, str]:
    return {f.where: f.problem for f in compare(candidate).findings}


def parts_of(edited: EditableCheckpoint, module: str) -> list[str]:
    names = [n for shard in edited.shards.values() for n in shard if n.startswith(f"{module}.")]
    return [n for n in names if not n.endswith("weight_shape")]


def exchange(edited: EditableCheckpoint, one: str, other: str) -> None:
    """All parts of two modules change places."""
    for name in parts_of(edited, one):
        a, b = edited[name], edited[name.replace(one, other)]
        a.data, b.data = b.data, a.data


def swap_nibbles(edited: EditableCheckpoint, module: str) -> None:
    (codes,) = (n for n in parts_of(edited, module) if n.endswith((".weight", ".weight_packed")))
    edited[codes].data = bytes((b >> 4) | (b & 15) << 4 for b in edited[codes].data)


def double_scales(edited: EditableCheckpoint, module: str) -> None:
    """Twice the value of every scale, whatever its format."""
    for name in parts_of(edited, module):
        tensor = edited[name]
        if name.endswith(("weight", "weight_packed", "weight_scale_2")):
            continue
        if tensor.dtype == "F8_E8M0":
            tensor.data = bytes(b + 1 for b in tensor.data)
        elif tensor.dtype == "BF16":
            codes = np.frombuffer(tensor.data, dtype="<u2")
            tensor.data = np.where(codes == 0, codes, codes + 0x80).astype("<u2").tobytes()
        else:
            raise AssertionError(tensor.dtype)


@pytest.mark.parametrize(
    "scheme", ["mxfp4", "fp8", "nvfp4", "int8-g32", "int8-g128", "int4-g32", "int4-g64"]
)
def test_good_conversions_raise_no_alarm(converted: Callable[[str], Path], scheme: str) -> None:
    compared = compare(converted(scheme))
    assert compared.findings == ()
    assert len(compared.groups) > 15
    lossy = scheme.startswith("int4")
    for group in compared.groups:
        assert group.expected is not None
        if lossy and "*" in group.where:
            assert group.matrices == 4 and group.scheme == scheme
            assert 0 < group.median <= group.largest < 2 * group.expected
        elif not lossy:
            assert group.largest == 0


def test_itself_has_no_error_at_all() -> None:
    compared = compare(TINY)
    assert compared.findings == ()
    assert {g.largest for g in compared.groups} == {0.0}


def test_errors_by_definition(converted: Callable[[str], Path]) -> None:
    folder = converted("int4-g128")
    with open_checkpoint(TINY) as before, open_checkpoint(folder) as after:
        (compared,) = compare_weights(before, [after], SilentProgress())
        groups = {g.where: g for g in compared.groups}
        for where in ("layers.0.ffn.experts.*.w1", "mtp.0.ffn.experts.*.w2"):
            modules = [where.replace("*", str(i)) for i in range(4)]
            errors = []
            for module in modules:
                x, y = (read_dense(c, module).double() for c in (before, after))
                errors.append(float((y - x).norm() / x.norm()))
            group = groups[where]
            assert group.mean == pytest.approx(np.mean(errors), rel=1e-9)
            assert group.median == pytest.approx(sorted(errors)[1], rel=1e-9)
            assert group.largest == pytest.approx(max(errors), rel=1e-9)
            assert group.worst == modules[int(np.argmax(errors))]


@pytest.mark.parametrize("scheme", ["mxfp4", "int4-g32", "int4-g128", "int8-g128"])
def test_a_doubled_scale_is_named(
    tmp_path: Path, converted: Callable[[str], Path], scheme: str
) -> None:
    edited = EditableCheckpoint.read(converted(scheme))
    double_scales(edited, "layers.2.ffn.experts.3.w2")
    problems = found(edited.write(tmp_path / "x"))
    assert problems.keys() == {"layers.2.ffn.experts.3.w2"}
    told = problems["layers.2.ffn.experts.3.w2"]
    assert "multiplied by 2" in told and f"rounding to {scheme}" in told


@pytest.mark.parametrize("scheme", ["mxfp4", "fp8", "nvfp4", "int4-g32"])
def test_swapped_projections_are_named(
    tmp_path: Path, converted: Callable[[str], Path], scheme: str
) -> None:
    edited = EditableCheckpoint.read(converted(scheme))
    for expert in range(4):
        base = f"layers.1.ffn.experts.{expert}"
        exchange(edited, f"{base}.w1", f"{base}.w3")
    problems = found(edited.write(tmp_path / "x"))
    assert problems.keys() == {f"layers.1.ffn.experts.*.{w}" for w in ("w1", "w3")}
    assert "looks swapped with w3" in problems["layers.1.ffn.experts.*.w1"]
    assert "looks swapped with w1" in problems["layers.1.ffn.experts.*.w3"]
    told = problems["layers.1.ffn.experts.*.w1"]
    assert re.match(r"in 4 of 4 experts, relative weight error 1\.4\d* at worst", told)


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "int4-g32"])
def test_swapped_nibbles_are_named(
    tmp_path: Path, converted: Callable[[str], Path], scheme: str
) -> None:
    edited = EditableCheckpoint.read(converted(scheme))
    for projection in ("w1", "w2", "w3"):
        swap_nibbles(edited, f"layers.3.ffn.experts.0.{projection}")
    problems = found(edited.write(tmp_path / "x"))
    assert problems.keys() == {f"layers.3.ffn.experts.0.{w}" for w in ("w1", "w2", "w3")}
    assert all("nibbles look swapped" in told for told in problems.values())


def test_exchanged_experts_are_named(tmp_path: Path, converted: Callable[[str], Path]) -> None:
    edited = EditableCheckpoint.read(converted("int4-g128"))
    one, other = "layers.0.ffn.experts.1.w2", "layers.0.ffn.experts.3.w2"
    exchange(edited, one, other)
    problems = found(edited.write(tmp_path / "x"))
    assert f"looks swapped with {other}" in problems[one]
    assert f"looks swapped with {one}" in problems[other]


def test_a_few_bad_rows_zeros_and_the_draft(
    tmp_path: Path, converted: Callable[[str], Path]
) -> None:
    edited = EditableCheckpoint.read(converted("int4-g128"))
    rows = edited["layers.0.ffn.experts.2.w1.weight_packed"]
    width = len(rows.data) // 128
    rows.data = rows.data[: 5 * width] + bytes(3 * width) + rows.data[8 * width :]
    scales = edited["mtp.0.ffn.experts.1.w3.weight_scale"]
    scales.data = bytes(len(scales.data))
    shared = edited["layers.1.ffn.shared_experts.w2.weight"]
    assert shared.dtype == "BF16"
    shared.data = bytes(b ^ (0x80 * (i % 2)) for i, b in enumerate(shared.data))
    problems = found(edited.write(tmp_path / "x"))
    assert problems.keys() == {
        "layers.0.ffn.experts.2.w1",
        "mtp.0.ffn.experts.1.w3",
        "layers.1.ffn.shared_experts.w2",
    }
    assert "of 128 rows, the first is row 5" in problems["layers.0.ffn.experts.2.w1"]
    assert "all zero" in problems["mtp.0.ffn.experts.1.w3"]
    shared_told = problems["layers.1.ffn.shared_experts.w2"]
    assert "multiplied by -1" in shared_told and "costs nothing" in shared_told


def test_one_changed_code_of_an_exact_format_is_found(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    tensor = edited["layers.2.ffn.experts.1.w1.weight"]
    tensor.data = bytes([tensor.data[0] ^ 0x04]) + tensor.data[1:]
    problems = found(edited.write(tmp_path / "x"))
    assert problems.keys() == {"layers.2.ffn.experts.1.w1"}
    assert "in 1 of 128 rows, the first is row 0" in problems["layers.2.ffn.experts.1.w1"]


def test_heavy_tails_explain_themselves(tmp_path: Path) -> None:
    """An expert whose own rounding costs more than its siblings' is not a defect."""
    edited = EditableCheckpoint.read(TINY)
    scales = edited["layers.0.ffn.experts.1.w1.scale"]
    # Groups of one row differ by up to 2^6 in scale, so coarser groups lose the small ones.
    scales.data = bytes(b - 6 * (i % 4 == 1) for i, b in enumerate(scales.data))
    source = edited.write(tmp_path / "source")
    from tests.support.conversion import convert

    convert(source, tmp_path / "out", "int4-g128")
    compared = compare(tmp_path / "out", source)
    assert compared.findings == ()


def test_several_candidates_are_judged_apart(
    tmp_path: Path, converted: Callable[[str], Path]
) -> None:
    edited = EditableCheckpoint.read(converted("int4-g32"))
    double_scales(edited, "layers.2.ffn.experts.3.w2")
    folders = [converted("int8-g32"), edited.write(tmp_path / "x"), converted("int4-g64")]
    with open_checkpoint(TINY) as before:
        candidates = [open_checkpoint(f) for f in folders]
        together = compare_weights(before, candidates, SilentProgress())
        for candidate in candidates:
            candidate.close()
    assert together == [compare(f) for f in folders]
    assert [len(c.findings) for c in together] == [0, 1, 0]


def test_dropped_drafts_are_passed_over(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    for shard in edited.shards.values():
        for name in [n for n in shard if n.startswith("mtp.")]:
            del shard[name]
    compared = compare(edited.write(tmp_path / "x"))
    assert compared.findings == ()
    assert not any(g.stage.startswith("mtp") for g in compared.groups)
    assert any(g.stage.startswith("mtp") for g in compare(TINY).groups)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    tensor = edited["layers.0.ffn.experts.1.w1.weight"]
    scale = edited["layers.0.ffn.experts.1.w1.scale"]
    half = (tensor.shape[0] // 2, tensor.shape[1])
    tensor.shape, tensor.data = half, tensor.data[: len(tensor.data) // 2]
    scale.shape = (scale.shape[0] // 2, scale.shape[1])
    scale.data = scale.data[: len(scale.data) // 2]
    with pytest.raises(WeightShapeError, match=r"experts\.1\.w1' is \[64, 128\]"):
        compare(edited.write(tmp_path / "x"))


def test_relative_error_in_pieces(generator: torch.Generator) -> None:
    a = torch.randn(1500, 7, generator=generator)
    b = torch.randn(1500, 7, generator=generator)
    expected = float((a.double() - b.double()).norm() / b.double().norm())
    assert relative_error(a, b) == pytest.approx(expected, rel=1e-12)
    assert relative_error(b, b) == 0
    zero = torch.zeros(3, 3)
    assert relative_error(zero, zero) == 0 and relative_error(zero + 1, zero) == float("inf")


def test_robust_z_needs_a_real_distance() -> None:
    assert robust_z([0.1] * 9) == [0.0] * 9
    assert max(map(abs, robust_z([0.1 + 1e-5 * i for i in range(9)]))) < 0.1
    assert robust_z([0.1] * 8 + [0.2])[-1] == pytest.approx(20)
    assert robust_z([0.0] * 8 + [3 * NEGLIGIBLE])[-1] == pytest.approx(3)
    spread = [0.1 + 0.01 * i for i in range(9)] + [0.2]
    assert 0 < robust_z(spread)[-1] < 6


@pytest.mark.parametrize("scheme", ["mxfp4", "fp8", "int8-g32", "int4-g32", "q4_k", "bf16"])
def test_large_matrices_are_compared_in_pieces(
    converted: Callable[[str], Path], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece the figures are those of whole matrices, and no piece is large."""
    folder = converted(scheme)
    whole = compare(folder)
    monkeypatch.setattr(coded_matrix, "_PIECE", 2**15)
    rows: list[int] = []

    def watched(checkpoint: Checkpoint, module: str, start: int, stop: int) -> torch.Tensor:
        rows.append(stop - start)
        return read_dense_rows(checkpoint, module, start, stop)

    monkeypatch.setattr(coded_matrix, "read_dense_rows", watched)
    parts = compare(folder)
    assert rows
    assert max(rows) <= 256
    for one, other in zip(whole.groups, parts.groups, strict=True):
        assert (one.where, one.worst) == (other.where, other.worst)
        assert other.largest == pytest.approx(one.largest, rel=1e-9, abs=1e-12)
        assert other.expected == pytest.approx(one.expected, rel=1e-9, abs=1e-12)
    assert parts.findings == whole.findings
