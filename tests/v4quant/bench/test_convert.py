"""bench convert: a real run on a tiny layer, and what it makes of its measurements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from v4quant.bench import convert as bench
from v4quant.cli.bench import _as_text
from v4quant.synthetic.writing import Request, Written, write_checkpoint
from v4quant_kernels.progress import SilentProgress


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench's layer is gigabytes; a tiny one goes the same way."""

    def write(out: Path, request: Request) -> Written:
        return write_checkpoint(out, replace(request, tiny=True, overrides=()))

    monkeypatch.setattr(bench, "write_checkpoint", write)


def run(folder: Path, schemes: tuple[str, ...], rounds: int) -> bench.ConvertBench:
    return bench.bench_convert(folder, "flash", None, schemes, 1, rounds, SilentProgress())


def test_a_real_run_leaves_nothing_behind(tmp_path: Path) -> None:
    result = run(tmp_path, ("mxfp4",), 1)
    timing = result.timings[0]
    assert timing.seconds > 0 and timing.peak_rss_bytes > 10**7
    assert timing.bytes_in >= result.bytes and timing.bytes_out > 0
    assert timing.ratio_in == pytest.approx(result.copy_seconds / timing.seconds)
    assert not list(tmp_path.iterdir())
    with pytest.raises(bench.BenchError, match="int5"):
        run(tmp_path, ("int5",), 1)
    assert not list(tmp_path.iterdir())


def test_each_conversion_is_set_against_the_copy_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine slows down fivefold in the second round: ratios do not notice, medians do not."""
    copies: Iterator[float] = iter([1.0, 1.0, 5.0, 5.0, 1.1, 1.1])
    spent = {"mxfp4": iter([2.0, 10.0, 2.2]), "fp8": iter([4.0, 20.0, 4.4])}

    def convert(source: Path, out: Path, scheme: str, workers: int) -> dict[str, object]:
        sizes = {"bytes_in": 100, "bytes_out": 200 if scheme == "fp8" else 100}
        seconds = next(spent[scheme])
        return {"scheme": scheme, "seconds": seconds, "peak_rss_bytes": int(seconds), **sizes}

    monkeypatch.setattr(bench, "_copy", lambda source, target: next(copies))
    monkeypatch.setattr(bench, "_convert", convert)
    result = run(tmp_path, ("mxfp4", "fp8"), 3)
    same, wider = result.timings
    assert (same.seconds, same.ratio_in, same.ratio_moved) == pytest.approx((2.2, 0.5, 0.5))
    assert (wider.seconds, wider.ratio_in, wider.ratio_moved) == pytest.approx((4.4, 0.25, 0.375))
    assert wider.peak_rss_bytes == 20 and wider.bytes_in_per_second == pytest.approx(100 / 4.4)
    assert (result.copy_seconds, result.fastest_copy, result.slowest_copy) == (1.1, 1.0, 5.0)
    assert not result.steady and "rough" in _as_text(result)
    assert "rough" not in _as_text(replace(result, slowest_copy=1.2))
