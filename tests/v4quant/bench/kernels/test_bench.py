"""The kernel benches where there is no GPU: they say so, or time the torch fallback."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.support.pretend_device import PretendDevice
from v4quant.bench.choices import INDEX_CASES, SHAPES
from v4quant.bench.kernels import indexer, indexer_peers, moe, peers
from v4quant.bench.kernels.cases import random_weights
from v4quant.bench.kernels.device import Machine, Timing, choose_device
from v4quant.cli import cli
from v4quant_kernels import dispatch
from v4quant_kernels.codec import dequantize
from v4quant_kernels.errors import UnsupportedScheme, V4QuantError
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_the_message_says_what_to_do() -> None:
    with pytest.raises(V4QuantError, match="pass --device cpu"):
        choose_device(None)
    with pytest.raises(V4QuantError, match="no CUDA GPU on this machine"):
        choose_device("cuda")
    assert choose_device("cpu") == "cpu"


def test_moe_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "baselines.jsonl"
    command = ["bench", "moe", "--shape", "tiny", "--device", "cpu", "--json"]
    command += ["--tokens", "1", "--tokens", "5"]
    for scheme in ("mxfp4", "int4-g32"):
        done = CliRunner().invoke(cli, [*command, "--scheme", scheme, "--append", str(file)])
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert [r["tokens"] for r in result["rows"]] == [1, 5, 1, 5]
        for row in result["rows"]:
            assert row["scheme"] == scheme and row["seconds"] > 0
            assert row["active_experts"] == 2 or row["tokens"] == 5
            # Two of eight experts of 3 * 256 * 128 weights, and the token in and out.
            if row["tokens"] == 1:
                bits = SCHEMES[scheme].bits_per_weight
                packed = 2 * 3 * 256 * 128 * bits / 8
                assert packed < row["bytes"] < packed * 1.06 + 4 * 256
            assert row["flop"] == 2 * 3 * 256 * 128 * 2 * row["tokens"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["bench"] for line in lines] == ["moe"] * 8, "a line per row"
    assert lines[0]["machine"]["copy_bytes_per_second"] > 0
    assert lines[7]["row"] == row


def test_indexer_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INDEX_CASES, "requests", (5, 1))
    command = ["bench", "indexer", "--context", "512", "--top-k", "7"]
    command += ["--case", "one", "--case", "requests"]
    done = CliRunner().invoke(cli, [*command, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "% of one read" in done.stdout and "requests" in done.stdout


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "fp8", "mxfp8", "int8-g128", "int4-g128"])
def test_made_up_weights_are_numbers(scheme: str) -> None:
    weights = random_weights(SHAPES["tiny"], SCHEMES[scheme], "cpu")
    for q in weights[3]:
        values = dequantize(q)
        assert bool(values.isfinite().all()) and 1e-3 < float(values.std()) < 10


def test_on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that happens on a GPU but the kernels and clocks: no tensor is left on another device.

    The twins stand for the kernels.
    """

    def once(calls: Sequence[Callable[[], object]], device: str) -> Timing:
        assert device == "cuda"
        for call in calls:
            call()
        return Timing(1.0, 0.0)

    gpu = Machine("cuda", "a GPU", "", "", "", 1e9, 1e9, 1e9)
    for module in (moe, indexer):
        monkeypatch.setattr(module, "time_calls", once)
        monkeypatch.setattr(module, "choose_device", lambda device: "cuda")
        monkeypatch.setattr(module, "measure_machine", lambda device: gpu)
    for module in (peers, indexer_peers):
        monkeypatch.setattr(module, "time_foreign", once)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    plain = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": plain())
    monkeypatch.setattr(dispatch, "uses_triton", lambda tensor, backend: False)
    monkeypatch.setattr(dispatch, "architecture", lambda tensor: 90)
    monkeypatch.setattr(indexer, "_L2_BYTES", 2**14)
    for case in ("requests", "prefill"):
        monkeypatch.setitem(INDEX_CASES, case, (3, 1) if case == "requests" else (1, 9))
    with PretendDevice():
        rows = moe.bench_moe(["tiny"], ["mxfp4"], ["bf16", "e4m3"], [3], SilentProgress())
        found = indexer.bench_indexer([256], list(INDEX_CASES), 5, SilentProgress())
    assert len(rows.rows) == 2 and len(found.rows) == 3
    assert [p.peer[:13] for p in rows.peers] == ["torch grouped"] * 2
    assert [p.peer for p in found.peers] == ["torch.topk"] * 3
    assert all("ModuleNotFoundError" in m.reason for m in (*rows.missing, *found.missing))


def test_weights_without_codes_are_refused() -> None:
    with pytest.raises(UnsupportedScheme, match="no packed experts of 'bf16'"):
        random_weights(SHAPES["tiny"], SCHEMES["bf16"], "cpu")
