"""diff: conversions judged by what they did to values, usual mistakes named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.support.conversion import SCHEMES, TINY
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor
from v4quant.checks.diff import DiffResult, diff_checkpoints
from v4quant.cli import cli
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.progress import SilentProgress

Converted = Callable[[str], Path]
SIMILAR = ("int4-g64", "int4-g128", "int3-g64", "int2-g64", "int8-g32")
EXPERT = "layers.1.ffn.experts.0"


def compare(a: Path, b: Path, full: bool = True) -> DiffResult:
    with open_checkpoint(a) as left, open_checkpoint(b) as right:
        return diff_checkpoints(left, right, SilentProgress(), full=full)


def edited(folder: Path, out: Path, change: Callable[[EditableCheckpoint], object]) -> Path:
    checkpoint = EditableCheckpoint.read(folder)
    change(checkpoint)
    return checkpoint.write(out)


@pytest.mark.parametrize(
    ("case", "full"),
    [(c, True) for c in SCHEMES if c not in SIMILAR]
    + [("int4-g32@vllm", True), ("nvfp4@sglang", True)]
    + [("int4-g32", False), ("mxfp4/compressed-tensors", False)],
)
def test_conversions_are_judged_by_their_manifests(
    case: str, full: bool, converted: Converted
) -> None:
    found = compare(TINY, converted(case), full)
    rows = json.loads((converted(case) / "v4quant.json").read_text())["tensors"]
    lossy = {r["module"]: r for r in rows if not r["exact"]}
    assert all(d.verdict == "regridded" for d in found.differences), found.differences
    assert found.same == (not lossy)
    assert {d.module for d in found.differences} <= lossy.keys()
    if full:
        assert {d.module for d in found.differences} == lossy.keys()
        assert (found.compared, found.skipped) == (len(rows), 0)
        for d in found.differences:
            assert d.relative_error == pytest.approx(lossy[d.module]["relative_rms"], rel=1e-4)
    else:
        assert found.compared + found.skipped == len(rows)


def test_a_checkpoint_equals_itself() -> None:
    found = compare(TINY, TINY)
    assert found.same and found.verdicts == {"equal": found.compared}


def only(result: DiffResult) -> tuple[str, str]:
    (difference,) = result.differences
    return difference.module, difference.verdict


def test_nibbles_in_the_other_order(tmp_path: Path) -> None:
    def swap(c: EditableCheckpoint) -> None:
        data = c[f"{EXPERT}.w2.weight"].data
        c[f"{EXPERT}.w2.weight"].data = bytes((b >> 4) | ((b & 15) << 4) for b in data)

    out = edited(TINY, tmp_path / "b", swap)
    assert only(compare(TINY, out)) == (f"{EXPERT}.w2", "nibbles")
    assert only(compare(TINY, out, full=False)) == (f"{EXPERT}.w2", "nibbles")


@pytest.mark.parametrize("case", ["mxfp4", "int4-g32", "int2-g64"])
def test_exchanged_projections(case: str, converted: Converted, tmp_path: Path) -> None:
    def exchange(c: EditableCheckpoint) -> None:
        for name in [n for n in c.names if n.startswith(f"{EXPERT}.w1.")]:
            other = name.replace(".w1.", ".w3.")
            c[name].data, c[other].data = c[other].data, c[name].data

    found = compare(TINY, edited(converted(case), tmp_path / "b", exchange))
    verdicts = {d.module: d.verdict for d in found.differences}
    assert verdicts[f"{EXPERT}.w1"] == verdicts[f"{EXPERT}.w3"] == "exchanged"
    assert list(verdicts.values()).count("exchanged") == 2


def test_a_block_size_misread(tmp_path: Path) -> None:
    """FP4 dequantized to BF16 with the scales of groups shifted by one."""

    def misread(c: EditableCheckpoint) -> None:
        data = c[f"{EXPERT}.w2.scale"].data
        groups = 4
        rows = [data[i : i + groups] for i in range(0, len(data), groups)]
        c[f"{EXPERT}.w2.scale"].data = b"".join(r[1:] + bytes([r[0] + 3]) for r in rows)

    found = compare(TINY, edited(TINY, tmp_path / "b", misread))
    assert only(found) == (f"{EXPERT}.w2", "scales")
    assert found.differences[0].relative_error > 0.1


def test_a_factor_of_the_whole_matrix_is_seen(converted: Converted, tmp_path: Path) -> None:
    def halve(c: EditableCheckpoint) -> None:
        name = f"{EXPERT}.w2.weight_scale_2"
        c[name].data = struct.pack("<f", struct.unpack("<f", c[name].data)[0] / 2)

    assert only(compare(TINY, edited(converted("nvfp4"), tmp_path / "b", halve))) == (
        f"{EXPERT}.w2",
        "scales",
    )


def test_fp4_taken_for_integers(tmp_path: Path) -> None:
    def as_numbers(c: EditableCheckpoint) -> None:
        packed = c[f"{EXPERT}.w2.weight"]
        raw = torch.frombuffer(bytearray(packed.data), dtype=torch.int8).bfloat16()
        c.remove(f"{EXPERT}.w2.scale")
        data = raw.view(torch.uint8).numpy().tobytes()
        c[f"{EXPERT}.w2.weight"] = StoredTensor("BF16", packed.shape, data)

    found = compare(TINY, edited(TINY, tmp_path / "b", as_numbers))
    assert only(found) == (f"{EXPERT}.w2", "shape")
    assert "packed FP4" in found.differences[0].detail


def test_missing_extra_and_unreadable(tmp_path: Path) -> None:
    def break_three(c: EditableCheckpoint) -> None:
        c.remove("layers.0.attn_norm.weight")
        c.rename("norm.weight", "other.weight")
        c.remove(f"{EXPERT}.w3.scale")

    found = compare(TINY, edited(TINY, tmp_path / "b", break_three))
    verdicts = {d.module: d.verdict for d in found.differences}
    assert verdicts == {
        "layers.0.attn_norm": "missing",
        "norm": "missing",
        "other": "extra",
        f"{EXPERT}.w3": "unreadable",
    }


def test_noise_is_no_usual_mistake(tmp_path: Path, generator: torch.Generator) -> None:
    def scramble(c: EditableCheckpoint) -> None:
        old = c["layers.0.attn.wq_b.weight"]
        data = torch.randint(0, 120, (len(old.data),), generator=generator, dtype=torch.uint8)
        old.data = data.numpy().tobytes()

    found = compare(TINY, edited(TINY, tmp_path / "b", scramble))
    assert only(found) == ("layers.0.attn.wq_b", "different")


def test_downcast_tensors_are_regridded_or_exact(tmp_path: Path) -> None:
    name = "layers.1.hc_attn_fn"

    def downcast(c: EditableCheckpoint) -> None:
        data = c[name].data
        halves = b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))
        c[name] = StoredTensor("BF16", c[name].shape, halves)

    found = compare(TINY, edited(TINY, tmp_path / "b", downcast))
    with open_checkpoint(TINY) as checkpoint:
        value = read_dense(checkpoint, name)
    exact = torch.equal(value.bfloat16().float(), value)
    assert found.same if exact else only(found) == (name, "regridded")


def test_the_command(converted: Converted) -> None:
    runner = CliRunner()
    same = runner.invoke(cli, ["diff", str(TINY), str(converted("fp8")), "--full"])
    assert same.exit_code == 0 and "exact" in same.stdout
    other = runner.invoke(cli, ["diff", str(TINY), str(converted("int4-g32")), "--json"])
    assert other.exit_code == 3
    table = json.loads(other.stdout)
    assert not table["same"] and table["verdicts"]["regridded"] == len(table["differences"])


def test_sources_of_any_kind(tmp_path: Path) -> None:
    """What other commands read, this one reads: built-in names and GGUF folders."""
    runner, source = CliRunner(), "builtin:tiny-v4"
    out = str(tmp_path / "gguf")
    made = runner.invoke(cli, ["quantize", source, out, "--scheme", "mxfp4", "--format", "gguf"])
    assert made.exit_code == 0, made.output
    same = runner.invoke(cli, ["diff", source, out, "--samples", "1"])
    assert same.exit_code == 0 and "exact" in same.stdout, same.output
