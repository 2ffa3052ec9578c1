"""The tiny V4.1 that ships: small, whole, trained, with its Engram in use."""

from __future__ import annotations

import json
from pathlib import Path

import v4quant
from tests.support.scripts import load_script
from v4quant.builtin import HELDOUT, TINY_V41, resolve_source
from v4quant.checks.inspection import inspect_checkpoint
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

FOLDER = resolve_source(TINY_V41)


def test_it_is_small_and_nothing_is_wrong_with_it() -> None:
    sizes = [p.stat().st_size for p in FOLDER.iterdir()]
    assert sum(sizes) < 20_000_000 and max(sizes) < 2**21
    with open_checkpoint(FOLDER) as checkpoint:
        found = inspect_checkpoint(checkpoint, SilentProgress())
    assert list(found.defects) == []
    assert found.layer_kinds == {"swa": 2, "csa2/2": 2, "csa2/1": 2}


def test_it_has_learned_and_reads_its_engram(tmp_path: Path) -> None:
    """Better than unigrams by far; emptied tables change what it says."""
    emptied = load_script("quality_v41").empty_tables(FOLDER, tmp_path / "emptied")
    found = v4quant.evaluate(
        emptied, reference=FOLDER, corpus=HELDOUT, tokens=2048, seq_len=512, weights=False
    )
    assert found.reference_perplexity is not None and found.reference_perplexity.value < 70
    assert found.distance is not None and found.floor is not None
    assert found.distance.kl_mean > max(0.02, 50 * found.floor.kl_mean)
    assert found.distance.top1_agreement < 0.95


def test_the_page_says_what_was_measured() -> None:
    """More bits, less damage, for tables and for experts; the emptied tables are the worst."""
    script = load_script("quality_v41")
    stored = json.loads(script.STORED.read_text())
    assert script.PAGE.read_text() == script.page(stored)
    rows = stored["rows"]
    for group in ("engram", "experts"):
        kinds = [k for k in rows if k.startswith(f"{group} ") and not k.endswith(script.EMPTY)]
        by_error = sorted(kinds, key=lambda k: rows[k]["error"])
        assert [rows[k]["kl"] for k in by_error] == sorted(rows[k]["kl"] for k in kinds)
    assert all(
        rows[f"engram {script.EMPTY}"]["kl"] > rows[f"engram {k}"]["kl"] for k in script.TABLES
    )
