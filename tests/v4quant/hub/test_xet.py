"""push through hf_xet's own code, into a local store in place of the hub's.

The store (`local://`) is an undocumented mode of the library, so this is one test beside the others
and no base for them; without hf_xet it does not run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.support.conversion import convert
from tests.support.fake_hub import USER, FakeHub
from v4quant.cli import cli


def test_push_through_xet(
    plain_hub: FakeHub, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    plain_hub.xet_store = tmp_path / "store"
    plain_hub.xet_store.mkdir()
    convert(model_folder, tmp_path / "out", "int8-g32")
    plain_hub.fail("commit", "503", 2)
    cli.main(["push", str(tmp_path / "out"), f"{USER}/x"], standalone_mode=False)
    assert plain_hub.count("xet_write_token") and not plain_hub.count("lfs_put")
    shards = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    files = plain_hub.repos[f"{USER}/x"].commits[-1].files
    assert {n: files[n].size for n in shards} == shards
    stored = sum(p.stat().st_size for p in plain_hub.xet_store.rglob("*") if p.is_file())
    assert stored > 0.3 * sum(shards.values()), "the library compresses, but it was sent"
    commits = len(plain_hub.repos[f"{USER}/x"].commits)
    cli.main(["push", str(tmp_path / "out"), f"{USER}/x"], standalone_mode=False)
    assert len(plain_hub.repos[f"{USER}/x"].commits) == commits
